"""Tokens a second after a long prefill: a hybrid against a transformer of its size.

    python -m timeviper_jax.benchmarks.throughput --aot h200

reckons what a step of decoding reads and writes, and compiles the step for a chip that
is not there. Without `--aot` the step is run on the device at hand, from caches that
are as full as after a prefill of zeros.

Each step makes a token for every row. It reads all weights, the keys and values of all
tokens before, and reads and writes all states: at so few rows that bounds its time.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.chips import GPUS
from timeviper_jax import presets
from timeviper_jax.benchmarks.prefill import ahead, report, settings
from timeviper_jax.benchmarks.prefill.calls import (
    DECODE,
    Call,
    Program,
    filled,
    filled_bytes,
    layers_bytes,
    num_bytes,
)
from timeviper_jax.benchmarks.prefill.measure import most_memory, random_model
from timeviper_jax.inference import programs
from timeviper_jax.inference.programs import Answers
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.layers.cache import Slots
from timeviper_jax.timeviper import TimeViper, TimeViperConfig

# The paper's, against Qwen3 of a like size, at 32k tokens in, 1k out, 32 rows.
PAPER_GAIN = 0.401


def step(
    *,
    preset: str,
    rows: int,
    context: int,
    answer: int,
    place: jax.sharding.Sharding | None = None,
) -> Call:
    """The step in the middle of the answers, as shapes."""
    sizes = _sizes(preset)
    of = lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=place)
    model = nnx.eval_shape(lambda: TimeViper(sizes, rngs=nnx.Rngs(0)))
    params = jax.tree.map(of, nnx.state(model))
    run_on = programs.programs(sizes)
    layers = (0, len(sizes.llm.layers))
    cache = run_on.init.eval_shape(params, layers, rows, context + answer)
    answers = jax.eval_shape(lambda z: _answers(sizes, z, rows, answer), cache)
    limit = jax.ShapeDtypeStruct((), jnp.int32)
    args = params, *jax.tree.map(of, (answers, limit))
    used = context + answer // 2
    moved = num_bytes(params["llm"]["embed" if sizes.llm.tied else "head"])
    moved += layers_bytes(sizes.llm, params, layers) + filled_bytes(cache, used, 1)
    values = filled("[1].caches[0]", cache, used)
    static = (layers,), Decoding(max_tokens=answer)
    return Call(
        part=DECODE,
        name="write",
        program=Program(function=run_on.write, args=args, after=static),
        times=1,
        tokens=rows,
        moved=moved,
        alive=(params, args[1]),
        values=lambda i: values,
    )


def _sizes(preset: str) -> TimeViperConfig:
    return settings.in_one_dtype(presets.find_config(preset)).with_transv(())


def _answers(sizes: TimeViperConfig, cache: Any, rows: int, answer: int) -> Answers:
    """Nothing written yet."""
    return Answers(
        caches=(cache,),
        hidden=jnp.zeros((rows, sizes.llm.embed_dim), sizes.llm.dtype),
        tokens=jnp.full((rows, answer), -1, jnp.int32),
        done=jnp.zeros(rows, bool),
        written=jnp.zeros((), jnp.int32),
        key=jax.random.key(0),
    )


def bytes_a_step(call: Call) -> dict[str, float]:
    """What a step moves at the least, in GiB, by what it is."""
    (cache,) = call.program.args[1].caches
    states = 2 * num_bytes(cache.mamba)
    cached = filled_bytes(cache, int(call.values(0)["[1].caches[0].slots.used"]), 1)
    parts = {
        "weights": call.moved - cached,
        "states": states,
        "keys_and_values": cached - states,
    }
    return {name: round(size / 2**30, 3) for name, size in parts.items()}


def measure(preset: str, rows: int, context: int, answer: int) -> dict:
    """Seconds of whole answers on the device at hand, and the most memory so far."""
    sizes = _sizes(preset)
    model = random_model(sizes)
    params, run_on = nnx.state(model), programs.programs(sizes)
    layers = (0, len(sizes.llm.layers))

    @jax.jit
    def as_read(cache):
        valid = jnp.arange(cache.capacity) < context
        valid = jnp.broadcast_to(valid, cache.slots.valid.shape)
        return dataclasses.replace(
            cache, slots=Slots(valid=valid, used=jnp.int32(context))
        )

    seconds = []
    for _ in range(2):  # The first compiles.
        cache = as_read(run_on.init(params, layers, rows, context + answer))
        answers = jax.block_until_ready(_answers(sizes, cache, rows, answer))
        start = time.perf_counter()
        limit, decoding = jnp.asarray(answer), Decoding(max_tokens=answer)
        written = run_on.write(params, answers, limit, (layers,), decoding)
        jax.block_until_ready(written)
        seconds.append(time.perf_counter() - start)
    tokens_per_second = float(f"{rows * answer / seconds[1]:.4g}")
    return {
        "device": jax.devices()[0].device_kind,
        "tokens_per_second": tokens_per_second,
        "compile_seconds": round(seconds[0] - seconds[1], 1),
        **most_memory(),
    }


def _compiled(options: list[dict], chip: str) -> list[dict]:
    """The least time of a step on a chip, and its memory."""
    python = ahead.python_for(chip)
    found = []
    for call in ahead.compile_apart(python, chip, options, names=[""]):
        one = report.of_calls([call], ahead.chip_of(chip))
        tokens = call["tokens"] / one["decode_bound_seconds"]
        found.append(
            {
                "chip": chip,
                "gib": one["gib"],
                "fits": one["fits"],
                "bound_seconds": one["decode_bound_seconds"],
                "bound_tokens_per_second": float(f"{tokens:.4g}"),
                "programs": one["programs"],
            }
        )
    return found


def main() -> None:
    """Compares the presets, the last one being what the others are held against."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}")
    parser.add_argument("--presets", nargs=2, default=["nano_9b", "qwen2_7b"])
    parser.add_argument("--aot", choices=("v5p", "v6e", *GPUS))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--answer", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--results", type=pathlib.Path, help="write a file there")
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("rows", "context", "answer")}
    options = [{"preset": preset, **sizes} for preset in arguments.presets]
    if arguments.aot:
        found, key = _compiled(options, arguments.aot), "bound_tokens_per_second"
    else:
        found, key = [measure(**one) for one in options], "tokens_per_second"
    results = [
        {**one, "gib_a_step": bytes_a_step(step(**one)), **more}
        for one, more in zip(options, found, strict=True)
    ]
    gain = results[0][key] / results[1][key] - 1
    result = {"results": results, "gain": round(gain, 3), "paper_gain": PAPER_GAIN}
    if arguments.results:
        where = f"{arguments.aot} aot" if arguments.aot else results[0]["device"]
        path = report.write(result, arguments.results, f"throughput {where}")
        print(f"Wrote {path}.", file=sys.stderr)
    print(json.dumps(result, indent=1) if arguments.json else _text(result, key))


def _text(result: dict, key: str) -> str:
    lines = []
    for one in result["results"]:
        moved = [f"{name} {gib:.2f}" for name, gib in one["gib_a_step"].items()]
        lines.append(
            f"{one['preset']}: {one['rows']} rows of {one['context']} tokens, GiB a"
            f" step: {', '.join(moved)}; {one[key]:.0f} tokens/s"
        )
    paper = f"the paper has {result['paper_gain']:+.1%} against Qwen3"
    return "\n".join([*lines, f"{key}: {result['gain']:+.1%}; {paper}"])


if __name__ == "__main__":
    main()
