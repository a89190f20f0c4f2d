"""What trials that make things go wrong share: flags, and a report with a verdict."""

import argparse
import datetime
import json
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any


def parser(doc: str, workdir: str) -> argparse.ArgumentParser:
    """One that shows the module's docstring, and knows what every trial does."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, folder = made.add_argument, pathlib.Path
    add("--workdir", type=folder, default=folder(workdir), help="all that is made")
    add("--short", action="store_true", help="a few of each: minutes become seconds")
    add("--again", action="store_true", help="forget what was done before")
    add("--json", action="store_true", help="print the whole report")
    return made


def when_and_where() -> dict[str, str]:
    """The head of a report."""
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def conclude(
    found: Mapping[str, Mapping[str, Any]], report: Mapping[str, Any], as_json: bool
) -> None:
    """Prints `report`, or what is ok of `found`; ends with status 1 if anything is not.

    Each of what was found says whether it is "ok".
    """
    ok = {name: each["ok"] for name, each in found.items()}
    head = {**when_and_where(), "ok": all(ok.values())}
    print(json.dumps({**head, **report}, indent=1) if as_json else ok)
    if not head["ok"]:
        raise SystemExit(1)
