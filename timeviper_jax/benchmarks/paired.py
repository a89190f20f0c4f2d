"""What one way to do something costs beside another, where they take turns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST = 0.03  # What protections may cost.


def shares(
    taken: Mapping[str, Sequence[float]], base: str, *, extra: float = 0.0
) -> dict[str, dict[str, Any]]:
    """Each way's share of time beyond `base`, by rounds in which all took their turn.

    The median, and the interval in which it lies by 95 %, drawing the rounds again.
    Rounds may be slow or quick, as long as all ways in one are.

    Args:
      taken: Seconds by way, one for each round.
      base: The way that the others are compared with.
      extra: A share that comes on top, known otherwise.
    """
    rng = np.random.default_rng(0)
    found = {}
    for name in sorted(taken.keys() - {base}):
        rounds = np.array(taken[name]) / np.array(taken[base]) - 1 + extra
        drawn = np.median(rng.choice(rounds, (2_000, len(rounds))), axis=1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        found[name] = dict(
            median=round(float(np.median(rounds)), 4),
            interval=[round(float(low), 4), round(float(high), 4)],
            ok=bool(high <= MOST),
        )
    return found
