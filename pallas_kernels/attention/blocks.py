"""Block sizes of the splash kernels, chosen for each shape from a table of costs.

`blocks.json` says what one visit of a tile costs each kernel, in cycles that the
compiler counts and an assumed pause between two visits; nothing in it was timed.
`python -m pallas_kernels.bench blocks` compiles the kernels for real chips and writes
it. Tiles that causality or segments rule out are not told apart: every tile counts.
"""

import functools
import itertools
import json
import pathlib
from typing import NamedTuple

from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)

TABLE = pathlib.Path(__file__).with_name("blocks.json")
KERNELS = ("forward", "dq", "dkv")
Block = tuple[int, int]  # Queries, keys.


class Blocks(NamedTuple):
    """Block sizes of each kernel, and what the lengths are padded to multiples of."""

    forward: Block
    dq: Block
    dkv: Block
    multiple_q: int
    multiple_kv: int

    def of_splash(self) -> splash.BlockSizes:
        return splash.BlockSizes(
            block_q=self.forward[0],
            block_kv=self.forward[1],
            block_q_dq=self.dq[0],
            block_kv_dq=self.dq[1],
            block_q_dkv=self.dkv[0],
            block_kv_dkv=self.dkv[1],
            block_kv_dkv_compute=self.dkv[1],
        )


@functools.cache
def table() -> dict[int, dict[str, dict[Block, int]]]:
    """Cycles of a visit by width of heads, kernel and block."""
    widths = json.loads(TABLE.read_text())["cycles"]
    block = lambda text: tuple(int(size) for size in text.split("x"))
    return {
        int(width): {
            kernel: {block(text): cost for text, cost in costs.items()}
            for kernel, costs in kernels.items()
        }
        for width, kernels in widths.items()
    }


@functools.cache
def choose(T: int, S: int, head_dim: int) -> Blocks:
    """The blocks that cost least for T queries and S keys, padding included.

    Costs are those of the next wider heads in the table, or of the widest.
    """
    widths = table()
    costs = widths[min((w for w in widths if w >= head_dim), default=max(widths))]
    sizes = sorted({size for pair in costs["forward"] for size in pair})
    options = (_blocks(costs, T, S, *pair) for pair in itertools.product(sizes, sizes))
    return min(options)[1]


def _blocks(
    costs: dict[str, dict[Block, int]],
    T: int,
    S: int,
    multiple_q: int,
    multiple_kv: int,
) -> tuple[int, Blocks]:
    """Cycles if every tile is visited, and the best blocks for these multiples."""
    T, S = -(-T // multiple_q) * multiple_q, -(-S // multiple_kv) * multiple_kv

    def best(kernel: str) -> tuple[int, Block]:
        return min(
            (cost * (T // q) * (S // kv), (q, kv))
            for (q, kv), cost in costs[kernel].items()
            if T % q == 0 and S % kv == 0
        )

    cycles, chosen = zip(*map(best, KERNELS), strict=True)
    return sum(cycles), Blocks(*chosen, multiple_q, multiple_kv)
