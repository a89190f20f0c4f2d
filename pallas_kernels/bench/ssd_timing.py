"""Times this package's SSD beside mamba2-jax's; run by `bench ssd` in its venv.

T 4096, 8 heads of 64 that share one b and c (16 do in Nano-9B), state 128, float32,
softplus of dt and d included, each at its best chunk, best of several turns.
"""

import functools
import json
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from mamba2_jax.modeling import ssd_forward

from pallas_kernels.ssd import ssd

HEADS, WIDTH, STATE = 8, 64, 128
LENGTHS = (4096, 16384, 65536)
CHUNKS = (32, 64, 128, 256)
TURNS = 7


def inputs(length: int) -> tuple[jax.Array, ...]:
    """x, dt before softplus, a, b, c and d."""
    keys = jax.random.split(jax.random.key(0), 6)
    normal = jax.random.normal
    return (
        normal(keys[0], (1, length, HEADS, WIDTH)),
        normal(keys[1], (1, length, HEADS)) - 2,
        -jnp.exp(normal(keys[2], (HEADS,))),
        normal(keys[3], (1, length, 1, STATE)),
        normal(keys[4], (1, length, 1, STATE)),
        normal(keys[5], (HEADS,)),
    )


def ours(x, dt, a, b, c, d, *, chunk: int):
    """The scan over chunks."""
    dt = jax.nn.softplus(dt)
    return ssd(x, dt, a, b, c, d=d, chunk_size=chunk, implementation="scan")


def theirs(x, dt, a, b, c, d, *, chunk: int):
    """mamba2-jax, which wants b and c for every head."""
    b, c = (jnp.repeat(z, HEADS, axis=2) for z in (b, c))
    bias = jnp.zeros((HEADS,))
    options = dict(dt_min=0.0, dt_max=float("inf"), return_final_states=True)
    return ssd_forward(x, dt, a, b, c, chunk, d, bias, **options)


def with_gradients(run: Callable) -> Callable:
    """The gradient of every argument, from outputs and last state."""

    def loss(*args):
        y, state = run(*args)
        return jnp.sum(jnp.square(y)) + jnp.sum(jnp.square(state))

    return jax.grad(loss, argnums=tuple(range(6)))


def best_times(programs: dict[str, Callable], args, turns: int) -> dict[str, float]:
    """Seconds of each program: the best of several turns, after one to compile."""
    programs = {name: jax.jit(run) for name, run in programs.items()}
    best = dict.fromkeys(programs, float("inf"))
    for turn in range(turns + 1):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def speedup(wrap: Callable) -> float:
    """How many times as long the peer takes, each at its best chunk."""
    programs = {
        f"{who.__name__} {chunk}": wrap(functools.partial(who, chunk=chunk))
        for who in (ours, theirs)
        for chunk in CHUNKS
    }
    times = best_times(programs, inputs(LENGTHS[0]), TURNS)
    for name, seconds in times.items():
        print(f"{name}: {seconds * 1e3:.1f} ms", file=sys.stderr, flush=True)
    of = lambda who: min(s for name, s in times.items() if name.startswith(who))
    return round(of("theirs") / of("ours"), 2)


def per_token(length: int) -> dict:
    """Time and temporaries of the forward, over the number of tokens."""
    print(f"{length} tokens ...", file=sys.stderr, flush=True)
    args, run = inputs(length), functools.partial(ours, chunk=64)
    seconds = best_times({"": run}, args, TURNS)[""]
    memory = jax.jit(run).lower(*args).compile().memory_analysis()
    return {
        "length": length,
        "microseconds": round(seconds * 1e6 / length, 3),
        "bytes": round(memory.temp_size_in_bytes / length),
    }


def main() -> None:
    """Prints the result as JSON, and progress elsewhere."""
    want, got = ours(*inputs(512), chunk=64), theirs(*inputs(512), chunk=64)
    error = float(jnp.abs(want[0] - got[0]).max() / jnp.abs(want[0]).max())
    if not error < 1e-3:
        sys.exit(f"The two compute different things: relative error {error}.")
    result = {
        "forward_speedup": speedup(lambda run: run),
        "forward_backward_speedup": speedup(with_gradients),
        "per_token": [per_token(length) for length in LENGTHS],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
