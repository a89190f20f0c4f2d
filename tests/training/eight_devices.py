"""Trains on a mesh of eight simulated devices and prints what comes out.

export XLA_FLAGS=--xla_force_host_platform_device_count=8
python -m tests.training.eight_devices fsdp
"""

import json
import sys

import jax
import numpy as np

from tests.training import mini
from timeviper_jax import sharding
from timeviper_jax.training.metrics import summarise
from timeviper_jax.training.step import create_state, make_train_step

MESHES = {
    "data": dict(data=8),
    "fsdp": dict(fsdp=8),
    "mixed": dict(data=2, fsdp=2, tensor=2),
}


def train(sizes: dict[str, int]) -> dict:
    """The losses on one batch, and some of every parameter at the end."""
    mesh = sharding.make_mesh(**sizes)
    graph, params = mini.make_model()
    params = jax.device_put(params, sharding.shard_params(params, mesh))
    optimizer = mini.optimizer_of(params)
    state, places = create_state(params, optimizer, mesh)
    step = make_train_step(graph, mini.make_objective(), optimizer)
    with jax.set_mesh(mesh):
        step = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
        batch, window = sharding.put(mini.make_batch(mini.ROWS), mesh), []
        for _ in range(mini.STEPS):
            state, means = step(state, {}, batch)
            window.append(summarise([means]))
    shards = state.params["llm/mlp/mixer/up/kernel"].addressable_shards
    return dict(
        losses=[means["loss"] for means in window],
        shards=len({str(shard.index) for shard in shards}),
        params={
            path: np.asarray(p).ravel()[:64].tolist()
            for path, p in state.params.items()
        },
    )


if __name__ == "__main__":
    print(json.dumps(train(MESHES[sys.argv[1]])))
