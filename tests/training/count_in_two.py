"""Counts a batch that two processes share, on meshes that share it differently.

python -m tests.training.count_in_two HOST:PORT 0 & python -m … HOST:PORT 1
"""

import functools
import json
import sys

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.training import mini
from timeviper_jax import sharding

# Rows of their own for each process, or rows that both make as context cuts them.
MESHES = {"rows": dict(fsdp=4), "tokens": dict(context=4), "both": dict(fsdp=2, data=2)}


def count(sizes: dict[str, int]) -> dict[str, int]:
    """What the loop counts of a batch, as this process learns it."""
    mesh = sharding.make_mesh(**sizes)
    part, parts = sharding.feed(mesh)
    rows = mini.ROWS // parts
    batch = mini.make_batch(mini.ROWS)
    mine = jax.tree.map(lambda z: z[part * rows : (part + 1) * rows], batch)
    run = functools.partial(mini.make_task().count, cfg=mini.CONFIG)
    with jax.set_mesh(mesh):
        found = jax.jit(run, out_shardings=NamedSharding(mesh, P()))(
            sharding.put(mine, mesh)
        )
    return jax.tree.map(int, found) | dict(parts=parts)


if __name__ == "__main__":
    address, index = sys.argv[1], int(sys.argv[2])
    jax.distributed.initialize(address, num_processes=2, process_id=index)
    print(json.dumps({name: count(sizes) for name, sizes in MESHES.items()}))
