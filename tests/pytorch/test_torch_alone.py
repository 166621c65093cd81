"""The classes work with what the extra `torch` installs, and nothing else.

The packages of this environment that the extra does not ask for are hidden: a folder of links to the others
takes the place of site-packages.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from torch_models import ours

import modernbert_decoder

USE = """
import sys
from importlib.util import find_spec
assert not [name for name in ("accelerate", "peft", "datasets", "fastapi") if find_spec(name)]
import torch
from modernbert_decoder.pytorch import ModernBertDecoderForCausalLM, register_auto_classes
from transformers import AutoModelForCausalLM
register_auto_classes()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model) is ModernBertDecoderForCausalLM
ids = torch.arange(8)[None]
print(model(ids, labels=ids).loss.item(), model.generate(ids, max_new_tokens=4, do_sample=False).shape[1])
model.save_pretrained(sys.argv[2])
"""


def distributions(name: str, *extras: str) -> set[str]:
    """The names of a distribution, with extras, and of all that they require."""
    found: set[str] = set()
    waiting = [(name, extra) for extra in ("", *extras)]
    seen = set(waiting)
    while waiting:
        each, extra = waiting.pop()
        found.add(each)
        for text in metadata.requires(each) or ():
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            new = {(requirement.name, wanted) for wanted in ("", *requirement.extras)} - seen
            seen |= new
            waiting += new
    return found


def link_modules(names: set[str], folder: Path) -> None:
    """Links to the modules, libraries and metadata of these distributions."""
    for name in names:
        files = metadata.files(name) or ()
        for top in {file.parts[0] for file in files} - {"..", "__pycache__", "bin"}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(metadata.distribution(name).locate_file(top))))


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_the_classes_need_no_more_than_the_extra_torch(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    link_modules(distributions("modernbert-decoder", "torch"), folder)
    package = folder / "modernbert_decoder"  # an editable installation has no files of its own
    if not package.exists():
        package.symlink_to(Path(modernbert_decoder.__file__).parent)
    ours("ForCausalLM").save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-S", "-c", USE, str(tmp_path / "model"), str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONNOUSERSITE": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loss, length = done.stdout.split()
    assert float(loss) > 0
    assert 8 < int(length) <= 12
    assert (tmp_path / "saved" / "model.safetensors").is_file()
