"""Which files killed the workers that decoded them, so that a run resumes alike.

A death may depend on the moment: how busy the machine was, how much memory it had. So
each is kept with the draw that met it. A resumed run takes that draw as having failed
without trying again, and later draws leave the file alone: not at once, for draws are
made several at a time, in an order that is nobody's choice, but from so far on that all
that was under way has ended. What a draw becomes then follows from this list alone.
"""

import threading
from collections.abc import Iterable, Sequence

from timeviper_jax.data.media import VideoError

# Draws after a death that may be under way, or made, without knowing of it.
_UNDER_WAY = 1 << 12


class Quarantine:
    """Deaths by file, each as the draw's position and attempt; for any threads.

    The draws that are under way together are not more than `at_once` positions apart.
    """

    def __init__(self, *, at_once: int):
        if at_once > _UNDER_WAY:
            raise ValueError(
                f"Examples are prefetched over {at_once} draws, more than"
                f" {_UNDER_WAY}; lower prefetch_examples or lanes."
            )
        self._lock = threading.Lock()
        self._deaths: dict[str, set[tuple[int, int]]] = {}

    def add(self, path: str, position: int, attempt: int) -> None:
        """Remembers that the worker died of `path` in this draw."""
        with self._lock:
            self._deaths.setdefault(path, set()).add((position, attempt))

    def check(self, paths: Iterable[str], position: int, attempt: int) -> None:
        """Raises `VideoError` if this draw is not to open one of `paths`."""
        with self._lock:
            for path in paths:
                deaths = self._deaths.get(path, set())
                first = min(deaths, default=(position, 0))[0]
                if (position, attempt) in deaths or first < position - _UNDER_WAY:
                    raise VideoError(
                        f"{path}: in quarantine, since a worker died of it; see the"
                        " log of an earlier sample."
                    )

    def deaths(self) -> list[tuple[str, int, int]]:
        """All of them: path, position and attempt, in order."""
        with self._lock:
            return sorted(
                (path, *death) for path, some in self._deaths.items() for death in some
            )

    def restore(self, deaths: Sequence[Sequence[str | int]]) -> None:
        """Knows of these deaths, and of no others."""
        with self._lock:
            self._deaths.clear()
        for path, position, attempt in deaths:
            self.add(path, position, attempt)
