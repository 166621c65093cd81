"""What becomes of a finished run: files of the package within their bound, and the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks import bundled_model
from benchmarks.quality import Perplexity

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.checkpoint import BUNDLED_MODEL, find_checkpoint


def write_model(folder: Path, *, num_bytes: int = 10) -> Path:
    folder.mkdir()
    for name in (*bundled_model.FILES, "optimizer.pt"):
        (folder / name).write_bytes(b"x" * num_bytes)
    return folder


def test_only_what_the_package_needs_is_copied(tmp_path: Path) -> None:
    model, asset = write_model(tmp_path / "model"), tmp_path / "asset"
    asset.mkdir()
    (asset / "README.md").write_text("by hand")
    assert bundled_model.install(model, asset) == 10 * len(bundled_model.FILES)
    assert {path.name for path in asset.iterdir()} == {*bundled_model.FILES, "README.md"}
    assert (asset / "README.md").read_text() == "by hand"


def test_a_model_that_is_too_large_or_not_whole_is_not_copied(tmp_path: Path) -> None:
    asset = tmp_path / "asset"
    asset.mkdir()
    large = write_model(tmp_path / "large", num_bytes=bundled_model.MOST_BYTES // 5 + 1)
    with pytest.raises(ValueError, match=r"more than the 8,000,000 of the package"):
        bundled_model.install(large, asset)
    unfinished = write_model(tmp_path / "unfinished")
    (unfinished / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        bundled_model.install(unfinished, asset)
    assert not list(asset.iterdir())


def test_the_bundled_model_is_within_the_bound() -> None:
    folder = find_checkpoint(BUNDLED_MODEL)
    num_bytes = sum((folder / name).stat().st_size for name in bundled_model.FILES)
    assert 0 < num_bytes <= bundled_model.MOST_BYTES


def test_the_page_states_every_format_and_shows_every_sample() -> None:
    qualities = [Perplexity("float32", 30.5, 1.25, 1234, 0.0), Perplexity("int8", 30.6, None, 1234, 0.0033)]
    samples = [bundled_model.Sample("Once", " upon\na time"), bundled_model.Sample("Then", " he ran")]
    text = bundled_model.page(
        DecoderArchitecture.from_folder(find_checkpoint(BUNDLED_MODEL)),
        num_bytes=7_900_000,
        qualities=qualities,
        samples=samples,
    )
    assert "| float32 | 30.500 | 1.2500 | +0.00% |" in text
    assert "| int8 | 30.600 |  | +0.33% |" in text
    assert "> **Once** upon a time ..." in text
    assert "> **Then** he ran ..." in text
    assert "7.90 MB" in text
