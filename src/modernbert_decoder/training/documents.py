"""Documents from local files or a `datasets` name, streamed, in an order that a seed decides.

A place in the stream is a small value of plain numbers and texts: from it, reading goes on without reading
what came before. Knows nothing of tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from modernbert_decoder.errors import InputError
from modernbert_decoder.training.errors import TrainingError
from modernbert_decoder.training.recipe import DataRecipe
from modernbert_decoder.training.shard_readers import open_file

Document = str | list[int]
"""A text, or its token ids."""

# A block of documents that is read ahead holds no more text than this, however many documents were asked for.
_MAX_BLOCK_BYTES: Final = 1 << 27


class ShardReader(Protocol):
    """Reads one file, or one shard of a data set, from some position on."""

    def read(self) -> Document | None:
        """The next document that is not empty; None at the end."""

    def position(self) -> Any:
        """Where the next document begins, as JSON can hold it."""

    def close(self) -> None:
        """No more will be read."""


class Source(Protocol):
    """Numbered shards of documents."""

    num_shards: int
    identity: str
    """Changes when the data does."""

    def open(self, shard: int, position: Any) -> ShardReader:
        """A reader of a shard from a position on; None: from its beginning."""


@dataclass(frozen=True)
class Place:
    """Where the next document is: epoch, number of the shard within the epoch's order, position in it."""

    epoch: int = 0
    shard: int = 0
    position: Any = None


class LocalFiles:
    """Files as shards, in the order of their names."""

    def __init__(self, recipe: DataRecipe) -> None:
        """Finds the files.

        Raises:
            InputError: a pattern matches nothing, or everything is excluded.
        """
        self._recipe = recipe
        self.files = matching_files(recipe.files, exclude=recipe.exclude)
        self.num_shards = len(self.files)
        sizes = [(file.name, file.stat().st_size) for file in self.files]
        self.identity = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]

    def open(self, shard: int, position: Any) -> ShardReader:
        """See `Source`."""
        return open_file(self.files[shard], self._recipe, position)


class StreamedDataset:
    """A data set of the library `datasets`, streamed shard by shard."""

    def __init__(self, recipe: DataRecipe) -> None:
        """Asks the library for the data set.

        Raises:
            InputError: it cannot be found or read.
        """
        assert recipe.dataset is not None
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise InputError(
                'data.dataset needs the library datasets: `pip install "modernbert-decoder[train]"`'
            ) from error
        try:
            self._dataset = load_dataset(
                recipe.dataset, recipe.dataset_config, split=recipe.split, streaming=True
            )
        except Exception as error:  # the library raises its own, the Hub's and the file systems' kinds
            raise InputError(f"data.dataset {recipe.dataset!r} cannot be read: {error}") from error
        self._recipe = recipe
        self.num_shards = int(self._dataset.num_shards)
        parts = [recipe.dataset, recipe.dataset_config, recipe.split, self.num_shards]
        self.identity = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def open(self, shard: int, position: Any) -> ShardReader:
        """See `Source`."""
        dataset = self._dataset.shard(num_shards=self.num_shards, index=shard)
        return _DatasetReader(dataset, self._recipe, position)


class _DatasetReader:
    def __init__(self, dataset: Any, recipe: DataRecipe, position: Any) -> None:
        self._dataset = dataset
        self._key = recipe.text_key if recipe.ids_key is None else recipe.ids_key
        self._name = f"data.dataset {recipe.dataset!r}"
        if position is not None:
            dataset.load_state_dict(position)
        self._rows = iter(dataset)

    def read(self) -> Document | None:
        for row in self._rows:
            document = checked_document(row, self._key, where=self._name)
            if document is not None:
                return document
        return None

    def position(self) -> Any:
        return self._dataset.state_dict()

    def close(self) -> None:
        self._rows = iter(())


def checked_document(row: Mapping[str, Any], key: str, *, where: str) -> Document | None:
    """The document in a row; None if it is empty.

    Raises:
        InputError: the row has no such key, or something else stands there.
    """
    if key not in row:
        raise InputError(f"{where}: no {key!r} among {', '.join(map(str, row))}; set data.text_key")
    value = row[key]
    if isinstance(value, str):
        return value if value.strip() else None
    if value is None:
        return None
    if isinstance(value, list | np.ndarray) and all(isinstance(i, int | np.integer) for i in value):
        return [int(i) for i in value] or None
    raise InputError(
        f"{where}: {key!r} holds {type(value).__name__} instead of a text or a list of token ids"
    )


def open_source(recipe: DataRecipe) -> LocalFiles | StreamedDataset:
    """The documents that a data section names.

    Raises:
        InputError: it names none, or they cannot be found.
    """
    if recipe.dataset is not None:
        return StreamedDataset(recipe)
    if not recipe.files:
        raise InputError(
            "the recipe names no data; add --data FILES, or state data.files or data.dataset in it"
        )
    return LocalFiles(recipe)


class DocumentStream:
    """Documents without end: every epoch reads all shards, in an order of its own."""

    def __init__(self, source: Source, *, seed: int, place: Place | None = None) -> None:
        """Continues at a place; None: begins."""
        self._source = source
        self._seed = seed
        self._place = Place() if place is None else place
        self._reader: ShardReader | None = None

    @property
    def place(self) -> Place:
        """Where the next document is."""
        if self._reader is None:
            return self._place
        return Place(self._place.epoch, self._place.shard, self._reader.position())

    @property
    def epoch(self) -> int:
        """The number of the epoch that is being read."""
        return self._place.epoch

    def read_block(self, num_documents: int) -> list[Document]:
        """The next documents, no more than so many, at least one, all of one epoch.

        Raises:
            TrainingError: a whole epoch without a document.
        """
        documents: list[Document] = []
        num_bytes = num_ends = 0
        while len(documents) < num_documents and num_bytes < _MAX_BLOCK_BYTES:
            document = self._read()
            if document is not None:
                documents.append(document)
                num_bytes += len(document) * (1 if isinstance(document, str) else 4)
                continue
            if documents:
                break
            num_ends += 1
            if num_ends > 1:
                raise TrainingError("the data holds no document that is not empty; check data.files")
        return documents

    def close(self) -> None:
        """Closes the file that is being read."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _read(self) -> Document | None:
        """The next document; None, once, at the end of an epoch."""
        while True:
            if self._reader is None:
                if self._place.shard == self._source.num_shards:
                    self._place = Place(self._place.epoch + 1)
                    return None
                order = np.random.default_rng([self._seed, self._place.epoch]).permutation(
                    self._source.num_shards
                )
                shard = int(order[self._place.shard])
                self._reader = self._source.open(shard, self._place.position)
            document = self._reader.read()
            if document is not None:
                return document
            self.close()
            self._place = Place(self._place.epoch, self._place.shard + 1)


def matching_files(patterns: Sequence[str], *, exclude: Sequence[str] = ()) -> list[Path]:
    """The files that match, sorted, without those whose path or name matches a pattern to exclude.

    Raises:
        InputError: a pattern of either kind matches nothing, or nothing is left.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = _glob(pattern)
        if not matches:
            raise InputError(
                f"no file matches {pattern!r} in {Path.cwd()}; correct it, or give an absolute path"
            )
        found.update(matches)
    unused = set(exclude)
    kept = []
    for file in sorted(found):
        reasons = {pattern for pattern in exclude if file.match(pattern)}
        unused -= reasons
        if not reasons:
            kept.append(file)
    if unused:
        raise InputError(
            f"these patterns to exclude match no file: {', '.join(sorted(unused))}; correct them"
        )
    if not kept:
        raise InputError(f"all {len(found)} files are excluded; correct data.exclude")
    return kept


def _glob(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
    if path.is_file():
        return [path]
    anchor = Path(path.anchor) if path.is_absolute() else Path()
    relative = path.relative_to(path.anchor) if path.is_absolute() else path
    if not relative.parts:
        return []
    return [file for file in anchor.glob(str(relative)) if file.is_file()]
