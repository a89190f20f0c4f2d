"""What is said in a video while its chosen frames are on screen."""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from timeviper_jax.evals.entries import DataError

_TAG = re.compile(r"<[^>]*>")
_ARROW = re.compile(r"(\S+)\s*-->\s*(\S+)")


class Line(NamedTuple):
    """A subtitle, in seconds of its own clock."""

    start: float
    end: float
    text: str


def read(path: pathlib.Path) -> list[Line]:
    """The lines of an .srt file, or of a .json list as LongVideoBench has it."""
    if not path.is_file():
        raise DataError(f"{path}: no such subtitles; leave out --subtitles without.")
    text = path.read_text(encoding="utf-8", errors="replace")
    return _json(text, path) if path.suffix == ".json" else _srt(text, path)


def on_screen(
    lines: Sequence[Line], times: Float64[np.ndarray, "F"], *, start: float = 0.0
) -> list[str]:
    """The texts that are there at any of `times`; the video begins at `start`."""
    clock = np.asarray(times) + start
    return [
        line.text
        for line in lines
        if np.any((line.start <= clock) & (clock < line.end))
    ]


def _srt(text: str, path: pathlib.Path) -> list[Line]:
    lines = []
    for block in re.split(r"\r?\n\s*\r?\n", text.strip()):
        found = _ARROW.search(block)
        if not found:
            continue
        said = " ".join(_TAG.sub("", block[found.end() :]).split())
        lines.append(Line(_seconds(found[1], path), _seconds(found[2], path), said))
    return lines


def _json(text: str, path: pathlib.Path) -> list[Line]:
    lines = []
    for line in json.loads(text):
        if "timestamp" in line:
            start, end = line["timestamp"]
            # The last line of a video is open.
            end = np.inf if end is None else end
            lines.append(Line(float(start), float(end), line["text"].strip()))
        else:
            start, end = _seconds(line["start"], path), _seconds(line["end"], path)
            lines.append(Line(start, end, line["line"].strip()))
    return lines


def _seconds(clock: str, path: pathlib.Path) -> float:
    try:
        hours, minutes, seconds = clock.replace(",", ".").split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError as error:
        raise DataError(
            f"{path}: {clock!r} is no time such as 00:01:02,500."
        ) from error
