"""What the pipeline makes: examples, and the fixed-shape batches they fill.

An example is one conversation about its frames. A row of a batch holds one or more
examples, one after another (packing), then padding. Row capacities are static: `F`
frames of `V` vision tokens, and `text_tokens` others, so `T = F V + text_tokens`.
"""

import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8


class Role(enum.IntEnum):
    """What a token is to the model: what TransV drops, feeds and leaves alone."""

    PAD = 0
    TEXT = 1
    VISION = 2
    INSTRUCTION = 3  # From after the last vision token to the next answer.
    ANSWER = 4


@runtime_checkable
class FrameFeatures(Protocol):
    """Features, F V E, of frames that are given when they are asked for, in order."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def __getitem__(self, frames: slice) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One sample before batching. Its frames are pixels or encoded features.

    The j-th VISION position takes the j-th token of the frames, frame by frame. Only
    inference takes features that are no array: it reads them once, from the first on.
    """

    tokens: Int[np.ndarray, "T"]
    roles: Int[np.ndarray, "T"]
    loss_mask: Bool[np.ndarray, "T"]
    frame_times: Float32[np.ndarray, "F"]
    frames: UInt8[np.ndarray, "F H W 3"] | None = None
    features: Float[np.ndarray, "F V E"] | FrameFeatures | None = None

    @property
    def num_frames(self) -> int:
        return len(self.frame_times)

    @functools.cached_property
    def num_text_tokens(self) -> int:
        return int(np.count_nonzero(self.roles != Role.VISION))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch of rows. Segment 0 is padding; packed examples count from 1.

    `loss_mask[b, t]` says that token t is a supervised target; the loss shifts.
    Vision positions hold the tokenizer's `image_id`, which no embedding has. The
    pipeline fills it with NumPy's arrays; within a compiled step they are JAX's.
    """

    tokens: Int[Any, "B T"]
    roles: Int[Any, "B T"]
    segment_ids: Int[Any, "B T"]
    loss_mask: Bool[Any, "B T"]
    frame_times: Float32[Any, "B F"]  # Seconds.
    frames: UInt8[Any, "B F H W 3"] | None = None
    features: Float[Any, "B F V E"] | None = None
    num_segments: int = 1  # At most this many examples share a row.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSize:
    """How much one row of a batch can hold."""

    num_frames: int
    text_tokens: int
    tokens_per_frame: int
    num_segments: int = 1

    @property
    def length(self) -> int:
        """`T`, the tokens of a row."""
        return self.num_frames * self.tokens_per_frame + self.text_tokens

    def misfit(self, example: Example) -> str | None:
        """Why `example` does not fit an empty row, or None when it does."""
        if example.num_frames > self.num_frames:
            return f"{example.num_frames} frames in a row of {self.num_frames}"
        if example.num_text_tokens > self.text_tokens:
            return (
                f"{example.num_text_tokens} text tokens in a row of {self.text_tokens}"
            )
        return None


def collate(rows: Sequence[Sequence[Example]], size: RowSize) -> Batch:
    """Lays examples into rows, in order, and pads every row to `size`."""
    for row in rows:
        _check_row(row, size)
    B, T = len(rows), size.length
    tokens, roles, segment_ids = np.zeros((3, B, T), np.int32)
    loss_mask = np.zeros((B, T), bool)
    for b, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, start=1):
            here = slice(start, start + len(example.tokens))
            tokens[b, here] = example.tokens
            roles[b, here] = example.roles
            loss_mask[b, here] = example.loss_mask
            segment_ids[b, here] = segment
            start = here.stop
    return Batch(
        tokens=tokens,
        roles=roles,
        segment_ids=segment_ids,
        loss_mask=loss_mask,
        frame_times=_stack(rows, "frame_times", size.num_frames),
        frames=_stack(rows, "frames", size.num_frames),
        features=_stack(rows, "features", size.num_frames),
        num_segments=size.num_segments,
    )


def _stack(
    rows: Sequence[Sequence[Example]], name: str, num_frames: int
) -> np.ndarray | None:
    """One field of the frames of every row, zeros after the last real frame."""
    arrays = [[getattr(example, name) for example in row] for row in rows]
    present = [a is not None for row in arrays for a in row]
    if not any(present):
        return None
    if not all(present):
        raise ValueError(
            f"{sum(present)} of {len(present)} examples of a batch have {name};"
            " give all of them pixels or all of them features."
        )
    first = next(a for row in arrays for a in row)
    out = np.zeros((len(rows), num_frames, *first.shape[1:]), first.dtype)
    for b, row in enumerate(arrays):
        start = 0
        for array in row:
            out[b, start : start + len(array)] = array
            start += len(array)
    return out


def _check_row(row: Sequence[Example], size: RowSize) -> None:
    frames = sum(e.num_frames for e in row)
    text = sum(e.num_text_tokens for e in row)
    vision = sum(len(e.tokens) for e in row) - text
    if vision != frames * size.tokens_per_frame:
        raise ValueError(
            f"{vision} vision tokens for {frames} frames; every frame needs"
            f" tokens_per_frame={size.tokens_per_frame} of them."
        )
    if (
        frames > size.num_frames
        or text > size.text_tokens
        or len(row) > size.num_segments
    ):
        raise ValueError(
            f"{len(row)} examples with {frames} frames and {text} text tokens do not"
            f" fit a row of {size.num_segments} examples, {size.num_frames} frames"
            f" and {size.text_tokens} text tokens."
        )
