"""How far the TPU kernels in bfloat16 are from the recurrence in float64.

The kernels are interpreted on CPU, which multiplies bfloat16 and adds float32 as the
chip does. Both sides get the same inputs, which bfloat16 holds exactly.

An error is the root mean square of the differences over that of the right values;
`largest` is the largest difference over the largest right value. Each stands beside
what no kernel can avoid, the same for the right values in the output's dtype: a number
in bfloat16 is off by up to 3.9e-3 of itself, and by 1.7e-3 in the root mean square.
"""

import argparse
import functools
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pallas_kernels.ssd import ssd

# Heads and state as in Nano-9B, two blocks of time and a ragged end, five segments.
TOKENS, HEADS, HEAD_DIM, GROUPS, STATE = 400, 4, 80, 1, 128
_SEGMENTS = np.repeat(np.int32([1, 2, 3, 4, 0]), [3, 122, 135, 120, 20])[None]
_NARROW = ("x", "b", "c", "dy")
_COLUMNS = ("case", "array", "error", "rounding", "largest", "largest_rounding")

Arrays = dict[str, np.ndarray]


def add_command(commands) -> None:
    """Adds `accuracy` to the command line."""
    text = "compare the TPU kernels in bfloat16, interpreted, with float64"
    parser = commands.add_parser("accuracy", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prints the error of every output and gradient."""
    results = list(measure())
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    line = "{:<16}  {:<15}  {:>8}  {:>8}  {:>8}  {:>8}".format
    print(line(*_COLUMNS))
    for row in results:
        errors = (f"{row[key]:.2e}" for key in _COLUMNS[2:])
        print(line(row["case"], row["array"], *errors))


def measure() -> Iterator[dict]:
    """A row for each case and array."""
    for case, (a, dt) in _steps(np.random.default_rng(0)).items():
        arrays = _arrays(a, dt)
        with jax.enable_x64(True):
            want = jax.tree.map(np.asarray, _outputs(arrays, "reference"))
        narrow = {
            name: jnp.asarray(z, "bfloat16" if name in _NARROW else "float32")
            for name, z in arrays.items()
        }
        got = _outputs(narrow, "pallas_tpu")
        for name, array in got.items():
            rounded = jnp.asarray(want[name], array.dtype)
            error, largest = _errors(array, want[name])
            rounding, largest_rounding = _errors(rounded, want[name])
            values = (case, name, error, rounding, largest, largest_rounding)
            yield dict(zip(_COLUMNS, values, strict=True))


def _steps(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Decay rates and steps by case."""
    shape = (1, TOKENS, HEADS)
    # As Mamba-2 is initialised.
    rates = -rng.uniform(1, 16, HEADS)
    steps = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), shape))
    # Every other token all but empties the state; the log decay of a chunk sums to
    # -2,500, where float32 still is exact to 2e-4.
    strong = np.where(np.arange(TOKENS)[:, None] % 2, 40, 1e-2) * rng.uniform(
        0.5, 1.5, shape
    )
    return {
        "as initialised": (rates, steps),
        "long memory": (rates / 1e3, steps),
        "strong decay": (-np.ones(HEADS), strong),
    }


def _arrays(a: Float[np.ndarray, "N"], dt: Float[np.ndarray, "B T N"]) -> Arrays:
    """All that goes in, cotangents too, rounded to bfloat16."""
    rng = np.random.default_rng(1)
    tokens, by_head = (1, TOKENS), (1, TOKENS, HEADS, HEAD_DIM)
    normal = lambda *shape: rng.normal(size=shape)
    arrays = {
        "x": normal(*by_head),
        "dt": dt,
        "a": a,
        "b": normal(*tokens, GROUPS, STATE),
        "c": normal(*tokens, GROUPS, STATE),
        "d": normal(HEADS),
        "initial_state": normal(1, HEADS, HEAD_DIM, STATE),
        "dy": normal(*by_head),
        "dlast": normal(1, HEADS, HEAD_DIM, STATE),
    }
    return {
        name: np.asarray(jnp.asarray(z, jnp.bfloat16), np.float64)
        for name, z in arrays.items()
    }


@functools.partial(jax.jit, static_argnames="implementation")
def _outputs(arrays: dict, implementation: str) -> dict:
    """Outputs, last state and the gradient of every argument, by name."""
    arguments = dict(arrays)
    cotangents = arguments.pop("dy"), arguments.pop("dlast")
    options = dict(segment_ids=jnp.asarray(_SEGMENTS), implementation=implementation)
    (y, last), pull = jax.vjp(lambda z: ssd(**z, **options), arguments)
    (gradients,) = pull(cotangents)
    return {"y": y, "last": last} | {f"d{name}": z for name, z in gradients.items()}


def _errors(got: jax.Array, want: Float[np.ndarray, "..."]) -> tuple[float, float]:
    """Relative errors: the root mean square, and the largest."""
    difference = np.asarray(got).astype(np.float64) - want
    rms = lambda z: np.sqrt(np.mean(np.square(z)))
    largest = np.abs(difference).max() / np.abs(want).max()
    return float(rms(difference) / rms(want)), float(largest)
