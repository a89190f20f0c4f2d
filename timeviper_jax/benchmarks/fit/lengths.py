r"""What a token costs in training as rows grow longer, at the same tokens a step.

python -m timeviper_jax.benchmarks.fit.lengths --config configs/stage2_video.py
python -m timeviper_jax.benchmarks.fit.lengths --config configs/stage2_video.py --json
python -m timeviper_jax.benchmarks.fit.lengths --config FILE:model=nano_12b --compile

What a step needs is arithmetic, and takes a second: FLOPs forward and backward, the
share of them in attention between the tokens of a row, and the bytes that the backward
pass starts from. --compile adds what the program has for 64 chips, by its jaxpr and by
the compiler: FLOPs with recomputation and tiles, and temporaries. That takes libtpu,
and minutes a length, and a config that takes `frames=` after its colon.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from pallas_kernels.bench import compiled
from timeviper_jax.benchmarks.fit import least, program, report, table
from timeviper_jax.benchmarks.fit.program import Program
from timeviper_jax.training.arithmetic import step_flops
from timeviper_jax.training.experiment import model_config

STEP = 655_360  # Tokens, as 4 rows of 163,840 or 160 of 4,096.
LENGTHS = (4_096, 8_192, 20_480, 40_960, 81_920, 163_840)
TOPOLOGY, MESH, CHIPS = "v5p:4x4x4", "fsdp=4,context=16", 64

COLUMNS = {
    "tokens_per_row": "tokens a row",
    "rows": "rows",
    "gflop_per_token": "GFLOP a token",
    "attention_share": "of it attention",
    "layer_input_kb_per_token": "layer inputs, kB a token",
    "program_gflop_per_token": "GFLOP of the program",
    "temp_kb_per_token": "temporaries, kB a token",
    "error": "why not",
}


def cost(config: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """What a token of a config's last stage needs, in rows of so many at most."""
    task = config["stages"][config["stage_order"][-1]]["task"]
    vision = tokens - task["text_tokens"]
    task["num_frames"] = vision // model_config(**config["model"]).tokens_per_frame
    step = program.make(config, report.devices_without("v5p:1", {}), rows=1)
    tokens = step.arguments.batch.tokens.size
    needed = step_flops(step.cfg, step.stage, step.arguments.state.params)
    return {
        "tokens_per_row": tokens,
        "frames": task["num_frames"],
        "rows": STEP // tokens,
        "gflop_per_token": round(needed / tokens / 1e9, 2),
        "attention_share": round(attention_flops(step) / needed, 4),
        "layer_input_kb_per_token": round(least.layer_inputs(step) / tokens / 1e3, 1),
    }


def attention_flops(step: Program) -> int:
    """Of queries with the keys before them, and of what they read there.

    Forward, and for the gradients of both; what grows with the square of a row.
    """
    llm, products = step.cfg.llm, 0
    lengths = program.segment_tokens(step.cfg, step.stage)
    for span, tokens in zip(llm.segments, lengths, strict=True):
        layers = [kind for kind, _ in llm.layers[slice(*span)]].count("attention")
        products += layers * tokens * (tokens + 1) // 2
    both = 2 * llm.num_heads * llm.head_dim
    return step.stage.batch_size * 2 * 3 * both * products


def compiled_cost(row: table.Row) -> dict[str, Any]:
    """What the program has, of a process of its own; or why there is none."""
    found = table.find(row, arithmetic=False)
    if "error" in found:
        return found
    size = found["temp_gib"] * program.GIB / (STEP / CHIPS)
    return {
        "program_gflop_per_token": round(found["flops_per_token"] / 1e9, 2),
        "temp_kb_per_token": round(size / 1e3, 1),
    }


def line(found: Mapping[str, Any]) -> str:
    """A row of the table, with as many of `COLUMNS` as were found."""
    cells = [f"{found[name]:,}" for name in COLUMNS if name in found]
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="FILE.py, or FILE.py:ARG")
    parser.add_argument("--compile", action="store_true", help="the program, too")
    parser.add_argument("--json", action="store_true", help="a line of JSON a length")
    options = parser.parse_args(argv)
    if options.compile and not compiled.available():
        sys.exit("The TPU compiler is not installed: pip install libtpu.")
    jax.config.update("jax_platforms", "cpu")  # Nothing is run.
    try:
        config = program.read_config(options.config)
    except ValueError as error:
        sys.exit(str(error))
    for tokens in LENGTHS:
        found = cost(config, tokens)
        if options.compile:
            sizes = found["rows"], found["frames"]
            found |= compiled_cost(table.Row(TOPOLOGY, MESH, *sizes, options.config))
        if tokens == LENGTHS[0] and not options.json:
            heads = [COLUMNS[name] for name in COLUMNS if name in found]
            print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n")
        print(json.dumps(found) if options.json else line(found), flush=True)


if __name__ == "__main__":
    main()
