r"""The table of docs/pods.md: the 9B's second stage on meshes of whole pods.

python -m timeviper_jax.benchmarks.fit.table               # Compiles: minutes a row.
python -m timeviper_jax.benchmarks.fit.table --arithmetic  # The least of each mesh.
python -m timeviper_jax.benchmarks.fit.table --only v5p:4x4x4

Each row is compiled in a process of its own, which gives its memory back. What is
found is kept in results/ as soon as it is known, so that a row can be made anew alone.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

RESULTS = pathlib.Path(__file__).parents[1] / "results"
CONFIG = "configs/stage2_video.py"


class Row(NamedTuple):
    """A step: `rows` videos of so many frames each, on a mesh of a topology."""

    topology: str
    mesh: str
    rows: int
    frames: int
    config: str = CONFIG

    @property
    def named(self) -> str:
        """The config with its argument."""
        return f"{self.config}{',' if ':' in self.config else ':'}frames={self.frames}"

    @property
    def command(self) -> list[str]:
        """The arguments of `fit`."""
        return [
            *("--config", self.named),
            *("--topology", self.topology, "--mesh", self.mesh),
            *("--rows", str(self.rows), "--json"),
        ]


# Rows of 4,352, 32,768 and 163,840 tokens.
ROWS = (
    Row("v5p:4x4x4", "fsdp=64", 64, 144),
    Row("v5p:4x4x4", "fsdp=8,context=8", 64, 144),
    Row("v5p:4x4x4", "fsdp=8,context=8", 8, 1920),
    Row("v5p:4x4x4", "fsdp=4,context=16", 4, 10_112),
    Row("v5e:16x16", "fsdp=64,context=4", 64, 144),
    Row("v5e:16x16", "fsdp=4,context=16,tensor=4", 4, 10_112),
    Row("v6e:16x16", "fsdp=64,context=4", 64, 144),
    Row("v6e:16x16", "fsdp=4,context=16,tensor=4", 4, 10_112),
)


def find(row: Row, *, arithmetic: bool) -> dict[str, Any]:
    """What `fit` finds of a row, or the line in which it says that it cannot."""
    more = ["--arithmetic"] if arithmetic else []
    command = [sys.executable, "-m", __package__, *row.command, *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout)


def keep(path: pathlib.Path, row: Row, found: Mapping[str, Any]) -> None:
    """Writes what was found of a row, in the place of what was known of it."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[" ".join(row.command)] = dict(found)
    path.write_text(json.dumps(known, indent=1) + "\n")


def line(row: Row, found: Mapping[str, Any]) -> str:
    """A row of the table, with the columns of `HEADS`."""
    tokens = row.frames * 16 + 2048
    start = [f"{row.topology}, {row.rows} × {tokens:,}", row.mesh]
    return "| " + " | ".join([*start, *_cells(found)]) + " |"


def _cells(found: Mapping[str, Any]) -> list[str]:
    if "error" in found:
        return [found["error"]]
    if "least_gib" in found:
        *held, (name, later) = found["least_gib"].items()
        whole = sum(found["least_gib"].values())
        moved = sum(found["least_bytes"].values()) / 1e9
        return [
            *(f"{size:.2f}" for part, size in held if part != "batch"),
            f"{later:.2f} ({name})",
            f"{whole:.2f}",
            f"{moved:.1f}",
            f"{found['exchange_seconds']:.3f}",
        ]
    moved = sum(found["collective_bytes"].values()) / 1e9
    return [
        f"{found['argument_gib']:.2f} + {found['temp_gib']:.2f}",
        f"{found['gib_per_chip']:.2f}",
        f"{moved:.1f} ({found['collective_ratio']:.2f} ×)",
        f"{found['bound_seconds']:.2f} ({found['bound_by']})",
        f"{found['bound_mfu']:.2f}",
        str(found["compile_cpu_seconds"]),
    ]


HEADS = {
    True: "weights | optimizer | + at once | = GiB a chip | GB exchanged | seconds",
    False: "arguments + temporaries | = GiB a chip | GB exchanged (of the least)"
    " | bound, s | MFU of it | compile, CPU s",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arithmetic", action="store_true", help="compile nothing")
    parser.add_argument("--only", default="", help="rows whose command has this in it")
    options = parser.parse_args(argv)
    kind = "least" if options.arithmetic else "compiled"
    head = f"| topology, tokens | mesh | {HEADS[options.arithmetic]} |"
    print(head, re.sub(r"[^|]+", "---", head), sep="\n", flush=True)
    for row in ROWS:
        if options.only in " ".join(row.command):
            found = find(row, arithmetic=options.arithmetic)
            keep(RESULTS / f"fit-nano_9b-{kind}.json", row, found)
            print(line(row, found), flush=True)


if __name__ == "__main__":
    main()
