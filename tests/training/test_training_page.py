"""docs/training.md: the table of what to expect follows from the cost formulas."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from modernbert_decoder.architecture import released_architecture
from modernbert_decoder.costs import RELEASED_SIZES
from modernbert_decoder.training.trainer import training_flops_per_token

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
ROUND_TOKENS = 16_384
H100_FLOPS = 0.4 * 990e12
CPU_FLOPS = 0.4 * 100e9


def cells(size: str) -> list[float]:
    """The numbers of a size's row in the table of what to expect."""
    _, _, section = PAGE.read_text(encoding="utf-8").partition("### What to expect")
    (row,) = re.findall(rf"^\| {size} \| (.+) \|$", section.partition("\n## ")[0], flags=re.MULTILINE)
    return [float(cell.removesuffix(" GB").replace(",", "")) for cell in row.split(" | ")]


@pytest.mark.parametrize("size", RELEASED_SIZES)
def test_the_table_of_what_to_expect_follows_from_the_cost_formulas(size: str) -> None:
    a = released_architecture(size)
    flops = training_flops_per_token(a, 1024)
    per_layer = 26 * a.hidden_size + 16 * a.intermediate_size
    memory, activations, gigaflops, gpu, cpu = cells(size)
    assert memory == pytest.approx(16 * a.num_parameters() / 1e9, abs=0.006)
    assert activations == pytest.approx(ROUND_TOKENS * a.num_hidden_layers * per_layer / 1e9, abs=0.06)
    assert gigaflops == pytest.approx(flops / 1e9, abs=0.006)
    assert gpu == pytest.approx(H100_FLOPS / flops, rel=1e-5)
    assert cpu == pytest.approx(CPU_FLOPS / flops, abs=0.6)
