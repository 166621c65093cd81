"""The tokenizer against the tokenizers library and transformers, and the streaming detokenizer against the
full decode."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import BUNDLED_ARCHITECTURE
from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.checkpoint import BUNDLED_MODEL, find_checkpoint
from modernbert_decoder.errors import CheckpointError, InputError, ModelNotFoundError
from modernbert_decoder.tokenizer import Tokenizer

BUNDLED = find_checkpoint(BUNDLED_MODEL)
VOCAB_SIZE = BUNDLED_ARCHITECTURE.vocab_size
ODD_TEXTS = [
    "",
    " ",
    "\0",
    "a\0b\0",
    "Once upon a time, there was a  little   fox.\n\n\tIt slept .",
    "naïve café \u0301e e\u0301",
    "👩‍👩‍👧 🏳️‍🌈 emoji 🦊",
    "مرحبا بالعالم \u202e\u200f",
    "日本語のテキスト",
    "[CLS] text [SEP] that spells [MASK] tokens",
    "\ufeff\uffff\U0010ffff",
]


def architecture_of(folder: Path, **changes: Any) -> DecoderArchitecture:
    config = json.loads((BUNDLED / "config.json").read_text())
    if folder != BUNDLED:
        special = {"bos_token_id": 50281, "eos_token_id": 50282, "pad_token_id": 50283}
        config |= {"vocab_size": 50368, "cls_token_id": 50281, "sep_token_id": 50282, **special}
    return replace(DecoderArchitecture.from_config(config), **changes)


def library_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module", params=["bundled", "ettin"])
def folder(request: pytest.FixtureRequest) -> Path:
    if request.param == "bundled":
        return BUNDLED
    shared: Path = request.getfixturevalue("shared")
    return shared / "data" / "ettin-tokenizer"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder, architecture_of(folder))


@pytest.fixture(scope="module")
def library(folder: Path) -> tokenizers.Tokenizer:
    return library_tokenizer(folder)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with the bundled tokenizer, to be damaged."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, tmp_path)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- encoding ---------------------------------------------------------------------------------------------


def test_known_ids_of_the_released_tokenizer(shared: Path) -> None:
    folder = shared / "data" / "ettin-tokenizer"
    tokenizer = Tokenizer.from_folder(folder, architecture_of(folder))
    assert tokenizer.encode("Paris is the capital of") == [50281, 36062, 310, 253, 5347, 273]
    assert tokenizer.encode("Hello world") == [50281, 12092, 1533]
    assert tokenizer.encode("The") == [50281, 510]
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id) == (50281, 50282, 50283)
    assert tokenizer.vocab_size == 50368


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_prompt_is_cls_and_the_text_without_sep(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, text: str
) -> None:
    expected = library.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == [tokenizer.cls_token_id, *expected]


def test_a_batch_equals_single_texts(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(ODD_TEXTS) == [tokenizer.encode(text) for text in ODD_TEXTS]
    assert tokenizer.encode_batch(ODD_TEXTS[4:5]) == [tokenizer.encode(ODD_TEXTS[4])]
    assert tokenizer.encode_batch([]) == []


def test_lone_surrogates_are_read_as_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud800b\udfff") == tokenizer.encode("a\ufffdb\ufffd")
    assert tokenizer.encode("\ud83e\udd8a") == tokenizer.encode("🦊")
    assert tokenizer.encode_batch(["\udc00", "x"]) == [tokenizer.encode("\ufffd"), tokenizer.encode("x")]
    assert tokenizer.encode_template("\udc00", "\ud800") == tokenizer.encode_template("\ufffd", "\ufffd")


def test_a_megabyte_without_a_space_survives(tokenizer: Tokenizer) -> None:
    text = "storyteller" * 95_326
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize("pair", [None, "", "a second text"])
def test_the_template_equals_the_librarys(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, text: str, pair: str | None
) -> None:
    assert tokenizer.encode_template(text, pair) == library.encode(text, pair).ids


def test_the_template_equals_transformers_at_every_length(tokenizer: Tokenizer, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    short, long = (
        "A quick brown fox jumps.",
        "The lazy dogs sleep in the sun all day long, and then some more.",
    )
    for text, pair in [(short, None), (long, None), (short, long), (long, short), (long, long), ("", long)]:
        whole = reference(text, pair)["input_ids"]
        assert tokenizer.encode_template(text, pair) == whole
        for max_length in range(3 if pair else 2, len(whole) + 2):
            expected = reference(text, pair, truncation="longest_first", max_length=max_length)["input_ids"]
            assert tokenizer.encode_template(text, pair, max_length=max_length) == expected


@pytest.mark.parametrize("truncation", ["only_first", "only_second"])
def test_cutting_one_text_of_a_pair_equals_transformers_at_every_length(
    truncation: str, tokenizer: Tokenizer, folder: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    for text, pair in (
        ("A quick brown fox jumps.", "The dogs sleep."),
        ("The dogs.", "A quick brown fox jumps."),
    ):
        kept = pair if truncation == "only_first" else text
        shortest = len(tokenizer.encode(kept)) - 1 + 4  # beside the template and one token of the other
        for max_length in range(shortest, 20):
            options = {"max_length": max_length, "truncation": truncation}
            assert (
                tokenizer.encode_template(text, pair, **options)
                == reference(text, pair, **options)["input_ids"]
            )
        with pytest.raises(InputError, match=f"truncation is {truncation}, but the other text alone fills"):
            tokenizer.encode_template(text, pair, max_length=shortest - 1, truncation=truncation)


def test_an_unknown_truncation_or_a_missing_second_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="truncation must be longest_first, only_first or only_second"):
        tokenizer.encode_template("some words", max_length=2, truncation="middle")
    with pytest.raises(InputError, match="there is no second text"):
        tokenizer.encode_template("some words", max_length=2, truncation="only_second")


def test_truncation_keeps_the_templates_own_tokens(tokenizer: Tokenizer) -> None:
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert tokenizer.encode_template("some words", max_length=2) == [cls, sep]
    assert tokenizer.encode_template("some words", "and more", max_length=3) == [cls, sep, sep]
    with pytest.raises(InputError, match="max_length is 2, but the template alone needs 3"):
        tokenizer.encode_template("some words", "and more", max_length=2)


def test_a_missing_template_is_replaced_by_the_documented_one(copied: Path) -> None:
    whole = Tokenizer.from_folder(copied, architecture_of(BUNDLED))
    edit(copied / "tokenizer.json", post_processor=None)
    rebuilt = Tokenizer.from_folder(copied, architecture_of(BUNDLED))
    for pair in (None, "there"):
        assert rebuilt.encode_template("hello", pair) == whole.encode_template("hello", pair)


def test_truncation_and_padding_settings_of_the_file_are_ignored(copied: Path) -> None:
    whole = Tokenizer.from_folder(copied, architecture_of(BUNDLED))
    stored = library_tokenizer(copied)
    stored.enable_truncation(4)
    stored.enable_padding(length=64)
    stored.save(str(copied / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(copied, architecture_of(BUNDLED))
    text = "a text that is longer than four tokens"
    assert tokenizer.encode(text) == whole.encode(text)
    assert tokenizer.encode_batch([text, "b"]) == whole.encode_batch([text, "b"])
    assert tokenizer.encode_template(text) == whole.encode_template(text)


# --- decoding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_every_single_token_decodes_as_in_the_library(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, skip_special_tokens: bool
) -> None:
    singles = [[token_id] for token_id in range(tokenizer.vocab_size)]
    expected = library.decode_batch(singles, skip_special_tokens=skip_special_tokens)
    assert [tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) for ids in singles] == expected


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_decoding_returns_the_text_after_unicode_normalization(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, text: str
) -> None:
    normalizer = library.normalizer
    assert normalizer is not None
    ids = tokenizer.encode(text)
    if "[" not in text:
        assert tokenizer.decode(ids) == normalizer.normalize_str(text)
    assert tokenizer.decode(ids) == library.decode(ids)


def interesting_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids from everywhere, and many that hold only a part of a character or are special or added."""
    everything = range(tokenizer.vocab_size)
    partial = [i for i in everything if "\ufffd" in tokenizer.token_text(i)]
    added = [*everything[:5], *everything[-120:]]
    any_id = st.one_of(st.sampled_from(everything), st.sampled_from(partial), st.sampled_from(added))
    return st.lists(any_id, max_size=40)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_streamed_text_equals_the_full_decode_for_any_ids(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, skip_special_tokens: bool
) -> None:
    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(interesting_ids(tokenizer))
    def check(ids: list[int]) -> None:
        stream = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
        pieces = [stream.put(token_id) for token_id in ids]
        pieces.append(stream.finish())
        whole = library.decode(ids, skip_special_tokens=skip_special_tokens)
        assert tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) == whole
        assert "".join(pieces) == stream.text == whole

    check()


BYTE_PIECES = st.one_of(
    st.binary(max_size=8),
    st.text(max_size=4).map(str.encode),
    st.sampled_from(
        [b"\xf0\x9f\xa6", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xe0\x80", b"\xff", b"\xc3"]
    ),
)


def test_streamed_bytes_that_are_not_utf8_are_replaced_as_in_the_library(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer
) -> None:
    id_of = {
        tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1
    }
    missing = [byte for byte in range(256) if bytes([byte]) not in id_of]

    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(st.lists(BYTE_PIECES, max_size=8).map(b"".join))
    def check(data: bytes) -> None:
        ids = [id_of[bytes([byte])] for byte in data if byte not in missing]
        stream = tokenizer.detokenizer()
        text = "".join(map(stream.put, ids)) + stream.finish()
        assert text == library.decode(ids) == tokenizer.decode(ids)

    check()


def test_streaming_never_emits_half_a_character(tokenizer: Tokenizer) -> None:
    text = "A fox 🦊, 日本語 and ألف."
    stream = tokenizer.detokenizer()
    emitted = ""
    for token_id in tokenizer.encode(text):
        emitted += stream.put(token_id)
        assert text.startswith(emitted)
        assert stream.text == emitted
    assert stream.finish() == ""
    assert emitted == text


def test_a_stream_that_ends_within_a_character_is_flushed(tokenizer: Tokenizer) -> None:
    id_of = {
        tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1
    }
    stream = tokenizer.detokenizer()
    assert [stream.put(id_of[bytes([byte])]) for byte in "🦊".encode()[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd" == stream.text


def test_special_tokens_are_skipped_or_spelled(tokenizer: Tokenizer) -> None:
    assert tokenizer.sep_token_id is not None
    ids = [*tokenizer.encode("hi"), tokenizer.sep_token_id]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "[CLS]hi[SEP]"
    assert tokenizer.token_text(tokenizer.cls_token_id) == "[CLS]"


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 10**12])
def test_ids_beyond_the_vocabulary_are_refused(token_id: int) -> None:
    tokenizer = Tokenizer.from_folder(BUNDLED, architecture_of(BUNDLED))
    for call in (lambda: tokenizer.decode([5, token_id]), lambda: tokenizer.detokenizer().put(token_id)):
        with pytest.raises(InputError, match=f"token id {token_id} is not between 0 and {VOCAB_SIZE - 1}"):
            call()


def test_rows_of_the_embedding_without_a_token_decode_to_nothing() -> None:
    tokenizer = Tokenizer.from_folder(BUNDLED, architecture_of(BUNDLED, vocab_size=VOCAB_SIZE + 64))
    assert tokenizer.decode([VOCAB_SIZE + 4, *tokenizer.encode("hi"), VOCAB_SIZE + 63]) == "hi"


# --- files that do not fit --------------------------------------------------------------------------------


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"holds no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path, architecture_of(BUNDLED))


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "\ud800"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer\.json"):
        Tokenizer.from_folder(tmp_path, architecture_of(BUNDLED))


def test_a_vocabulary_larger_than_the_embedding_is_refused() -> None:
    rows = VOCAB_SIZE - 96
    with pytest.raises(
        CheckpointError, match=rf"has 96 tokens beyond the embedding's {rows} rows.* id {rows}"
    ):
        Tokenizer.from_folder(BUNDLED, architecture_of(BUNDLED, vocab_size=rows))


def test_an_id_beyond_the_embedding_is_found_behind_a_hole(copied: Path) -> None:
    content = json.loads((copied / "tokenizer.json").read_text())
    behind = VOCAB_SIZE + 900
    content["model"]["vocab"]["never merged"] = behind
    (copied / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"has 1 tokens beyond .*'never merged' with id {behind}"):
        Tokenizer.from_folder(copied, architecture_of(BUNDLED, vocab_size=VOCAB_SIZE + 100))
    Tokenizer.from_folder(copied, architecture_of(BUNDLED, vocab_size=behind + 1))


@pytest.mark.parametrize(("name", "own"), [("cls_token_id", 1), ("sep_token_id", 2)])
def test_special_ids_that_disagree_are_refused(name: str, own: int) -> None:
    with pytest.raises(
        CheckpointError, match=rf"config\.json says {name} is 4 \('\[MASK\]'\).* with id {own}"
    ):
        Tokenizer.from_folder(BUNDLED, architecture_of(BUNDLED, **{name: 4}))


def test_special_tokens_may_be_spelled_as_objects_or_left_to_the_configuration(copied: Path) -> None:
    edit(copied / "tokenizer_config.json", cls_token={"content": "[CLS]", "lstrip": False})
    assert Tokenizer.from_folder(copied, architecture_of(BUNDLED)).cls_token_id == 1
    (copied / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_folder(copied, architecture_of(BUNDLED))
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    nameless = architecture_of(BUNDLED, cls_token_id=None, bos_token_id=None)
    with pytest.raises(CheckpointError, match="names the token that starts every text"):
        Tokenizer.from_folder(copied, nameless)


def test_a_special_token_that_does_not_exist_is_refused(copied: Path) -> None:
    edit(copied / "tokenizer_config.json", cls_token="<s>")
    with pytest.raises(CheckpointError, match=r"cls_token is '<s>', which is not a token"):
        Tokenizer.from_folder(copied, architecture_of(BUNDLED))


def test_a_tokenizer_that_is_not_byte_level_is_refused(copied: Path) -> None:
    edit(copied / "tokenizer.json", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(CheckpointError, match="the decoder is WordPiece, but only byte-level"):
        Tokenizer.from_folder(copied, architecture_of(BUNDLED))


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"model_max_length": %b}' % (b"1" * 5000), b"\xff\xfe", b"{", b""]
)
def test_a_damaged_tokenizer_config_is_named(copied: Path, content: bytes) -> None:
    (copied / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer_config\.json: .*Download or copy"):
        Tokenizer.from_folder(copied, architecture_of(BUNDLED))
