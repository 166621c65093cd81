"""Long texts, tokenized piece by piece, have the tokens of the whole, and take the memory of a piece."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from checkpoints import byte_tokenizer
from modernbert_decoder import text_pieces
from modernbert_decoder.checkpoint import BUNDLED_MODEL, find_checkpoint
from modernbert_decoder.text_pieces import PieceEncoder, last_border, pieces, without_surrogates

# What could join across a border: spaces of all kinds, contractions, marks that combine, special tokens.
ATOMS = [
    *("a", "Once", " upon", "don't", "'s", "'", "3", "14", ".", ",", "!?", "-", "\N{FOX FACE}"),
    *(" ", "  ", " " * 24, "\n", "\n\n", "\t", "\r\n", "\v", "\0", "\x1c", "\x85", "\xa0"),
    *("\u180e", "\u200b", "\u200d", "\u2028", "\u3000", "\ufeff", "\U000e0020"),
    *("\xe9", "e\u0301", "\u0301", "=\u0338", "\u212b", "\u0958", "\u1100", "\u1161", "\u11a8"),
    *("\u738b\u3002", "\u3002", "\uff0c", "\u304b", "\u3099", "\u30ab", "\u6f22", "\u3042\u308a"),
    *("\u0645\u0631", "\u202e", "\ud83e", "\udd8a", "\ud800"),
    *("[MASK]", "[CLS]", " [SEP]", "<|endoftext|>", "|||IP_ADDRESS|||", "[unused3]"),
]
texts = st.lists(st.sampled_from(ATOMS) | st.text(max_size=3), max_size=40).map("".join)


@pytest.fixture(scope="module", autouse=True)
def _tiny_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_pieces, "PIECE_CHARACTERS", 3)
        yield


@pytest.fixture(scope="module", params=["bundled", "ettin", "bytes"])
def library(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    if request.param == "bytes":
        return byte_tokenizer()
    if request.param == "bundled":
        folder = find_checkpoint(BUNDLED_MODEL)
    else:
        folder = request.getfixturevalue("shared") / "data" / "ettin-tokenizer"
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def whole_ids(library: tokenizers.Tokenizer, text: str) -> list[int]:
    ids: list[int] = library.encode(without_surrogates(text), add_special_tokens=False).ids
    return ids


# --- the same tokens ---


@settings(max_examples=400, deadline=None)
@given(text=texts, size=st.integers(1, 9))
def test_the_tokens_of_the_pieces_are_those_of_the_whole(
    library: tokenizers.Tokenizer, text: str, size: int
) -> None:
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    ids = [token_id for part in parts for token_id in whole_ids(library, part)]
    assert ids == whole_ids(library, text)


@settings(max_examples=100, deadline=None)
@given(batch=st.lists(texts, max_size=4), count=st.integers(0, 30), counts_all=st.booleans())
def test_long_and_short_texts_of_a_batch_keep_their_places(
    library: tokenizers.Tokenizer, batch: list[str], count: int, counts_all: bool
) -> None:
    encoder = PieceEncoder(library)
    expected = [whole_ids(library, text) for text in batch]
    assert encoder.ids(batch, lead=(7, 8)) == [[7, 8, *ids] for ids in expected]
    first = encoder.first_tokens(batch, count=count, counts_all=counts_all)
    assert [each.ids for each in first] == [ids[:count] for ids in expected]
    if counts_all:
        assert [each.num_tokens for each in first] == list(map(len, expected))
    assert [each.num_tokens > count for each in first] == [len(ids) > count for ids in expected]


@settings(max_examples=200, deadline=None)
@given(text=texts, continuations=st.lists(texts, min_size=1, max_size=3))
def test_a_text_and_its_continuations_have_the_tokens_of_the_wholes(
    library: tokenizers.Tokenizer, text: str, continuations: list[str]
) -> None:
    ids = PieceEncoder(library).continued(text, continuations, lead=(7,))
    assert [*ids.head, *ids.own] == [7, *whole_ids(library, text)]
    for tail, continuation in zip(ids.tails, continuations, strict=True):
        assert [*ids.head, *tail] == [7, *whole_ids(library, text + continuation)]


def test_a_real_book_is_cut_and_keeps_its_tokens(library: tokenizers.Tokenizer, shared: Path) -> None:
    text = (shared / "corpus" / "barrie-peter-pan.txt").read_text(encoding="utf-8")[:60_000]
    parts = list(pieces(text, 1000))
    assert max(map(len, parts)) < 1100
    ids = [token_id for part in parts for token_id in whole_ids(library, part)]
    assert ids == whole_ids(library, text)


def test_a_text_without_borders_is_one_piece() -> None:
    assert list(pieces("x" * 100, 10)) == ["x" * 100]
    assert list(pieces("", 10)) == [""]
    assert last_border("x" * 1000) == 0
    assert last_border("a b" + "x" * 1000) == 1


def test_japanese_and_chinese_are_cut_behind_their_full_stops() -> None:
    text = "\u738b\u306f\u5bdd\u305f\u3002" * 50
    assert max(map(len, pieces(text, 11))) == 15


def test_the_tail_that_is_tokenized_with_every_continuation_is_the_last_word() -> None:
    library = byte_tokenizer()
    ids = PieceEncoder(library).continued("word " * 500 + "last", ["a", "b"], lead=())
    assert len(ids.own) == len(" last")


# --- tokenizers whose words begin elsewhere ---


def with_token(**options: bool) -> tokenizers.Tokenizer:
    library = byte_tokenizer()
    library.add_tokens([AddedToken("king", **{"normalized": False, **options})])
    return library


def changed(**attributes: object) -> tokenizers.Tokenizer:
    library = byte_tokenizer()
    for name, value in attributes.items():
        setattr(library, name, value)
    return library


UNCUT = {
    "a token that takes the space behind it": with_token(rstrip=True),
    "a token that must be a word": with_token(single_word=True),
    "another regular expression": changed(
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(r"\w+\s*"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "no regular expression": changed(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ),
    "a space before every text": changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "spaces replaced": changed(normalizer=normalizers.Replace(" ", "_")),
}


@pytest.mark.parametrize("name", UNCUT)
def test_a_tokenizer_that_looks_across_borders_gets_whole_texts(name: str) -> None:
    library = UNCUT[name]
    text = "the king sat, the kings sat; a king "
    encoder = PieceEncoder(library)
    assert encoder.ids([text]) == [whole_ids(library, text)]
    assert encoder.first_tokens([text], count=5, counts_all=False)[0].ids == whole_ids(library, text)[:5]
    continued = encoder.continued(text, ["dom"], lead=())
    assert continued.head + continued.tails[0] == whole_ids(library, text + "dom")
    assert not continued.head, "it was cut"


def test_an_added_token_with_a_space_inside_is_not_cut() -> None:
    library = byte_tokenizer()
    library.add_tokens(["old king"])
    text = "the old king and the old king"
    assert PieceEncoder(library).ids([text]) == [whole_ids(library, text)]
    spaces = byte_tokenizer()
    spaces.add_tokens(["  ", " "])
    encoder = PieceEncoder(spaces)
    assert encoder.ids([text]) == [whole_ids(spaces, text)]
    assert encoder.continued(text, [""], lead=()).head, "tokens of spaces alone are no reason not to cut"


# --- memory ---

_PEAKS = """
import resource
from pathlib import Path
from modernbert_decoder.checkpoint import Checkpoint, find_checkpoint
from modernbert_decoder.engine.scoring import Scoring
from modernbert_decoder.tokenizer import Tokenizer

folder = find_checkpoint("storyteller")
architecture = Checkpoint.open(folder).architecture
tokenizer = Tokenizer.from_folder(folder, architecture)
text = "The old king sat by the fire, and told his daughters of the sea.\\n" * 64_000
unit = 1 if __import__("sys").platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
tokenizer.encode(text[:100_000])
peaks = [peak()]
assert len(tokenizer.encode_template(text, max_length=64)) == 64
peaks.append(peak())
(refused,) = tokenizer.encode_template_batch([text], max_length=64, truncation=None)
peaks.append(peak())
(scored,) = Scoring(tokenizer, vocab_size=architecture.vocab_size, context=1024, stride=512).prepare([text])
assert len(scored.ids) == refused.num_tokens - 1
peaks.append(peak())
print(refused.num_tokens, *(later - peaks[0] for later in peaks[1:]))
"""


def test_memory_for_a_huge_text_is_that_of_a_piece_and_of_its_ids() -> None:
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", _PEAKS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    num_tokens, cut, refused, scored = map(int, done.stdout.split())
    assert num_tokens > 1_000_000
    assert cut < 20e6
    assert refused < 60e6  # the library alone takes 500 MB for the whole
    assert scored < 60e6 + 90 * num_tokens
