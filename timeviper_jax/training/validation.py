"""The loss on samples that nothing is learned from, the same ones each time."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from timeviper_jax.data.iterator import NamedBatches
from timeviper_jax.training.metrics import summarise
from timeviper_jax.training.parameters import Params, merge
from timeviper_jax.training.step import Adapt, Objective


class Validation:
    """Measures a model on the first `count` batches of an input that begins anew.

    `put` places a batch of the host's on the devices.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        objective: Objective,
        adapt: Adapt,
        mesh: Mesh,
        *,
        begin: Callable[[], NamedBatches],
        put: Callable[[Any], Any],
        count: int,
    ):
        def measure(params, batch):
            return objective(merge(graph, adapt(params)), batch)

        self._measure = jax.jit(measure, out_shardings=NamedSharding(mesh, P()))
        self._begin, self._put, self._count = begin, put, count

    def run(
        self, params: Params, stopped: Callable[[], bool]
    ) -> dict[str, float] | None:
        """The objective's means, as `validation_…`; None if `stopped` broke it off."""
        window = []
        with contextlib.closing(self._begin()) as batches:
            for _ in range(self._count):
                if stopped():
                    return None
                window.append(self._measure(params, self._put(next(batches))))
        return {f"validation_{name}": x for name, x in summarise(window).items()}
