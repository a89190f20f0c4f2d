"""Which vision tokens a stage of TransV keeps, decided on the host.

NumPy decides: no length compiles anything. The rules are those of `llm/transv.py`,
which thins within a compiled pass; the tests hold the two together. What is spread
evenly is known before a token comes, so that it is kept or dropped as it comes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from timeviper_jax.data.examples import Role
from timeviper_jax.llm.transv import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Of every `present` vision tokens of a row `kept` stay, evenly spread."""

    present: Int[np.ndarray, "B"]
    kept: Int[np.ndarray, "B"]

    def keeps(
        self, roles: Int[np.ndarray, "B T"], seen: Int[np.ndarray, "B"]
    ) -> Bool[np.ndarray, "B T"]:
        """All text, and this share of vision tokens, of which `seen` came before."""
        vision = roles == Role.VISION
        number = seen[:, None] + np.cumsum(vision, axis=1) - 1
        chosen = uniform_kept(number, self.present[:, None], self.kept[:, None])
        return np.where(vision, chosen, roles != Role.PAD)


def uniform_kept(
    number: Int[np.ndarray, "*B"],
    present: Int[np.ndarray, "*#B"],
    kept: Int[np.ndarray, "*#B"],
) -> Bool[np.ndarray, "*B"]:
    """Whether tokens of these numbers are among `kept` spread over each `present`.

    Index i of k is floor(i (n-1) / (k-1)), exactly; the only one of 1 is 0.
    """
    number = number % np.maximum(present, 1)
    last, steps = np.maximum(present - 1, 1), np.maximum(kept - 1, 1)
    # The first i whose index reaches this number; it is kept if that index is it.
    i = -(-number * steps // last)
    return (i < kept) & (i * last // steps == number)


def spreads(
    stages: Sequence[Stage],
    counts: Int[np.ndarray, "B"],
    present: Int[np.ndarray, "B"],
) -> list[Spread]:
    """How consecutive stages thin `present` tokens, all that is left of `counts`."""
    found = []
    for stage in stages:
        kept = np.minimum(present, (counts * stage.keep).astype(int))
        found.append(Spread(present=present, kept=kept))
        present = kept
    return found


def kept_best(
    roles: Int[np.ndarray, "B T"],
    counts: Int[np.ndarray, "B"],
    keep: float,
    scores: Float[np.ndarray, "B T"],
) -> Bool[np.ndarray, "B T"]:
    """All text, and as many vision tokens by score; of equal ones the earlier."""
    kept = (roles != Role.PAD) & (roles != Role.VISION)
    for row, row_roles, count, score in zip(kept, roles, counts, scores, strict=True):
        vision = np.flatnonzero(row_roles == Role.VISION)
        best = np.argsort(-score[vision], kind="stable")[: int(count * keep)]
        row[vision[best]] = True
    return kept


def mean_attention(
    logits: Float[np.ndarray, "B N T"], visible: Bool[np.ndarray, "B T"]
) -> Float[np.ndarray, "B T"]:
    """What one query gives each visible token, mean over heads."""
    logits = np.where(visible[:, None], logits.astype(np.float32), -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=1)


def ranking_position(roles: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B"]:
    """Where each question's ranking token stands: the last of its instruction.

    Without any it is the last before the answer.
    """
    index = np.arange(roles.shape[1])
    other = (roles != Role.PAD) & (roles != Role.ANSWER)
    order = np.where(other, index, -1)
    order = np.where(roles == Role.INSTRUCTION, index + roles.shape[1], order)
    return np.argmax(order, axis=1)


def closed_up(mask: Bool[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
    """Positions of each row's marked tokens in order, then of the others."""
    return np.argsort(~mask, axis=1, kind="stable").astype(np.int32)
