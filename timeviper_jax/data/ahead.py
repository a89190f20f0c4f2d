"""Making things ahead of their use, in a thread of its own, but never many of them."""

import collections
import contextlib
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Iterator[T], Generic[T]):
    """What `items` yields, at most `most` of it made before it is taken.

    with Ahead(decoded, most=2) as blocks:
        for block in blocks: ...

    An error in the thread is raised by the next call, before anything that is still
    waiting. To leave the `with` early ends the thread, and closes `items` there.
    """

    def __init__(self, items: Generator[T, None, None], *, most: int):
        if most < 1:
            raise ValueError(f"{most=} ahead leaves nothing to take; allow at least 1.")
        self._most = most
        self._waiting: collections.deque[T] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._making: Future[None] = self._thread.submit(self._make, items)
        self._making.add_done_callback(self._wake)

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._making.done())
            if self._making.done() and (error := self._making.exception()):
                raise error
            if not self._waiting:
                raise StopIteration
            self._changed.notify_all()
            return self._waiting.popleft()

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.shutdown()
        self._waiting.clear()

    def _make(self, items: Generator[T, None, None]) -> None:
        with contextlib.closing(items):
            while self._room():
                try:
                    item = next(items)
                except StopIteration:
                    return
                with self._changed:
                    self._waiting.append(item)
                    self._changed.notify_all()

    def _room(self) -> bool:
        """Waits until one more may be made; false when none is wanted any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or len(self._waiting) < self._most
            )
            return not self._closed

    def _wake(self, _: Future[None]) -> None:
        with self._changed:
            self._changed.notify_all()
