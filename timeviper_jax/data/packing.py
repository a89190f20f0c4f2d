"""Packing: several short examples share a row, so that less of it is padding."""

import dataclasses
from collections.abc import Sequence

from timeviper_jax.data.examples import RowSize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What an example takes of a row, and how many may be in the row with it."""

    num_frames: int
    text_tokens: int
    max_in_row: int


def first_fit(loads: Sequence[Load], size: RowSize) -> list[list[int]]:
    """Rows of indices into `loads`: each goes into the first row with room for it.

    A row has room for frames, for text tokens and for a number of examples: the
    smallest that its examples and `size` allow.
    """
    rows: list[list[int]] = []
    left: list[Load] = []
    empty = Load(
        num_frames=size.num_frames,
        text_tokens=size.text_tokens,
        max_in_row=size.num_segments,
    )
    for index, load in enumerate(loads):
        for row in range(len(rows)):
            room = _put(left[row], load, len(rows[row]))
            if room is not None:
                break
        else:
            row, room = len(rows), _put(empty, load, 0)
            if room is None:
                raise ValueError(f"{load} does not fit even an empty row of {size}.")
            rows.append([])
            left.append(room)
        rows[row].append(index)
        left[row] = room
    return rows


def _put(room: Load, load: Load, already: int) -> Load | None:
    """What is left of a row's room with `load` in it, if it fits."""
    after = Load(
        num_frames=room.num_frames - load.num_frames,
        text_tokens=room.text_tokens - load.text_tokens,
        max_in_row=min(room.max_in_row, load.max_in_row),
    )
    fits = after.num_frames >= 0 and after.text_tokens >= 0
    return after if fits and already < after.max_in_row else None
