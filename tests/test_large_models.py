"""Sessions with more weights than one protobuf file holds. They take gigabytes and minutes: run them with

MBD_TEST_LARGE=1 python -m pytest tests/test_large_models.py
"""

from __future__ import annotations

import json
import os

import pytest

from modernbert_decoder.cli import bench, main

pytestmark = pytest.mark.skipif(
    not os.environ.get("MBD_TEST_LARGE"), reason="takes gigabytes of memory; MBD_TEST_LARGE=1 runs it"
)


@pytest.mark.parametrize(
    ("size", "dtype", "least_bytes"),
    [("400m", "int4", 0.2e9), ("1b", "int8", 1.04e9), ("1b", "float32", 4.1e9)],
)
def test_large_models_open_and_decode(
    size: str,
    dtype: str,
    least_bytes: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`mbd bench`, with few tokens: that it works is the question, and not how fast."""
    monkeypatch.setattr(bench, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(bench, "DECODE_TOKENS", 4)
    assert main(["bench", "--size", size, "--dtype", dtype, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["measurements"]
    assert {row["sequences"] for row in rows} == {1, 8}
    for row in rows:
        assert row["decode_bytes_per_second"] * row["step_milliseconds"] / 1e3 > least_bytes
