"""Stop strings: streaming in pieces equals cutting the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert_decoder.engine.stopping import StopChecker, StopMatch

LETTERS = st.text(alphabet="ab\n", max_size=30)


def cut(text: str, stops: list[str], *, include_stop: bool) -> tuple[str, StopMatch | None]:
    """Reads the text character by character; stops at the first end of a stop string, the longest such."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            start = end - len(stop)
            return text[: end if include_stop else start], StopMatch(stop, start)
    return text, None


def stream(pieces: list[str], checker: StopChecker) -> str:
    shown = "".join([checker.put(piece) for piece in pieces])
    return shown + checker.flush()


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="ab\n", max_size=5), max_size=12),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=4),
    include_stop=st.booleans(),
)
def test_streaming_in_pieces_equals_cutting_the_whole_text(
    pieces: list[str], stops: list[str], include_stop: bool
) -> None:
    checker = StopChecker(stops, include_stop=include_stop)
    assert (stream(pieces, checker), checker.match) == cut("".join(pieces), stops, include_stop=include_stop)


@settings(max_examples=200, deadline=None)
@given(text=LETTERS, stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_is_withheld_only_while_it_could_begin_a_stop_string(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    shown = ""
    for length, character in enumerate(text, 1):
        shown += checker.put(character)
        if checker.match is not None:
            return
        held = text[len(shown) : length]
        assert text[:length].startswith(shown)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_the_match_completed_first_wins_over_one_that_began_earlier() -> None:
    checker = StopChecker(["abcd", "bc"])
    assert checker.put("xabcd") == "xa"
    assert checker.match == StopMatch("bc", 2)


def test_of_matches_completed_together_the_longest_wins() -> None:
    checker = StopChecker(["c", "bc", "abc"])
    assert checker.put("xabc") == "x"
    assert checker.match == StopMatch("abc", 1)


@pytest.mark.parametrize(("include_stop", "shown"), [(False, "one"), (True, "one###")])
def test_text_behind_a_stop_string_is_dropped(include_stop: bool, shown: str) -> None:
    checker = StopChecker(["###"], include_stop=include_stop)
    assert checker.put("one#") + checker.put("##two") + checker.put("three") + checker.flush() == shown
    assert checker.match == StopMatch("###", 3)


def test_skipped_text_is_no_part_of_a_match() -> None:
    checker = StopChecker(["END"])
    assert checker.put("aE") == "a"
    assert checker.skip("N") == "EN"
    assert checker.put("D END") == "D "
    assert checker.match == StopMatch("END", 5)


def test_without_stop_strings_text_passes_at_once() -> None:
    checker = StopChecker([])
    assert checker.put("text") == "text"
    assert checker.flush() == ""
