"""Structured output: completions that follow a JSON schema, a regular expression, a choice or a grammar.

`StructuredOutput` is what a caller asks for; `Constraints` compiles it for one model's tokens with the
package llguidance, which is imported only then; a `Matcher` follows one completion. Nothing here knows
requests, sampling or the network.

Legend: V vocabulary.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modernbert_decoder.engine.kv_cache import Float32
from modernbert_decoder.errors import InputError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from modernbert_decoder.tokenizer import Tokenizer


_KINDS: Final = ("json", "regex", "choice", "grammar")
# Compiled constraints that are kept, since clients send the same one again and again.
_MAX_KEPT: Final = 64
# Characters of what is wrong with a constraint, and of a value that is none: both may quote a long one.
_MAX_REASON: Final = 300


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """What a completion must look like from its first character to its last; exactly one of these.

    A completion that `max_tokens` or a stop string ends early is the beginning of such a text.

    Attributes:
        json: a JSON schema, as a mapping or as JSON text (stored as text); `{}` allows any value. White space
            between the parts of a value is not generated, unless the schema says
            `"x-guidance": {"whitespace_flexible": true}`.
        regex: a regular expression in the syntax of Rust's regex crate, for the whole text.
        choice: texts, one of which it must be (stored as a tuple).
        grammar: a context-free grammar in llguidance's dialect of Lark.

    Raises:
        InputError: none or several of them, or one of the wrong type.

    >>> StructuredOutput(choice=["yes", "no"]).choice
    ('yes', 'no')
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                f"structured output needs exactly one of {', '.join(_KINDS)}, "
                f"got {' and '.join(given) or 'none'}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise InputError(
                    f"{name} of structured output must be text that is not empty, got {_shown(value)}"
                )

    @property
    def kind(self) -> str:
        """Which of the four it is."""
        return next(name for name in _KINDS if getattr(self, name) is not None)


def _schema_text(schema: Any) -> str:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InputError(f"json of structured output is not JSON: {error}") from None
    if not isinstance(schema, Mapping):
        raise InputError(
            "json of structured output must be a JSON schema, which is an object, "
            f"got {type(schema).__name__}"
        )
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"json of structured output cannot be written as JSON: {error}") from None


def _choices(choices: Any) -> tuple[str, ...]:
    is_list = isinstance(choices, Sequence) and not isinstance(choices, str | bytes)
    if not is_list or not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise InputError(
            f"choice of structured output must be a list of texts, none of them empty, got {_shown(choices)}"
        )
    return tuple(dict.fromkeys(choices))


def _shown(value: object) -> str:
    """A value in a message, the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "..."


class Matcher:
    """Follows one completion and says which tokens may come next.

    Args:
        matcher: of llguidance.
        eos_token_ids: tokens that end a text, the one that llguidance knows first.
        vocab_size: V.
    """

    __slots__ = ("__weakref__", "_bits", "_eos_token_ids", "_matcher", "_vocab_size")

    def __init__(self, matcher: LLMatcher, *, eos_token_ids: Sequence[int], vocab_size: int) -> None:
        self._matcher = matcher
        self._eos_token_ids = list(eos_token_ids)
        self._vocab_size = vocab_size
        self._bits = np.zeros((1, (vocab_size + 31) // 32), np.int32)

    def copy(self) -> Matcher:
        """A matcher at the same place that goes its own way."""
        return Matcher(
            self._matcher.deep_copy(), eos_token_ids=self._eos_token_ids, vocab_size=self._vocab_size
        )

    def restrict(self, row: Float32) -> None:
        """Sets the logits (V,) of all tokens that may not come next to minus infinity.

        Tokens that end the text are left only where the text is complete.

        Raises:
            InputError: the constraint has become too complex to follow.
        """
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits)
        self._require_sound()
        allowed = np.unpackbits(self._bits.view(np.uint8)[0], count=self._vocab_size, bitorder="little")
        allowed[self._eos_token_ids] = allowed[self._eos_token_ids[0]]
        np.copyto(row, -np.inf, where=allowed == 0)

    def accept(self, token_id: int) -> None:
        """Moves on by a token that was chosen.

        Raises:
            InputError: as `restrict`.
        """
        if token_id not in self._eos_token_ids:
            self._matcher.consume_token(token_id)
            self._require_sound()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            reason = _reason(self._matcher.get_error())
            raise InputError(
                f"the structured output asked for cannot be followed further ({reason}); simplify it"
            )


class Constraints:
    """Compiles structured outputs for one model; any thread may ask.

    Args:
        tokenizer: of the model.
        vocab_size: V, the rows of its embedding.
        eos_token_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._lock = threading.Lock()
        self._tokens_lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._kept: OrderedDict[StructuredOutput, Matcher] = OrderedDict()
        # Those that somebody holds are found as well.
        self._held: weakref.WeakValueDictionary[StructuredOutput, Matcher] = weakref.WeakValueDictionary()

    def compiled(self, structured: StructuredOutput) -> Matcher:
        """What `matcher` copies; as long as the caller holds it, nobody compiles it again.

        Raises:
            InputError: the constraint cannot be compiled, or llguidance is not installed.
        """
        with self._lock:
            matcher = self._held.get(structured)
        if matcher is None:  # compiled outside of the lock: a slow one holds nobody else up
            matcher = self._compile(structured)
        with self._lock:
            matcher = self._held.setdefault(structured, matcher)  # another thread may have been quicker
            self._kept[structured] = matcher
            self._kept.move_to_end(structured)
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        return matcher

    def matcher(self, structured: StructuredOutput) -> Matcher:
        """A matcher at the beginning of a completion.

        Raises:
            InputError: as `compiled`.
        """
        return self.compiled(structured).copy()

    def _compile(self, structured: StructuredOutput) -> Matcher:
        try:
            from llguidance import LLMatcher
        except ModuleNotFoundError:
            raise InputError(
                "structured output needs the package llguidance; install it with "
                "`pip install 'modernbert-decoder[serve]'`"
            ) from None
        if not self._eos_token_ids:
            raise InputError("structured output needs a model with an end-of-text token; this one names none")
        with self._tokens_lock:
            if self._tokens is None:
                self._tokens = _ll_tokenizer(self._tokenizer, self._vocab_size, self._eos_token_ids[0])
        try:
            matcher = LLMatcher(self._tokens, _grammar(structured), log_level=0)
        except ValueError as error:
            raise _unusable(structured, str(error)) from None
        if matcher.is_error():
            raise _unusable(structured, matcher.get_error())
        return Matcher(matcher, eos_token_ids=self._eos_token_ids, vocab_size=self._vocab_size)


def _unusable(structured: StructuredOutput, error: str) -> InputError:
    return InputError(f"{structured.kind} of structured output cannot be used: {_reason(error)}")


def _reason(error: str) -> str:
    """What llguidance says is wrong, without the grammar and the parser's state that it shows behind that."""
    first, *others = error.partition("<grammar>")[0].splitlines() or [""]
    reason = first.strip() if len(first) <= _MAX_REASON else first[:_MAX_REASON] + "..."
    # Of a regular expression, what is wrong stands behind it.
    return " ".join([reason, *(line[:_MAX_REASON] for line in others if line.startswith("error: "))])


def _grammar(structured: StructuredOutput) -> str:
    """The constraint in llguidance's own notation."""
    from llguidance import LLMatcher

    if structured.json is not None:
        assert isinstance(structured.json, str)
        # No white space between the parts of a value: a small model may never stop writing it.
        return LLMatcher.grammar_from_json_schema(structured.json, {"whitespace_flexible": False})
    if structured.regex is not None:
        return LLMatcher.grammar_from_regex(structured.regex)
    if structured.choice is not None:
        # Lark writes texts as JSON does.
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, structured.choice)))
    assert structured.grammar is not None
    return LLMatcher.grammar_from_lark(structured.grammar)


class _Vocabulary:
    """A tokenizer as llguidance wants to see it.

    Attributes:
        tokens: the bytes of each id; none for ids that never may be chosen.
        special_token_ids: tokens that are no text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.cls_token_id
        self.special_token_ids = sorted(tokenizer.special_token_ids)
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]

    def __call__(self, text: str) -> list[int]:
        """The ids of a text that the constraint leaves no choice about."""
        return self._tokenizer.encode_plain(text)


def _ll_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, eos_token_id)), n_vocab=vocab_size)
