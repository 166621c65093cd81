"""A queue that is fair between clients: first come, first served within one, and clients take turns.

Whoever is first keeps the turn until it is taken: nobody overtakes. This module knows nothing of what waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What can stand in the queue.

    Attributes:
        client: whose it is.
    """

    client: str


Item = TypeVar("Item", bound=Waiting)


class FairQueue(Generic[Item]):
    """Items of several clients.

    A client that has had its turn goes behind all others that wait. One without items leaves, and comes back
    behind them: clients that were here once take no memory.

    >>> from types import SimpleNamespace
    >>> queue: FairQueue = FairQueue()
    >>> for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
    ...     queue.append(SimpleNamespace(client=name[0], name=name))
    >>> [queue.pop().name for _ in range(len(queue))]
    ['a1', 'b1', 'c1', 'a2', 'b2', 'a3']
    """

    def __init__(self) -> None:
        # The first client's turn it is; no deque is ever empty.
        self._items: dict[str, deque[Item]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        """All items, client by client."""
        for items in self._items.values():
            yield from items

    def __contains__(self, item: Item) -> bool:
        return item in self._items.get(item.client, ())

    @property
    def first(self) -> Item:
        """The one whose turn it is."""
        return next(iter(self._items.values()))[0]

    def append(self, item: Item) -> None:
        """Behind all of its client."""
        self._items.setdefault(item.client, deque()).append(item)
        self._count += 1

    def append_left(self, item: Item) -> None:
        """In front of all of its client, whose turn comes no sooner for it."""
        self._items.setdefault(item.client, deque()).appendleft(item)
        self._count += 1

    def pop(self) -> Item:
        """Takes the first, and passes the turn on."""
        client = next(iter(self._items))
        items = self._items.pop(client)
        if len(items) > 1:
            self._items[client] = items
        self._count -= 1
        return items.popleft()

    def remove(self, item: Item) -> None:
        """Takes one out, wherever it stands."""
        items = self._items[item.client]
        items.remove(item)
        if not items:
            del self._items[item.client]
        self._count -= 1

    def replace(self, item: Item, other: Item) -> None:
        """Puts another of the same client in its place."""
        assert item.client == other.client
        items = self._items[item.client]
        items[items.index(item)] = other

    def clear(self) -> None:
        """Takes all out."""
        self._items.clear()
        self._count = 0
