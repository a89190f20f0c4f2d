"""Which updates are made: none from a loss or gradient that is no number, or a spike.

The device decides within the step, so that nothing waits for the host; what it skips
leaves no trace in parameters, optimizer or schedule, and none in the window by which
the next spike is told.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When an update is skipped, and when a run has skipped too many.

    A loss is a spike if it stands more than `spike_deviations` standard deviations
    above the mean of the last `spike_window` losses that were learned from; a window
    of 0 takes every finite loss. A run ends after `max_skips` updates in a row.
    """

    max_skips: int
    spike_window: int
    spike_deviations: float

    def __post_init__(self):
        if self.max_skips < 1 or self.spike_window < 0 or self.spike_window == 1:
            raise ValueError(
                f"max_skips={self.max_skips} must be 1 or more, spike_window="
                f"{self.spike_window} 0 (off) or 2 and more."
            )


FINITE = GuardConfig(max_skips=10, spike_window=0, spike_deviations=0.0)


class GuardState(NamedTuple):
    """What the guard remembers; losses are of the stage, nan before there are any."""

    losses: Float[Array, "W"]  # The newest last.
    in_row: Int[Array, ""]  # Updates skipped since the last that was made.


def init(cfg: GuardConfig) -> GuardState:
    """The state before a stage's first step."""
    return GuardState(
        # One place at least: checkpoints hold no arrays without elements.
        losses=jnp.full((max(cfg.spike_window, 1),), jnp.nan, jnp.float32),
        in_row=jnp.zeros((), jnp.int32),
    )


def judge(
    state: GuardState,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    cfg: GuardConfig,
) -> tuple[Bool[Array, ""], GuardState]:
    """Whether to make this update, and what to remember of it."""
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if cfg.spike_window:
        # Until the window is full its mean is nan, which no loss is above.
        limit = state.losses.mean() + cfg.spike_deviations * state.losses.std()
        good &= ~(loss > limit)
    later = jnp.append(state.losses, loss)[1:]
    return good, GuardState(
        losses=jnp.where(good, later, state.losses),
        in_row=jnp.where(good, 0, state.in_row + 1),
    )


class TooManySkipped(RuntimeError):
    """As many updates in a row were skipped as the config allows."""


class SkipLog:
    """Says which updates were skipped, and ends a run that skips all.

    `in_row` is how many were skipped just before the first that it looks at.
    """

    def __init__(self, cfg: GuardConfig, in_row: int):
        self._cfg, self._in_row = cfg, in_row

    def look(self, step: int, samples: Sequence[str], skipped: bool) -> None:
        """Takes note of a step; to be called in their order."""
        self._in_row = self._in_row + 1 if skipped else 0
        if not skipped:
            return
        logging.warning(
            "Step %d skipped: its loss or gradient is no number, or the loss a spike."
            " Samples: %s",
            *(step, " ".join(samples)),
        )
        if self._in_row >= self._cfg.max_skips:
            raise TooManySkipped(
                f"{self._in_row} updates in a row were skipped, the last at step"
                f" {step}; look at the samples named above, or lower the learning rate."
            )
