"""Features of one video in one file, which may still be growing while it is read.

The file is a .npy of its final shape whose frames are appended. Until they are all
there it has another name and one writer; one that was interrupted is gone on with.
"""

import contextlib
import fcntl
import os
import pathlib
import weakref
from typing import BinaryIO

import numpy as np
from jaxtyping import Float16
from numpy.lib import format as npy

Shape = tuple[int, int, int]  # Frames, vision tokens of each, their width.
_DTYPE = np.dtype(np.float16)


class FeatureFile:
    """The first `frames` frames of a file of features, read as they are asked for.

    Nothing is mapped to memory, where the pages that were read would stay.
    """

    def __init__(self, place: pathlib.Path, frames: int | None = None):
        self._open(place, os.O_RDONLY)
        with open(self._file, "rb", closefd=False) as file:
            (F, V, E), self._start = _read_header(file)
        self.shape = (F if frames is None else frames, V, E)

    def _open(self, place: pathlib.Path, flags: int) -> None:
        self._file = os.open(place, flags, 0o644)
        self.close = weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, frames: slice) -> Float16[np.ndarray, "F V E"]:
        start, stop, _ = frames.indices(len(self))
        out = np.empty((max(0, stop - start), *self.shape[1:]), _DTYPE)
        at = self._start + start * self._frame_bytes
        left = out.reshape(-1).view(np.uint8)
        # A call reads 2 GiB at most.
        while left.size and (size := os.preadv(self._file, [left], at)):
            at, left = at + size, left[size:]
        if left.size:
            raise OSError(
                f"Frames {start} to {stop - 1} were asked for, but the file of features"
                f" ends {left.size} bytes before; encode the video again."
            )
        return out

    @property
    def _frame_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * _DTYPE.itemsize


class GrowingFile(FeatureFile):
    """A file of features to which frames are appended; at `place` when all are there.

    What an interrupted writer left counts as `present`, in whole clips of `clip`
    frames. A second writer at the same time raises `BlockingIOError`.
    """

    def __init__(self, place: pathlib.Path, shape: Shape, *, clip: int = 1):
        self.shape, self._place = shape, place
        self._part = place.with_suffix(".part")
        place.parent.mkdir(parents=True, exist_ok=True)
        self._lock()
        with open(self._file, "r+b", closefd=False) as file:
            self._start, size = _go_on(file, shape)
        whole = size // self._frame_bytes
        self.present = whole if whole == len(self) else whole // clip * clip
        if self.present == len(self):
            self._finish()

    def _lock(self) -> None:
        """Opens the file that is to grow, for this writer alone."""
        while True:
            self._open(self._part, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"{self._part} is being written by another process; wait, or end"
                    " it."
                ) from None
            # Another may have finished what was just opened, and taken it away.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), self._part.stat()):
                    return
            self.close()

    def append(self, features: Float16[np.ndarray, "F V E"]) -> None:
        """Writes the next frames; after the last one the file is whole."""
        end = self.present + len(features)
        if end > len(self) or features.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"Features {features.shape} do not go on a file of {self.shape} of"
                f" which {self.present} frames are there."
            )
        at = self._start + self.present * self._frame_bytes
        data = memoryview(np.ascontiguousarray(features)).cast("B")
        while data:  # A full disk writes a part, and is an error only then.
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written
        self.present = end
        if end == len(self):
            self._finish()

    def _finish(self) -> None:
        os.fsync(self._file)
        self._part.replace(self._place)


def _read_header(file: BinaryIO) -> tuple[Shape, int]:
    """The shape of the whole, and where its first frame begins."""
    if npy.read_magic(file) != (1, 0):
        raise ValueError(f"{file.name} is no file of features; delete it.")
    shape, *_ = npy.read_array_header_1_0(file)
    return shape, file.tell()


def _go_on(file: BinaryIO, shape: Shape) -> tuple[int, int]:
    """Where the first frame begins, and how many bytes of frames there are already."""
    size = os.fstat(file.fileno()).st_size
    try:
        known, start = _read_header(file)
    except ValueError:  # It was interrupted in its first bytes.
        known, start = None, 0
    if known == shape:
        return start, size - start
    file.seek(0)
    file.truncate()
    header = dict(descr=_DTYPE.str, fortran_order=False, shape=shape)
    npy.write_array_header_1_0(file, header)
    return file.tell(), 0
