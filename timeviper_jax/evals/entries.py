"""Questions as benchmarks publish them, out of the files that they publish.

A benchmark is read from a local folder; nothing is ever downloaded. What a reader
needs and does not find is a `DataError` of one line that names the folder, file, field
or video.
"""

import ast
import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from timeviper_jax.data import untrusted
from timeviper_jax.evals.spans import Event, Span

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".MP4")
_PARQUET = "; reading parquet needs pyarrow: pip install pyarrow."


class DataError(ValueError):
    """A benchmark's folder that cannot be read; says what is missing, and where."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One published question, before any frame of its video is chosen.

    `answer` is the letter of an option, a span "a to b", or what a caption should say.
    `groups` are what results are sorted by: ("task=counting", "duration=long").
    """

    id: str
    video: pathlib.Path
    text: str
    answer: str
    groups: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    window: Span | None = None  # Seconds of the file; None: all of it.
    duration: float | None = None  # As published, in seconds.
    frame_rate: float = 1.0  # Of a folder of frames; files know their own.
    subtitles: pathlib.Path | None = None
    subtitle_start: float = 0.0  # When, by the subtitles' clock, the video begins.
    span: Span | None = None  # For grounding: when it happens.
    events: tuple[Event, ...] = ()  # For dense captions: all that happens.
    facts: tuple[tuple[str, str], ...] = ()  # Questions and answers about a caption.


@dataclasses.dataclass(frozen=True)
class Row:
    """A record of a file, whose fields are asked for by name and kind."""

    values: Mapping[str, Any]
    where: str

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise DataError(
                f"{self.where} lacks {name!r}; it has {sorted(self.values)}."
            )
        return self.values[name]

    def text(self, name: str) -> str:
        value = self[name]
        if isinstance(value, (dict, list)):
            raise self._not(name, "a text")
        return str(value).strip()

    def number(self, name: str) -> float:
        try:
            value = float(self[name])
        except (TypeError, ValueError) as error:
            raise self._not(name, "a number") from error
        if not math.isfinite(value):  # What a table has where it has nothing.
            raise self._not(name, "a number")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; in a CSV file it is written as Python or JSON does."""
        value = self[name]
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value)
            except (SyntaxError, ValueError) as error:
                raise self._not(name, "a list of texts") from error
        if not isinstance(value, (list, tuple)):
            raise self._not(name, "a list of texts")
        return tuple(str(item).strip() for item in value)

    def span(self, name: str) -> Span:
        value = self[name]
        try:
            start, end = map(float, value)
        except (TypeError, ValueError) as error:
            raise self._not(name, "a start and an end") from error
        return start, end

    def rows(self, name: str) -> list["Row"]:
        """A list of records within this one."""
        value = self[name]
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise self._not(name, "a list of records")
        return [Row(v, f"{self.where}: {name} {i}") for i, v in enumerate(value)]

    def _not(self, name: str, kind: str) -> DataError:
        return DataError(
            f"{self.where}: {name}={self.values[name]!r:.60} is not {kind}."
        )


def one_of(folder: pathlib.Path, names: Sequence[str], what: str) -> pathlib.Path:
    """The first of these files (or patterns) that the folder has.

    `what` says what they are and where they are published.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it should hold {what}.")
    for name in names:
        if found := sorted(folder.glob(name)):
            return found[0]
    raise DataError(f"{folder} holds none of {', '.join(names)}; put {what} there.")


def read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: no JSON ({error}); copy it again.") from error


def read_rows(path: pathlib.Path) -> list[Row]:
    """The records of a .json list, or a .jsonl, .csv, .tsv or .parquet file."""
    readers = {
        ".json": read_json,
        ".jsonl": _read_jsonl,
        ".csv": lambda path: _read_csv(path, ","),
        ".tsv": lambda path: _read_csv(path, "\t"),
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise DataError(f"{path}: not one of {', '.join(readers)}; convert it.")
    values = readers[path.suffix](path)
    if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
        raise DataError(f"{path}: no list of records; it is not the published file.")
    return [Row(value, f"{path}: record {i}") for i, value in enumerate(values)]


def _read_jsonl(path: pathlib.Path) -> list[Any]:
    values = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            values += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number}: no JSON ({error}).") from error
    return values


def _read_csv(path: pathlib.Path, delimiter: str) -> list[Any]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def _read_parquet(path: pathlib.Path) -> list[Any]:
    # Here, because only some benchmarks are published so.
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise DataError(f"{path}{_PARQUET}") from error
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: no parquet ({reason}); copy it again.") from error


def subfolder(folder: pathlib.Path, *names: str) -> pathlib.Path:
    """The first of these folders that is there; where none is, the folder itself."""
    return next((folder / n for n in names if (folder / n).is_dir()), folder)


def subtitle_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Where subtitles called so are, or should be."""
    for parent in ("subtitle", "subtitles", "cg_subtitles"):
        if (folder / parent).is_dir():
            return _below(folder / parent, name)
    return _below(folder / "subtitles", name)


def find_video(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The file called so, under any of the usual suffixes; or what it should be."""
    path = _below(folder, name)
    if path.suffix in VIDEO_SUFFIXES or path.exists():
        return path
    candidates = [path.with_name(path.name + suffix) for suffix in VIDEO_SUFFIXES]
    return next((p for p in candidates if p.exists()), candidates[0])


def _below(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A file that a stranger names; links that its reader made lead where they do."""
    try:
        untrusted.check_name(name)
    except untrusted.Refused as error:
        raise DataError(f"{folder}: the name {name!r:.120}: {error}.") from error
    return folder / name


def letter(index: int) -> str:
    return chr(ord("A") + index)


def lettered(options: Sequence[str]) -> tuple[str, ...]:
    """ "A. one", "B. two", …"""
    return tuple(f"{letter(i)}. {option}" for i, option in enumerate(options))
