"""Files that are there whole or not at all."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def new_file(place: pathlib.Path) -> Iterator[BinaryIO]:
    """A file that is at `place` once it is whole; one that fails leaves nothing."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
        part = pathlib.Path(file.name)
        try:
            yield file
            file.flush()
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)
