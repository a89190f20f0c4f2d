"""Encoded frames on disk, so that a frozen encoder sees each moment only once.

A video's features are those of its seconds: frame k is the one on screen at k + 0.5 s.
Those of other moments are kept beside them, each choice of moments in a file of its
own. Files are known by their content, encoders by a fingerprint, so that neither a
moved file nor a retrained encoder ever yields another's features.
"""

import functools
import hashlib
import os
import pathlib

import numpy as np
from jaxtyping import Float16, Float64

from timeviper_jax.data.feature_file import FeatureFile, GrowingFile
from timeviper_jax.data.video import Number, VideoError, probe
from timeviper_jax.data.whole_file import new_file

_OPEN_FILES = 1024
_REFUSED = ".refused"  # Ends the name of a note, which stands in the features' place.
_LARGE_FILE = 1 << 26  # Bytes; a tenth of a second to read.


def second_times(duration: Number) -> Float64[np.ndarray, "F"]:
    """The moments of a video whose frames a `FeatureStore` holds."""
    return np.minimum(np.arange(max(1, round(duration))) + 0.5, duration)


class FeatureStore:
    """A folder of features by one encoder; `fingerprint` names it and its weights."""

    def __init__(self, root: str | os.PathLike, fingerprint: str):
        name = hashlib.blake2b(fingerprint.encode(), digest_size=8).hexdigest()
        self._root, self._fingerprint = pathlib.Path(root) / name, fingerprint
        self._load = functools.lru_cache(_OPEN_FILES)(_map)

    def __contains__(self, path: str | os.PathLike) -> bool:
        return self._place(path).exists()

    def lacks(self, path: str | os.PathLike) -> bool:
        """Whether a file's features are to be made: neither kept nor refused so far."""
        try:
            place = self._place(path)
        except VideoError:
            return False  # There is nothing to make them of.
        return not place.exists() and not place.with_suffix(_REFUSED).exists()

    def refuse(self, path: str | os.PathLike, error: VideoError) -> None:
        """Remembers why a file has no features, even if another try may succeed.

        A run that resumes then replaces the samples that it replaced before.
        """
        note = self._place(path).with_suffix(_REFUSED)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(error))

    def put(
        self, path: str | os.PathLike, features: Float16[np.ndarray, "F V E"]
    ) -> None:
        """Keeps the features of a file's seconds; seen whole or not at all."""
        with new_file(self._place(path)) as file:
            np.save(file, features)

    def get(self, path: str | os.PathLike) -> Float16[np.ndarray, "F V E"]:
        """The features of all of a file's seconds, read from disk as they are used.

        Raises `VideoError` for a file that was refused.
        """
        place = self._place(path)
        try:
            return self._load(place)
        except FileNotFoundError as error:
            if (note := place.with_suffix(_REFUSED)).exists():
                raise VideoError(
                    f"{path}: refused when it was to be encoded ({note.read_text()});"
                    f" remove {note} to try it again."
                ) from error
            raise LookupError(
                f"No features of {path} by {self._fingerprint!r} in {self._root};"
                " encode the videos of this manifest first."
            ) from error

    def at(
        self, path: str | os.PathLike, times: Float64[np.ndarray, "F"]
    ) -> Float16[np.ndarray, "F V E"]:
        """The features of the seconds in which `times` lie."""
        features = self.get(path)
        return np.asarray(features[np.minimum(times.astype(int), len(features) - 1)])

    def find(
        self, path: str | os.PathLike, times: Float64[np.ndarray, "F"]
    ) -> FeatureFile | None:
        """The features of exactly these moments, if they are kept."""
        seconds = second_times(probe(path).duration)[: len(times)]
        if path in self and np.array_equal(times, seconds):
            return FeatureFile(self._place(path), len(times))
        place = self._place_of(path, times)
        return FeatureFile(place) if place.exists() else None

    def grow(
        self,
        path: str | os.PathLike,
        times: Float64[np.ndarray, "F"],
        *,
        tokens: int,
        width: int,
        clip: int = 1,
    ) -> GrowingFile:
        """A file for the features of these moments, or what there is of it already.

        Args:
          path: The video.
          times: In seconds, ascending.
          tokens: Vision tokens of a frame.
          width: Channels of a token.
          clip: Frames that the encoder sees together.
        """
        place = self._place_of(path, times)
        return GrowingFile(place, (len(times), tokens, width), clip=clip)

    def _place(self, path: str | os.PathLike) -> pathlib.Path:
        digest = self._digest(path)
        return pathlib.Path(self._root, digest[:2], f"{digest}.npy")

    def _place_of(
        self, path: str | os.PathLike, times: Float64[np.ndarray, "F"]
    ) -> pathlib.Path:
        place = self._place(path)
        if np.array_equal(times, second_times(probe(path).duration)):
            return place
        moments = hashlib.blake2b(times.tobytes(), digest_size=8).hexdigest()
        return place.with_stem(f"{place.stem}-{moments}")

    def _digest(self, path: str | os.PathLike) -> str:
        """`file_digest`; of a large file that did not change it is remembered."""
        if not os.path.isfile(path) or os.path.getsize(path) < _LARGE_FILE:
            return file_digest(path)
        version = repr(_version(os.path.abspath(path))).encode()
        name = hashlib.blake2b(version, digest_size=20).hexdigest()
        note = self._root.with_name("digests") / name
        if not note.exists():
            with new_file(note) as file:
                file.write(file_digest(path).encode())
        return note.read_text()


def _map(place: pathlib.Path) -> np.ndarray:
    return np.load(place, mmap_mode="r")


def file_digest(path: str | os.PathLike) -> str:
    """A name for the content of a file, or of the files of a folder."""
    if os.path.isdir(path):
        return _digest(tuple(sorted(map(_version, _files(path)))))
    if not os.path.isfile(path):  # A pipe may never end.
        raise VideoError(f"{path}: no such file, or no plain one; check the path.")
    return _digest((_version(path),))


def _files(folder: str | os.PathLike) -> list[str]:
    return [entry.path for entry in os.scandir(folder) if entry.is_file()]


def _version(path: str | os.PathLike) -> tuple[str, int, int]:
    """A file's name, size and time of change: one that changed is read again."""
    stat = os.stat(path)
    return str(path), stat.st_size, stat.st_mtime_ns


@functools.lru_cache(1 << 16)
def _digest(versions: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for name, _, _ in versions:
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
