"""The benchmarks of prefix cache and speculation: pairs, prompts and tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serving import pairs, prefix, speculation  # noqa: E402
from benchmarks.serving.pairs import Pair, measure_pair  # noqa: E402
from benchmarks.summary import Spread  # noqa: E402


def test_pairs_alternate_drop_the_first_round_and_compare_within_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pairs, "is_quiet", lambda share: True)
    asked: list[tuple[str, int]] = []

    def first(number: int) -> float:
        asked.append(("first", number))
        return 1000.0 if number == 0 else 2.0 * number

    def second(number: int) -> float:
        asked.append(("second", number))
        return 1.0 * number

    pair = measure_pair(first, second, rounds=3)
    assert pair == Pair(Spread(4.0, 2.0, 6.0), Spread(2.0, 1.0, 3.0), Spread(0.5, 0.5, 0.5), 3)
    assert [name for name, _ in asked[:4]] == ["second", "first", "first", "second"]


def test_noisy_rounds_are_repeated_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "is_quiet", lambda share: False)
    numbers: list[int] = []
    measure_pair(lambda number: numbers.append(number) or 1.0, lambda _: 1.0, rounds=3)
    assert len(numbers) == 1 + 2 * 3


def test_tables_say_what_was_measured() -> None:
    pair = Pair(Spread(0.1, 0.1, 0.1), Spread(0.02, 0.02, 0.02), Spread(0.2, 0.1, 0.3), 3)
    row = prefix.PrefixRow("17m", "int8", 512, 64, pair, 0.89, 1 << 20)
    assert "| 17m int8 | 512 shared + 64 own | 89% | 100.0 | 20.0 | 0.200 (0.100 to 0.300) |" in prefix.table(
        [row]
    )
    rates = Pair(Spread(100.0, 90.0, 110.0), Spread(150.0, 140.0, 160.0), Spread(1.5, 1.4, 1.6), 3)
    drafted = speculation.SpeculationRow("lookup", "150m", "int8", rates, 256, 1000, 700)
    line = "| lookup | 150m int8 | 3 | 700 of 1,000 | 100 | 150 | 1.50 (1.40 to 1.60) |"
    assert line in speculation._table([drafted])


def test_prompts_share_their_first_tokens_and_no_others() -> None:
    prompts = [prefix._ids(512, 0) + prefix._ids(64, 1 + number) for number in range(3)]
    assert len({tuple(prompt[:512]) for prompt in prompts}) == 1
    assert len({tuple(prompt[512:]) for prompt in prompts}) == 3
