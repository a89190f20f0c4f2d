"""A file of JSON lines that survives any kill, and is the same as without one.

Its first line says by what settings the rest was made; others' lines are never mixed
in. A line is there once it is on disk to its end: what was torn off is cut away.
"""

import contextlib
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class Lines:
    """The lines of `path`; nothing is written before the first `append`."""

    def __init__(self, path: str | os.PathLike, *, settings: Mapping[str, Any]):
        self.path = pathlib.Path(path)
        self._settings = json.loads(json.dumps(settings))
        self._lock = threading.Lock()

    def read(self) -> list[Any]:
        """All whole lines, in order.

        Raises:
          ValueError: They were made by other settings; it names what differs.
        """
        if not self.path.exists():
            return []
        lines = [json.loads(line) for line in self._whole().splitlines()]
        if not lines:
            return []
        settings, *rest = lines
        if settings != self._settings:
            raise ValueError(self._other(settings))
        return rest

    def append(self, values: Sequence[Any]) -> None:
        """Adds lines; they are on disk when it returns."""
        with self._lock, self._open() as file:
            new = [self._settings] if file.tell() == 0 else []
            text = "".join(
                json.dumps(value, ensure_ascii=False) + "\n"
                for value in [*new, *values]
            )
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        """The file at the end of its last whole line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        with self.path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    end = len(self._whole())
            file.truncate(end)
            file.seek(end)
            yield file

    def _whole(self) -> bytes:
        content = self.path.read_bytes()
        return content[: content.rfind(b"\n") + 1]

    def _other(self, settings: Any) -> str:
        mine, theirs = self._settings, settings if isinstance(settings, dict) else {}
        differ = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
        said = ", ".join(f"{k}={theirs.get(k)!r} (now {mine.get(k)!r})" for k in differ)
        return f"{self.path} was made by other settings: {said}; name another --out."
