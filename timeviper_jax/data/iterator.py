"""Batches that know which samples they are made of."""

from typing import Any, Generic, TypeVar

import grain

Batch = TypeVar("Batch")


class NamedBatches(grain.DatasetIterator[Batch], Generic[Batch]):
    """The batches of a parent that gives (batch, ids of its samples).

    `samples` are those of the batch given last, of this host alone; `skipped` counts
    those that others took the place of. `get_state` and
    `set_state` (JSON) continue it exactly. Close it when done: it may read ahead in
    threads.
    """

    def __init__(self, parent: grain.DatasetIterator[tuple[Batch, tuple[str, ...]]]):
        super().__init__(parent)
        self.samples: tuple[str, ...] = ()
        self.skipped = 0

    def __next__(self) -> Batch:
        batch, self.samples = next(self._parent)
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])

    def close(self) -> None:
        super().close()
        self._parents = ()  # Freed now: at exit it would print errors of its own.
