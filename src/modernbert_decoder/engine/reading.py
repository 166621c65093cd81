"""Texts that are only read: any number of them, in batches of like length, results in the order of the texts.

A job says which positions of a text it wants logits or states of and what to make of them; the reader takes
texts ahead (boundedly), sorts them by length, feeds them in batches within a token budget, long ones piece by
piece, and restores the order. Reading needs no slots: it shares with running requests only the turn to
compute. This module knows nothing of tokenizers, labels or scores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import chain, repeat
from typing import Any, Final, Protocol, TypeVar

import numpy as np

from modernbert_decoder.engine.calls import Piece, SelectiveCall
from modernbert_decoder.engine.driver import Driver
from modernbert_decoder.engine.kv_cache import Float32, Layers
from modernbert_decoder.engine.lanes import Lanes, is_balanced
from modernbert_decoder.engine.outputs import TextError
from modernbert_decoder.engine.piece_reader import PieceReader
from modernbert_decoder.engine.reading_cache import ReadingCache
from modernbert_decoder.engine.runtime import Runtime

Given = TypeVar("Given")
Given_contra = TypeVar("Given_contra", contravariant=True)
Prepared = TypeVar("Prepared", bound="Item")
AnyPassage = TypeVar("AnyPassage", bound="Passage")
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)

# A window of texts is read ahead and sorted: about this many batches of them.
_BATCHES_AHEAD: Final = 16
# Most tokens of a batch, unless the caller knows better.
_MAX_BATCH_TOKENS: Final = 512
# Models that suit lanes are read in batches smaller by this, also where there are none: what a text is read
# with, and so the last bits of its answer, depend on the texts alone.
_LANES_SHARES: Final = 2
# And in windows, behind the first, so many times as large: at the end of each, lanes are idle.
_LANES_WINDOWS: Final = 4
# Fewer tokens than so many batches have are read by all threads together.
_LEAST_LANE_BATCHES: Final = 8
# Tokens, padding included, that lanes read in one turn: others wait for so many.
_TURN_TOKENS: Final = 16384
_BYTES_PER_TOKEN: Final = 4
# Most new tokens of one text in one call: attention over a piece costs its square, in sliding layers too.
_PIECE_TOKENS: Final = 256
# Where several long texts share a call, their pieces may be as short as this.
_SHARED_PIECE_TOKENS: Final = 128
# A cache holds at least so many positions: four texts of 2,048 tokens then share calls, in such pieces. They
# take memory when they are written.
_LEAST_POSITIONS: Final = 8192
# A batch is cut where padding would exceed this share of its tokens and what a call of its own costs.
_MAX_PADDING: Final = 0.1
_CALL_TOKENS: Final = 24
# Tokens of the shortest texts that fill a batch: shorter ones would need more rings than that.
_TOKENS_PER_RING: Final = 8
# Logits of one call: larger ones leave every cache of the processor before they are looked at.
_LOGIT_BYTES: Final = 26 << 20
# An idle cache is kept for the next job unless it has grown beyond this many positions.
_KEPT_POSITIONS: Final = 4096


class Passage:
    """Tokens to feed, and which positions are wanted of them.

    Attributes:
        wanted: first position wanted, and the one behind the last.
        rows: what came of those positions, as the job stores it.
    """

    __slots__ = ("_begin", "_end", "_lead", "_source", "num_tokens", "rows", "wanted")

    def __init__(
        self,
        source: Sequence[int],
        *,
        wanted: tuple[int, int],
        part: tuple[int, int] | None = None,
        lead: Sequence[int] = (),
    ) -> None:
        """`lead` and then `source`, or its `part` from one place to another, which is not copied here."""
        self._source = source
        self._lead = lead
        self._begin, self._end = (0, len(source)) if part is None else part
        self.num_tokens = len(lead) + self._end - self._begin
        self.wanted = wanted
        self.rows: Any = None

    @property
    def passages(self) -> Sequence[Passage]:
        """Itself: most items are one passage."""
        return (self,)

    @property
    def ids(self) -> Sequence[int]:
        """The tokens."""
        if not self._lead and self._end - self._begin == len(self._source):
            return self._source
        return [*self._lead, *self._source[self._begin : self._end]]

    def span(self, start: int, width: int) -> tuple[int, int]:
        """The wanted positions among `width` from `start` on: the first, and the one behind the last."""
        first, end = self.wanted
        return max(first, start), min(end, start + width)


class Run:
    """One job's calls of the network, with keys and values of its own.

    Attributes:
        cache: of the passages that are fed from their first token.
    """

    def __init__(
        self,
        reader: Reader,
        cache: ReadingCache,
        *,
        wants_logits: bool,
        read: Callable[[Piece, Float32 | None], tuple[Float32, Float32]],
    ) -> None:
        self.cache = cache
        self.max_batch_tokens = reader.max_batch_tokens
        self._max_wanted = reader.max_logit_rows if wants_logits else reader.max_batch_tokens
        self._reader = reader
        self._read = read
        self._wants_logits = wants_logits
        self._logits: Float32 | None = None
        self._branches: ReadingCache | None = None

    def read(
        self,
        passages: Sequence[Passage],
        accept: Callable[[Passage, int, Float32], None],
        *,
        layers: Layers | None = None,
        num_past: Sequence[int] | None = None,
        keeps: bool = False,
    ) -> Layers:
        """Feeds passages together, the longest first in their order, and hands on what is wanted.

        Args:
            passages: no more than fit one batch.
            accept: is given a passage, a position and the logits or states (n, V or C) from there on; they
                are overwritten later.
            layers: keys and values of earlier tokens, for passages that continue such.
            num_past: how many of those there are for each passage.
            keeps: whether something is to be read behind them.

        Returns:
            The keys and values, if it keeps them, until the next call that is not given them.
        """
        longest = passages[0].num_tokens
        if layers is None:
            layers = self.cache.layers(len(passages), longest)
        past = np.zeros(len(passages), np.int64) if num_past is None else np.array(num_past)
        token_ids = [passage.ids for passage in passages]
        start, num_active = 0, len(passages)
        kept: dict[tuple[int, int], SelectiveCall] = {}
        while start < longest:
            while passages[num_active - 1].num_tokens <= start:
                num_active -= 1
            width = self._width(passages[:num_active], start)
            fed = [ids[start : start + width] for ids in token_ids[:num_active]]
            cut = [(keys[:num_active], values[:num_active]) for keys, values in layers]
            is_last = not keeps and start + width >= longest
            piece = Piece(cut, fed, past[:num_active] + start, is_last=is_last, kept=kept)
            self._feed(piece, passages, start, width, accept)
            start += width
        return layers

    def branches(self) -> ReadingCache:
        """A second cache, for passages that continue those in the first."""
        if self._branches is None:
            self._branches = self._reader.new_cache()
        return self._branches

    def _width(self, passages: Sequence[Passage], start: int) -> int:
        """How many tokens of each to feed next: within the budget of tokens and that of logits."""
        width = min(
            passages[0].num_tokens - start, max(1, self.max_batch_tokens // len(passages)), _PIECE_TOKENS
        )
        while width > 1:
            spans = (passage.span(start, width) for passage in passages)
            num_wanted = sum(end - first for first, end in spans if first < end)
            if num_wanted <= self._max_wanted:
                break
            width = max(1, min(width - 1, width * self._max_wanted // num_wanted))
        return width

    def _feed(
        self,
        piece: Piece,
        passages: Sequence[Passage],
        start: int,
        width: int,
        accept: Callable[[Passage, int, Float32], None],
    ) -> None:
        spans: list[tuple[Passage, int, int]] = []
        positions: list[int] = []
        for i in range(len(piece.token_ids)):
            passage = passages[i]
            first, end = passage.span(start, width)
            if first < end:
                spans.append((passage, first, end - first))
                positions.extend(range(i * width + first - start, i * width + end - start))
        if self._wants_logits:
            piece.logit_positions = positions
        else:
            piece.state_positions = positions
        logits, states = self._read(piece, self._logits_for(len(positions)))
        rows = logits if self._wants_logits else states
        offset = 0
        for passage, first, count in spans:
            accept(passage, first, rows[offset : offset + count])
            offset += count

    def _logits_for(self, count: int) -> Float32 | None:
        """Memory for logits, one for all calls: that of a vocabulary takes longer to get than to fill."""
        if not self._wants_logits:
            return None
        if self._logits is None or len(self._logits) < count:
            self._logits = self._reader.runtime.empty_logits(count)
        return self._logits[:count]


class Item(Protocol):
    """What a job keeps of one text."""

    @property
    def passages(self) -> Sequence[Passage]:
        """What is to be fed for it."""


class Job(Protocol[Given_contra, Prepared, Result_co]):
    """What the reader asks of a job.

    Attributes:
        wants_logits: logits of the wanted positions, or else states.
    """

    wants_logits: bool

    def prepare(self, texts: Sequence[Given_contra]) -> Sequence[Prepared | TextError]:
        """An item for every text, or what is wrong with it."""

    def process(self, passages: Sequence[Passage], run: Run) -> None:
        """Reads one batch."""

    def finish(self, items: Sequence[Prepared]) -> Sequence[Result_co]:
        """The results of items whose passages are all read."""


class Reader:
    """Runs jobs, each with a cache of its own, on one runtime.

    Args:
        runtime: whose `read` is called, or whose lanes are.
        driver: whose turns are waited for.
        max_batch_tokens: most tokens per call, padding included; None leaves it to the model.
        context_length: most tokens of a passage.

    Attributes:
        max_batch_tokens: most tokens per call.
    """

    def __init__(
        self, runtime: Runtime, driver: Driver, *, max_batch_tokens: int | None, context_length: int
    ) -> None:
        self.runtime = runtime
        self.context_length = context_length
        self._shares = _LANES_SHARES if runtime.suits_lanes else 1
        self.max_batch_tokens = max_batch_tokens or _MAX_BATCH_TOKENS // self._shares
        self._window_tokens = _BATCHES_AHEAD * self._shares * self.max_batch_tokens
        self.max_logit_rows = max(1, _LOGIT_BYTES // (4 * runtime.logit_width))
        self._driver = driver
        self._idle: list[ReadingCache] = []
        # The garbage collector may end a forgotten job in a thread that holds it.
        self._idle_lock = threading.RLock()
        self._is_closed = False

    def read(self, texts: Iterable[Given], job: Job[Given, Prepared, Result]) -> Iterator[Result | TextError]:
        """The results, in the order of the texts; takes no more texts ahead than a window of batches."""
        later = self._window_tokens * (_LANES_WINDOWS if self.runtime.suits_lanes else 1)
        with ExitStack() as stack:
            cache = stack.enter_context(self.cache())
            run = Run(self, cache, wants_logits=job.wants_logits, read=self._read_in_turn)
            lanes = _ReadingLanes(self, self._driver, job, stack)
            for window in _windows(texts, sizes=chain([self._window_tokens], repeat(later))):
                yield from self._read_window(window, job, run, lanes)

    def _read_window(
        self,
        texts: Sequence[Given],
        job: Job[Given, Prepared, Result],
        run: Run,
        lanes: _ReadingLanes,
    ) -> Iterator[Result | TextError]:
        prepared = job.prepare(texts)
        items = [entry for entry in prepared if not isinstance(entry, TextError)]
        passages = (passage for item in items for passage in item.passages)
        found = batches(passages, run.cache, max_batch_tokens=self.max_batch_tokens)
        for batch in lanes.read(found):
            job.process(batch, run)
        results = iter(job.finish(items))
        for entry in prepared:
            yield entry if isinstance(entry, TextError) else next(results)

    def _read_in_turn(self, piece: Piece, logits: Float32 | None) -> tuple[Float32, Float32]:
        return self._driver.compute(partial(self.runtime.read, piece, logits=logits))

    @contextmanager
    def cache(self) -> Iterator[ReadingCache]:
        """A cache for one job, or for one of its lanes; small ones are kept for the next."""
        with self._idle_lock:
            cache = self._idle.pop() if self._idle else None
        if cache is None:
            cache = self.new_cache()
        try:
            yield cache
        finally:
            if cache.peak_positions <= _KEPT_POSITIONS:
                with self._idle_lock:
                    if not self._is_closed and len(self._idle) < self._most_idle:
                        self._idle.append(cache)

    @property
    def _most_idle(self) -> int:
        return 1 if self.runtime.num_lanes == 1 else 1 + self.runtime.num_lanes

    def new_cache(self) -> ReadingCache:
        """Memory for one batch, taken as it is written."""
        return ReadingCache(
            self.runtime.architecture,
            num_positions=max(self.context_length, self.max_batch_tokens, _LEAST_POSITIONS // self._shares),
            max_rows=max(1, self.max_batch_tokens // _TOKENS_PER_RING),
        )

    def close(self) -> None:
        """Gives idle memory back; that of jobs that are open goes with them."""
        with self._idle_lock:
            self._is_closed = True
            self._idle.clear()


class _ReadingLanes:
    """A job's batches side by side; its memory is that of one for each lane.

    Args:
        reader: whose runtime has lanes, or has not.
        driver: whose turns are waited for.
        job: that processes the batches.
        stack: of what ends with the job.
    """

    def __init__(self, reader: Reader, driver: Driver, job: Job[Any, Any, Any], stack: ExitStack) -> None:
        self._reader = reader
        self._driver = driver
        self._job = job
        self._stack = stack
        self._lanes: Lanes[Sequence[Passage]] | None = None

    def read(self, found: Iterable[list[AnyPassage]]) -> Iterable[list[AnyPassage]]:
        """Reads a window's batches, if there are lanes and enough for all of them; returns what is left."""
        num_lanes = self._reader.runtime.num_lanes
        if num_lanes == 1:
            return found
        waiting = list(found)
        is_worthwhile = sum(map(_num_padded, waiting)) >= _LEAST_LANE_BATCHES * self._reader.max_batch_tokens
        if not (is_worthwhile and is_balanced(map(_num_padded, waiting), num_lanes)):
            return waiting
        while waiting and not self._driver.is_carried:
            lanes = self._lanes or self._opened()
            count = num_tokens = 0
            while count < len(waiting) and (num_tokens < _TURN_TOKENS or count % num_lanes):
                num_tokens += _num_padded(waiting[count])
                count += 1
            self._driver.compute(partial(lanes.run, waiting[:count]))
            waiting = waiting[count:]
        return waiting

    def _opened(self) -> Lanes[Sequence[Passage]]:
        self._stack.callback(self._forget)
        readers = self._driver.compute(self._reader.runtime.lanes)
        runs = [
            Run(
                self._reader,
                self._stack.enter_context(self._reader.cache()),
                wants_logits=self._job.wants_logits,
                read=partial(self._read_piece, each),
            )
            for each in readers
        ]
        self._lanes = Lanes([partial(self._job.process, run=run) for run in runs])
        self._stack.enter_context(closing(self._lanes))
        return self._lanes

    def _forget(self) -> None:
        """Lets go of the caches, which hold this object by way of the lanes."""
        self._lanes = None

    def _read_piece(
        self, reader: PieceReader, piece: Piece, logits: Float32 | None
    ) -> tuple[Float32, Float32]:
        assert self._lanes is not None
        self._lanes.check()
        self._driver.check_open()
        return reader.read(piece, logits=logits)


def _num_padded(batch: Sequence[Passage]) -> int:
    """Tokens of a batch, the longest first, as if all were as long."""
    return len(batch) * batch[0].num_tokens


def batches(
    passages: Iterable[AnyPassage], cache: ReadingCache, *, max_batch_tokens: int, num_past: int = 0
) -> Iterator[list[AnyPassage]]:
    """Passages sorted by length, the longest first, cut where budget, cache or padding say so.

    Args:
        passages: to read.
        cache: that they are read into.
        max_batch_tokens: most tokens of a call, padding included.
        num_past: most tokens that the cache holds of any of them already.
    """
    batch: list[AnyPassage] = []
    num_tokens = 0
    for passage in sorted(passages, key=lambda passage: -passage.num_tokens):
        if batch:
            longest, count = batch[0].num_tokens, len(batch) + 1
            num_padded = longest * count
            fits = (
                min(longest, _SHARED_PIECE_TOKENS) * count <= max_batch_tokens
                and (num_past + longest) * count <= cache.num_positions
                and count <= cache.max_rows
            )
            pays = num_padded <= (1 + _MAX_PADDING) * (num_tokens + passage.num_tokens) + _CALL_TOKENS
            if not (fits and pays):
                yield batch
                batch, num_tokens = [], 0
        batch.append(passage)
        num_tokens += passage.num_tokens
    if batch:
        yield batch


def _windows(texts: Iterable[Given], *, sizes: Iterable[int]) -> Iterator[list[Given]]:
    """Texts in groups of about so many tokens, judged by their length; one at least.

    An exception of the iterable comes behind the texts that it gave before.
    """
    iterator = iter(texts)
    for size in sizes:
        room = size
        window: list[Given] = []
        failure: Exception | None = None
        try:
            while room > 0:
                text = next(iterator)
                window.append(text)
                room -= 2 + _num_bytes(text) // _BYTES_PER_TOKEN
        except StopIteration:
            if window:
                yield window
            return
        except Exception as error:
            failure = error
        if window:
            yield window
        if failure is not None:
            raise failure


def _num_bytes(text: object) -> int:
    """About how much there is to read; what is no text is small, too: it becomes an error."""
    if isinstance(text, str):
        return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    if isinstance(text, tuple | list):
        if len(text) == 2 and isinstance(text[1], tuple | list):  # each candidate is read behind the text
            return len(text[1]) * _num_bytes(text[0]) + _num_bytes(text[1])
        return sum(
            _BYTES_PER_TOKEN + _num_bytes(item) if isinstance(item, str) else _BYTES_PER_TOKEN
            for item in text
        )
    return _BYTES_PER_TOKEN * len(text) if hasattr(text, "__len__") else _BYTES_PER_TOKEN
