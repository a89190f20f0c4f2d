"""Times state-spaces/mamba's Triton SSD: `gpu_timing` runs it, in another process.

    python -m pallas_kernels.bench.gpu_mamba PATH_TO_MAMBA

It needs torch, triton and a GPU; prints milliseconds by length, as JSON. The inputs and
the sizes are those of our own kernels. JAX is not imported: two frameworks would share
the GPU's memory.
"""

import json
import statistics
import sys
import time
import types

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
HEADS, WIDTH, GROUPS, STATE = 128, 80, 8, 128
CHUNK = 256  # The one that mamba's own models use.
TURNS = 10


def main(source: str) -> None:
    """Prints {length: {"forward", "backward"}}."""
    # mamba_ssm/__init__.py wants an extension that is compiled for other kernels.
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [f"{source}/mamba_ssm"]
    sys.modules["mamba_ssm"] = package
    operations = types.ModuleType("mamba_ssm.ops")
    operations.__path__ = [f"{source}/mamba_ssm/ops"]
    sys.modules["mamba_ssm.ops"] = operations
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    print(json.dumps({n: _times(mamba_chunk_scan_combined, n) for n in LENGTHS}))


def _times(scan, length: int) -> dict[str, float]:
    import torch

    x, dt, a, b, c, d, state, ids, dy, dlast = _inputs(length)
    wanting = [x, dt, a, b, c, d, state]

    def forward():
        options = dict(D=d, initial_states=state, seq_idx=ids, return_final_states=True)
        return scan(x, dt, a, b, c, CHUNK, **options)

    def forward_backward():
        torch.autograd.grad(forward(), wanting, (dy, dlast))

    with torch.no_grad():
        alone = _milliseconds(forward)
    for z in wanting:
        z.requires_grad_()
    return {"forward": alone, "backward": _milliseconds(forward_backward)}


def _milliseconds(program) -> float:
    """The median of several turns, after those that tune and compile."""
    import torch

    seconds = []
    for turn in range(TURNS + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        program()
        torch.cuda.synchronize()
        if turn >= 3:
            seconds.append(time.perf_counter() - start)
    return round(statistics.median(seconds) * 1e3, 4)


def _inputs(length: int) -> list:
    """Of the shapes, dtypes and segments of `gpu_programs.drawn`."""
    import torch

    torch.manual_seed(0)
    draw = lambda *shape, dtype=torch.float32: torch.randn(
        *shape, device="cuda", dtype=dtype
    )
    of_heads = lambda: draw(1, length, HEADS, WIDTH, dtype=torch.bfloat16)
    of_groups = lambda: draw(1, length, GROUPS, STATE, dtype=torch.bfloat16)
    of_state = lambda: draw(1, HEADS, WIDTH, STATE)
    dt = torch.nn.functional.softplus(draw(1, length, HEADS) - 3)
    ids = (torch.arange(length, device="cuda", dtype=torch.int32) * 4 // length)[None]
    return [
        *(of_heads(), dt, -torch.exp(draw(HEADS)), of_groups(), of_groups()),
        *(draw(HEADS), of_state(), ids, of_heads(), of_state()),
    ]


if __name__ == "__main__":
    main(sys.argv[1])
