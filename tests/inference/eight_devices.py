"""Encodes on eight simulated devices and prints what comes out, as JSON.

export XLA_FLAGS=--xla_force_host_platform_device_count=8
python -m tests.inference.eight_devices
"""

import json

import jax
import numpy as np

from tests.training import mini
from timeviper_jax import sharding
from timeviper_jax.inference.encode import make_encoder
from timeviper_jax.training.parameters import merge

BATCH = 16


def frames(count: int) -> np.ndarray:
    size = mini.CONFIG.vision.image_size
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def main() -> None:
    mesh, put, given = sharding.make_mesh(fsdp=-1), sharding.put, []
    graph, params = mini.make_model()
    params = jax.device_put(params, sharding.shard_params(params, mesh))
    encode = make_encoder(merge(graph, params), mesh, batch_size=BATCH)
    sharding.put = lambda *batch: given.append(put(*batch)) or given[-1]
    features = encode(frames(21))  # The second batch is not full.
    shards = [[s.data.shape[0] for s in batch.addressable_shards] for batch in given]
    print(json.dumps(dict(shards=shards, features=features.tolist())))


if __name__ == "__main__":
    main()
