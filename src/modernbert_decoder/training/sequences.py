"""Documents to sequences of tokens for training, packed or not, and the cursor that says where they stand.

Documents are read in blocks; each is shuffled, tokenized, cut into sequences, and these are shuffled again.
Everything is decided by the seed, the number of the block and the place where it begins, so that the cursor
is small and resuming reads one block anew. Knows nothing of batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.training.documents import Document, DocumentStream, Place, Source
from modernbert_decoder.training.errors import TrainingError

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class TokenSequence:
    """One sequence.

    Attributes:
        ids: (T,).
        starts: where in it a document, or the rest of one, begins; the first is 0.
    """

    ids: Ids
    starts: tuple[int, ...]

    def position_ids(self) -> NDArray[np.int64]:
        """(T,), beginning anew with each document.

        >>> TokenSequence(np.array([1, 7, 2, 1, 8], np.int32), (0, 3)).position_ids().tolist()
        [0, 1, 2, 0, 1]
        """
        lengths = np.diff([*self.starts, len(self.ids)])
        begins: NDArray[np.int64] = np.repeat(np.array(self.starts, np.int64), lengths)
        return np.arange(len(self.ids), dtype=np.int64) - begins

    def targets(self, *, ignored: int = -100) -> NDArray[np.int64]:
        """(T,), the token that follows each; `ignored` where another document, or nothing, follows.

        >>> TokenSequence(np.array([1, 7, 2, 1, 8], np.int32), (0, 3)).targets().tolist()
        [7, 2, -100, 8, -100]
        """
        targets = np.full(len(self.ids), ignored, np.int64)
        targets[:-1] = self.ids[1:]
        targets[np.array(self.starts[1:], np.int64) - 1] = ignored
        return targets

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted."""
        return len(self.ids) - len(self.starts)


@dataclass(frozen=True, kw_only=True)
class SequenceSettings:
    """How documents become sequences; see `DataRecipe`."""

    length: int
    is_packed: bool
    restart_with_cls: bool
    shuffle_documents: int
    seed: int
    cls_token_id: int


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a stream of sequences stands.

    Attributes:
        place: of the first document of the current block.
        block: its number.
        taken: sequences of it that have been handed out.
        pending_ids: tokens that the blocks before left for it.
        pending_starts: their documents' beginnings.
        identity: of the data.
    """

    place: Place
    block: int
    taken: int
    pending_ids: tuple[int, ...]
    pending_starts: tuple[int, ...]
    identity: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Cursor:
        """The inverse of `to_dict`, also of what has gone through JSON."""
        return cls(
            place=Place(**stored["place"]),
            block=stored["block"],
            taken=stored["taken"],
            pending_ids=tuple(stored["pending_ids"]),
            pending_starts=tuple(stored["pending_starts"]),
            identity=stored["identity"],
        )


class Encoder(Protocol):
    """Documents to ids, [CLS] in front and [SEP] behind."""

    def __call__(self, documents: Sequence[Document], /) -> list[Ids]:
        """One array per document."""


class SequenceStream:
    """Sequences without end."""

    def __init__(
        self, source: Source, encode: Encoder, settings: SequenceSettings, *, cursor: Cursor | None = None
    ) -> None:
        """Continues at a cursor; None: begins.

        Raises:
            TrainingError: the cursor is of other data.
        """
        self._source = source
        self._encode = encode
        self._settings = settings
        if cursor is not None and cursor.identity != source.identity:
            raise TrainingError(
                "the files of the data have changed since the checkpoint was written (names or sizes), so it "
                "cannot go on where it stopped; bring them back, or start a new run"
            )
        self._documents = DocumentStream(source, seed=settings.seed, place=cursor.place if cursor else None)
        self._block = cursor.block if cursor else 0
        self._pending: tuple[tuple[int, ...], tuple[int, ...]] = (
            (cursor.pending_ids, cursor.pending_starts) if cursor else ((), ())
        )
        self._taken = 0
        self._sequences: list[TokenSequence] = []
        self._next_pending: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._begun = False  # whether the block of that number has been read
        self._place = self._documents.place
        if cursor is not None and cursor.taken:
            self._read_block()
            self._taken = cursor.taken

    def take(self, count: int) -> list[TokenSequence]:
        """The next sequences."""
        taken: list[TokenSequence] = []
        while len(taken) < count:
            if not self._begun:
                self._read_block()
            chunk = self._sequences[self._taken : self._taken + count - len(taken)]
            taken += chunk
            self._taken += len(chunk)
            if self._taken == len(self._sequences):
                self._end_block()
        return taken

    def cursor(self) -> Cursor:
        """Where the next sequence is."""
        ids, starts = self._pending
        return Cursor(
            place=self._place,
            block=self._block,
            taken=self._taken,
            pending_ids=ids,
            pending_starts=starts,
            identity=self._source.identity,
        )

    def cursor_of_next_block(self) -> Cursor:
        """Where sequences of another length may begin: a block that has been begun counts as read."""
        is_begun = self._taken > 0
        return Cursor(
            place=self._documents.place if is_begun else self._place,
            block=self._block + is_begun,
            taken=0,
            pending_ids=(),
            pending_starts=(),
            identity=self._source.identity,
        )

    def close(self) -> None:
        """Closes the file that is being read."""
        self._documents.close()

    def _read_block(self) -> None:
        settings = self._settings
        self._place = self._documents.place
        documents = self._documents.read_block(settings.shuffle_documents)
        random = np.random.default_rng([settings.seed, 1, self._block])
        order = random.permutation(len(documents))
        encoded = self._encode([documents[i] for i in order])
        if settings.is_packed:
            packer = _Packer(settings, *self._pending)
            sequences = list(packer.pack(encoded))
            self._next_pending = packer.rest()
        else:
            sequences = [piece for ids in encoded for piece in _pieces(ids, settings)]
        self._sequences = [sequences[i] for i in random.permutation(len(sequences))]
        self._begun, self._taken = True, 0

    def _end_block(self) -> None:
        self._block += 1
        self._pending, self._next_pending = self._next_pending, ((), ())
        self._sequences, self._begun, self._taken = [], False, 0
        self._place = self._documents.place


class _Packer:
    """Cuts documents, one after another, into full sequences."""

    def __init__(self, settings: SequenceSettings, ids: Iterable[int], starts: Iterable[int]) -> None:
        self._length = settings.length
        self._cls = settings.cls_token_id if settings.restart_with_cls else None
        self._ids = np.array(list(ids), np.int32)
        self._parts: list[Ids] = [self._ids] if len(self._ids) else []
        self._starts = list(starts)
        self._size = len(self._ids)

    def pack(self, documents: Iterable[Ids]) -> Iterator[TokenSequence]:
        for document in documents:
            begin = 0
            while begin < len(document):
                self._starts.append(self._size)
                if begin > 0 and self._cls is not None:
                    self._append(np.array([self._cls], np.int32))
                room = self._length - self._size
                self._append(document[begin : begin + room])
                begin += room
                if self._size == self._length:
                    yield TokenSequence(np.concatenate(self._parts), tuple(self._starts))
                    self._parts, self._starts, self._size = [], [], 0

    def rest(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens of the last sequence, which is not full."""
        ids = np.concatenate(self._parts).tolist() if self._parts else []
        return tuple(ids), tuple(self._starts)

    def _append(self, ids: Ids) -> None:
        self._parts.append(ids)
        self._size += len(ids)


def _pieces(ids: Ids, settings: SequenceSettings) -> Iterator[TokenSequence]:
    """A document cut into sequences of its own."""
    yield TokenSequence(ids[: settings.length], (0,))
    is_restarted = settings.restart_with_cls
    room = settings.length - is_restarted
    front = np.array([settings.cls_token_id] if is_restarted else [], np.int32)
    for begin in range(settings.length, len(ids), room):
        yield TokenSequence(np.concatenate((front, ids[begin : begin + room])), (0,))
