"""Rows of residual between two stretches of layers, held and thinned on the host.

What is held is all that grows with the video between TransV's stages. NumPy thins it:
no length compiles anything. The rules are those of `llm/transv.py`, which thins within
a compiled pass; the tests hold the two together.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from timeviper_jax.data.examples import Role


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Right-padded rows; a token's role is `Role.PAD` where there is none."""

    x: Shaped[np.ndarray, "B T D"]
    roles: Int[np.ndarray, "B T"]

    @property
    def lengths(self) -> Int[np.ndarray, "B"]:
        return np.count_nonzero(self.roles, axis=1)

    def take(self, rows: Sequence[int]) -> "Held":
        return Held(x=self.x[list(rows)], roles=self.roles[list(rows)])

    def chunks(self, size: int) -> Iterator["Held"]:
        """Consecutive pieces of `size` tokens, the last one padded."""
        for start in range(0, self.roles.shape[1], size):
            here = slice(start, start + size)
            yield Held(
                x=pad(self.x[:, here], size), roles=pad(self.roles[:, here], size)
            )


def pad(values: Shaped[np.ndarray, "B T *rest"], length: int) -> np.ndarray:
    """Zeros after the last token, up to `length`."""
    missing = length - values.shape[1]
    if not missing:
        return values
    return np.pad(values, [(0, 0), (0, missing)] + [(0, 0)] * (values.ndim - 2))


def kept_uniform(
    roles: Int[np.ndarray, "B T"], counts: Int[np.ndarray, "B"], keep: float
) -> Bool[np.ndarray, "B T"]:
    """All text, and of each row's vision tokens `keep` of `counts`, evenly spread."""
    kept = (roles != Role.PAD) & (roles != Role.VISION)
    for row, row_roles, count in zip(kept, roles, counts, strict=True):
        vision = np.flatnonzero(row_roles == Role.VISION)
        row[vision[uniform_indices(len(vision), int(count * keep))]] = True
    return kept


def uniform_indices(present: int, kept: int) -> Int[np.ndarray, "K"]:
    """Index i of k is floor(i (n-1) / (k-1)), exactly; the only one of 1 is 0."""
    kept = min(kept, present)
    return np.arange(kept, dtype=np.int64) * (present - 1) // max(kept - 1, 1)


def kept_best(
    roles: Int[np.ndarray, "B T"],
    counts: Int[np.ndarray, "B"],
    keep: float,
    scores: Float[np.ndarray, "B T"],
) -> Bool[np.ndarray, "B T"]:
    """The same count by score; of equal scores the earlier."""
    kept = (roles != Role.PAD) & (roles != Role.VISION)
    for row, row_roles, count, score in zip(kept, roles, counts, scores, strict=True):
        vision = np.flatnonzero(row_roles == Role.VISION)
        best = np.argsort(-score[vision], kind="stable")[: int(count * keep)]
        row[vision[best]] = True
    return kept


def split(held: Held, kept: Bool[np.ndarray, "B T"]) -> tuple[Held, Held]:
    """The kept tokens, closed up, and the dropped ones."""
    return _close_up(held, kept), _close_up(held, ~kept & (held.roles != Role.PAD))


def _close_up(held: Held, mask: Bool[np.ndarray, "B T"]) -> Held:
    B, length = len(mask), int(mask.sum(axis=1).max(initial=0))
    x = np.zeros((B, length, held.x.shape[2]), held.x.dtype)
    roles = np.zeros((B, length), held.roles.dtype)
    for b, row in enumerate(mask):
        index = np.flatnonzero(row)
        x[b, : len(index)] = held.x[b, index]
        roles[b, : len(index)] = held.roles[b, index]
    return Held(x=x, roles=roles)


def mean_attention(
    logits: Float[np.ndarray, "B N T"], visible: Bool[np.ndarray, "B T"]
) -> Float[np.ndarray, "B T"]:
    """What one query gives each visible token, mean over heads."""
    logits = np.where(visible[:, None], logits.astype(np.float32), -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=1)
