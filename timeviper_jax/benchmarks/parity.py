"""Compares this project with recordings of the PyTorch release, case by case.

python -m timeviper_jax.benchmarks.parity --cases DIR
python -m timeviper_jax.benchmarks.parity --cases DIR --json

DIR holds recordings (`NAME.json` and `NAME.safetensors`; see recorded/case.py). The
`kind` and `family` in each say what to build, from its config and parameters, and what
to compare. `--json` prints one line a case: {"case", "compared", "max_abs_error",
"max_rel_grad_error", "kept_equal", "tokens_equal", "ok"}; a null was not compared.
Values may differ by 1e-4, gradients by 1e-3 of their largest entry; kept indices and
tokens must be equal. What is wrong goes to stderr. Exits with 1 unless all are ok.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from safetensors import SafetensorError

from timeviper_jax.benchmarks.recorded import language, vision, whole
from timeviper_jax.benchmarks.recorded.case import Case, Tally, not_run

COMPARE: dict[str, Callable[[Case, Tally], None]] = {
    "nano_plain": language.compare_plain,
    "qwen2_plain": language.compare_plain,
    "nano_pdrop": language.compare_transv,
    "qwen2_pdrop": language.compare_transv,
    "nano_packed_train": language.compare_packed,
    "qwen2_packed_train": language.compare_packed,
    "modules": language.compare_modules,
    "tome": vision.compare_tome,
    "timm": vision.compare_timm,
    "internvideo2": vision.compare_internvideo2,
    "posinterp": vision.compare_positions,
    "projectors": vision.compare_projectors,
    "preproc": vision.compare_preproc,
    "vlm_generate": whole.compare_generate,
    "vlm_train": whole.compare_training,
    "vlm_packed": whole.compare_training,
}
# What a recording that is not as it says, or asks for what is not built, raises. A case
# that cannot be run is told of and is not ok; the others still run.
_NOT_RUN = (
    *(ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError),
    SafetensorError,
)


def case_names(folder: pathlib.Path) -> list[str]:
    """The recordings in a folder, in order; other files are no concern."""
    return sorted(
        path.stem
        for path in folder.glob("*.json")
        if path.with_suffix(".safetensors").exists()
    )


def compare(folder: pathlib.Path, name: str) -> tuple[dict[str, Any], list[str]]:
    """One case's line, and what is wrong with it."""
    try:
        case = Case.read(folder, name)
        kind = case.about["kind"]
        if kind not in COMPARE:
            raise ValueError(f"kind={kind!r} is not one of {sorted(COMPARE)}.")
        tally = Tally(case)
        COMPARE[kind](case, tally)
    except _NOT_RUN as error:
        return not_run(name), [f"{type(error).__name__}: {error}"]
    return tally.line(name), tally.problems


def lines(folder: pathlib.Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One line a case; what is wrong is told on the way."""
    for name in names:
        begun = time.monotonic()
        line, problems = compare(folder, name)
        seconds = time.monotonic() - begun
        for problem in problems:
            print(f"{name}: {problem}", file=sys.stderr)
        print(f"{name}: {seconds:.0f} s", file=sys.stderr)
        yield line
        jax.clear_caches()


def as_text(line: dict[str, Any]) -> str:
    """A line for people."""
    number = lambda z: "–" if z is None else f"{z:.1e}"
    flag = lambda z: {None: "–", True: "equal", False: "DIFFER"}[z]
    return (
        f"{'ok  ' if line['ok'] else 'FAIL'} {line['case']:48}"
        f" values {number(line['max_abs_error']):>8}"
        f" gradients {number(line['max_rel_grad_error']):>8}"
        f" kept {flag(line['kept_equal'])} tokens {flag(line['tokens_equal'])}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", type=pathlib.Path, required=True)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    arguments = parser.parse_args(argv)
    names = [name for name in case_names(arguments.cases) if arguments.only in name]
    if not names:
        parser.error(f"{arguments.cases} holds no recording of that name.")
    all_ok = True
    with jax.default_matmul_precision("highest"):
        for line in lines(arguments.cases, names):
            print(json.dumps(line) if arguments.json else as_text(line), flush=True)
            all_ok &= line["ok"]
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main())
