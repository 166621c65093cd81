"""Chat templates: a folder's own recipe for writing a conversation as one text, run in a sandbox.

Templates come with models and are programs in Jinja's language: they are not trusted. This module knows files
and messages; the text goes to the tokenizer elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from modernbert_decoder.errors import CheckpointError, InputError

_DEFAULT_NAME = "default"


class ChatTemplate:
    """One template.

    Args:
        source: in Jinja's language.
        special_tokens: names such as `bos_token` and the texts that they stand for in the template.

    Raises:
        CheckpointError: it is not a template.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str]) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template cannot be read: {error}") from None
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as text, up to where the answer begins.

        Raises:
            InputError: the template refuses the messages.
        """
        import jinja2

        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=True, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise InputError(f"messages do not fit the model's chat template: {error}") from None


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """The template in `chat_template.jinja`, or in `tokenizer_config.json`; None if there is neither.

    Raises:
        CheckpointError: it cannot be read.
    """
    config_path = folder / "tokenizer_config.json"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else _named(config.get("chat_template"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the chat template in {folder}: {error}") from None
    if source is None:
        return None
    return ChatTemplate(source, special_tokens=_special_tokens(config))


def _named(templates: Any) -> str | None:
    """A template, or the default one of several."""
    if isinstance(templates, list):
        by_name = {each["name"]: each["template"] for each in templates}
        return by_name.get(_DEFAULT_NAME)
    return templates if isinstance(templates, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token", "unk_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            found[name] = token
    return found


def _refuse(message: str) -> NoReturn:
    raise InputError(f"messages do not fit the model's chat template: {message}")


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
