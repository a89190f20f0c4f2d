"""What commands that measure trained runs share: flags, one line an error, output."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

Rows = Sequence[Mapping[str, Any]]


def parser(doc: str) -> argparse.ArgumentParser:
    """One that shows the module's docstring, and knows `--json`."""
    made = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--json", action="store_true", help="print JSON, not a table")
    return made


def many(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Reads "1,2" as (1, 2)."""
    return lambda text: tuple(kind(part) for part in text.split(","))


def measure(
    name: str,
    parser_: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    run: Callable[[argparse.Namespace], Iterable[Mapping[str, Any]]],
    table: Callable[[Rows], Iterator[str]],
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Runs `run`, prints its rows, and returns them with the command that made them.

    Programs are kept in `--workdir`. What the arguments lack ends it with one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser_.parse_args(argv)
    jax.config.update("jax_compilation_cache_dir", str(args.workdir / "compiled"))
    try:
        rows = list(run(args))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    said = f"python -m timeviper_jax.benchmarks.{name} {' '.join(argv)}"
    found = {"command": said, "rows": rows}
    print(json.dumps(found, indent=1) if args.json else "\n".join(table(rows)))
    return args, found
