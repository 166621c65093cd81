"""Recipes as YAML: read from a file or by the name of a ready one, changed from the command line, written.

What a recipe means is in `recipe.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from modernbert_decoder.errors import InputError, ModelNotFoundError
from modernbert_decoder.training.errors import RecipeError
from modernbert_decoder.training.recipe import Recipe
from modernbert_decoder.training.strict_reading import read_section

READY_RECIPES: Final = Path(__file__).parent / "recipes"


def read_recipe(name: str | Path, *, changes: Iterable[str] = ()) -> Recipe:
    """A recipe from a YAML file or, by its name, one of those that come with the package.

    Args:
        name: a path, or the name of a ready recipe.
        changes: `key=value` each, such as `optimizer.learning_rate=1e-3`; the value is YAML.

    Raises:
        ModelNotFoundError: there is no such file or ready recipe.
        RecipeError: the recipe cannot be followed.
    """
    import yaml

    path = find_recipe(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds no table of keys; see the ready recipes: {', '.join(ready_names())}")
    for change in changes:
        key, separator, text = change.partition("=")
        if not separator:
            raise InputError(f"--set {change!r} has no `=`; write key=value, such as run.seed=1")
        try:
            _change(content, key.strip(), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise InputError(f"--set {change!r}: the value is no YAML: {error}") from error
    return read_section(Recipe, content, source=str(path))


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe.

    Raises:
        ModelNotFoundError: nothing is there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    ready = READY_RECIPES / f"{name}.yaml"
    if str(name) in ready_names():
        return ready
    raise ModelNotFoundError(
        f"no recipe {str(name)!r}: there is no such file, and the ready ones are {', '.join(ready_names())}"
    )


def ready_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in READY_RECIPES.glob("*.yaml"))


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML, every key stated."""
    import yaml

    text: str = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=100)
    return text


def _change(content: Any, key: str, value: Any) -> None:
    """Sets a key such as `phases.0.tokens` in what YAML gave."""
    *path, last = key.split(".")
    here = content
    for part in path:
        if isinstance(here, list) and part.isdigit() and int(part) < len(here):
            here = here[int(part)]
        elif isinstance(here, dict):
            if not isinstance(here.get(part), dict | list):
                here[part] = {}
            here = here[part]
        else:
            raise InputError(f"--set {key}: {part!r} is not in the recipe")
    if isinstance(here, list):
        if not last.isdigit() or int(last) >= len(here):
            raise InputError(f"--set {key}: the list has entries 0 to {len(here) - 1}")
        here[int(last)] = value
    else:
        here[last] = value
