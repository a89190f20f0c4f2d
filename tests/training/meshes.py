"""Loss and gradients on eight simulated devices against one device's, a mesh a line.

export XLA_FLAGS=--xla_force_host_platform_device_count=8
python -m tests.training.meshes WANTED mixed 1,2,2,2 8,1,1,1
python -m tests.training.meshes WANTED plain 1,2,2,2    # And the compiled program.

Rows are packed and others (`mixed`), or all of one sample (`single`, `plain`). That
model is rolled, with each kind of layer once: a program takes 8 seconds to compile.
The `plain` one is unrolled, with two stages of TransV. In several processes (by
JAX_COORDINATOR_ADDRESS and the like) each compares the shards that it has. WANTED is a
file with what one device finds, which is made if it is missing.
"""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.tiny import build
from timeviper_jax import sharding
from timeviper_jax.data.examples import Batch, Role
from timeviper_jax.llm.transv import Stage
from timeviper_jax.presets import PRESETS
from timeviper_jax.timeviper import TimeViper
from timeviper_jax.training import cross_entropy, processes
from timeviper_jax.training.loss import text_objective
from timeviper_jax.training.parameters import merge, split

FRAMES, TEXT, ROWS, ANSWER = 8, 16, 8, 8

_TINY = PRESETS["tiny"]
# Eight of everything that a mesh of eight may split, and each kind of layer once.
CONFIG = dataclasses.replace(
    _TINY,
    vision=dataclasses.replace(
        _TINY.vision, depth=2, image_size=16, patch_size=4, num_heads=8
    ),
    llm=dataclasses.replace(
        _TINY.llm,
        pattern="M*-",
        vocab_size=64,
        num_heads=16,
        num_kv_heads=8,
        ssm_heads=16,
        ssm_head_dim=4,
        ssm_groups=8,
        chunk_size=4,
        rolled=True,
        remat=True,
        transv=(Stage(layer=1, keep=0.5, select="attention"),),
    ),
)
TWO_STAGES = dataclasses.replace(
    CONFIG,
    llm=dataclasses.replace(
        CONFIG.llm,
        pattern="M*-M*",
        rolled=False,
        transv=(
            Stage(layer=2, keep=0.5, select="uniform"),
            Stage(layer=4, keep=0.25, select="attention"),
        ),
    ),
)


def make_batch(*, samples: int) -> Batch:
    """Rows of one sample; with 2 `samples` every other row has two, not of a length."""
    rng = np.random.default_rng(0)
    V = CONFIG.tokens_per_frame
    T = FRAMES * V + TEXT
    roles, segment_ids = np.zeros((2, ROWS, T), np.int32)
    for b in range(ROWS):
        packed = b % samples == 1
        frames = (b % 3 + 2, FRAMES - b % 3 - 2) if packed else (FRAMES - b % 3,)
        start = 0
        for segment, n in enumerate(frames, start=1):
            text = TEXT // len(frames) - b % 2
            answer = int(rng.integers(1, 4))
            sample = [Role.TEXT] + n * V * [Role.VISION]
            sample += (text - 1 - answer) * [Role.INSTRUCTION] + answer * [Role.ANSWER]
            here = slice(start, start + len(sample))
            roles[b, here], segment_ids[b, here] = sample, segment
            start = here.stop
    size = CONFIG.vision.image_size
    return Batch(
        tokens=rng.integers(0, CONFIG.llm.vocab_size, (ROWS, T)).astype(np.int32),
        roles=roles,
        segment_ids=segment_ids,
        loss_mask=roles == Role.ANSWER,
        frames=rng.integers(0, 256, (ROWS, FRAMES, size, size, 3)).astype(np.uint8),
        frame_times=np.tile(np.arange(FRAMES, dtype=np.float32), (ROWS, 1)),
        num_segments=samples,
    )


@functools.partial(jax.jit, static_argnums=0)
def gradients(graph, params, batch):
    """The mean loss and the gradient of every parameter."""

    def loss(params):
        means = text_objective(merge(graph, params), batch, answer_tokens=ANSWER)
        return means["loss"].total / means["loss"].count

    return jax.value_and_grad(loss)(params)


def run(graph, params, batch, sizes) -> tuple[tuple, str]:
    """Loss and gradients on a mesh, and the program that made them.

    `batch` is the whole one, of which a process puts the rows that are its own.
    """
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    places = sharding.shard_params(params, mesh)
    params = {
        path: jax.make_array_from_callback(array.shape, places[path], array.__getitem__)
        for path, array in params.items()
    }
    part, parts = sharding.feed(mesh)
    here = slice(part * ROWS // parts, (part + 1) * ROWS // parts)
    batch = sharding.put(jax.tree.map(lambda z: z[here], batch), mesh)
    with jax.set_mesh(mesh):
        compiled = gradients.lower(graph, params, batch).compile()
        return compiled(params, batch), compiled.as_text()


def find_wanted(path, graph, params, batch) -> tuple[float, dict]:
    """One device's loss and gradients, which the first call keeps."""
    if not pathlib.Path(path).exists():
        loss, grads = gradients(graph, params, jax.tree.map(jnp.asarray, batch))
        np.savez(path, loss=loss, **grads)
    found = dict(np.load(path))
    return float(found.pop("loss")), found


def compare(got, want, sizes) -> dict:
    """The largest difference of any parameter's gradient, and the loss's."""
    loss, grads = got
    own = {path: np.abs(array).max() for path, array in want[1].items()}
    # A bias of keys moves all logits alike: its gradient is nothing but rounding.
    own = {path: own[path.replace("/k/bias", "/q/bias")] for path in own}
    errors = {
        path: max(
            float(np.abs(shard.data - want[1][path][shard.index]).max() / own[path])
            for shard in grads[path].addressable_shards
        )
        for path in grads
    }
    worst = max(errors, key=errors.get)
    losses = [float(shard.data) for shard in loss.addressable_shards]
    return dict(
        mesh=sizes,
        processes=jax.process_count(),
        loss=max(abs(one - want[0]) for one in losses) / want[0],
        grads=errors[worst],
        worst=worst,
    )


def make_model(cfg):
    """Parameters of which none is special, and which rounding hardly matters to.

    With kernels of twice the size, changing each parameter by a bit changes gradients
    by 5e-5 of themselves, on one device; with these by 3e-6.
    """
    graph, params = split(build(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)), seed=1))
    return graph, {
        path: np.asarray(array) / 2 if path.endswith("kernel") else np.asarray(array)
        for path, array in params.items()
    }


if __name__ == "__main__":
    wanted, what, *meshes = sys.argv[1:]
    processes.join(processes.find(processes.Place()), cluster=False)
    cross_entropy._AT_ONCE = 256  # Else all of these logits would stand at once.
    graph, params = make_model(TWO_STAGES if what == "plain" else CONFIG)
    batch = make_batch(samples=2 if what == "mixed" else 1)
    want = find_wanted(wanted, graph, params, batch)
    for mesh in meshes:
        sizes = tuple(map(int, mesh.split(",")))
        got, program = run(graph, params, batch, sizes)
        print(json.dumps(compare(got, want, sizes)), flush=True)
        if what == "plain":
            print(program)
