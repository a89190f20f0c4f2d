"""Whether a checkpoint is what was written: SHA-256 of its files, in a manifest inside.

`checkpoints/STEP/manifest.sha256` is written once all else is, in the format of
`sha256sum`, which checks it too. A checkpoint without one was cut short and counts as
not there; runs from before manifests, whose `run/metadata` names no versions, are read
as they are.
"""

import concurrent.futures
import hashlib
import os
import pathlib
from typing import NamedTuple

MANIFEST = "manifest.sha256"
_THREADS = 8


class DamagedError(ValueError):
    """Every checkpoint there is has a file that is not as it was written."""


class Found(NamedTuple):
    """The newest checkpoint that is whole, and what is wrong with each newer one."""

    folder: pathlib.Path | None
    problems: dict[pathlib.Path, str]


def write(folder: pathlib.Path) -> None:
    """Adds the manifest of what the folder holds; it is there whole or not at all."""
    part = folder / f"{MANIFEST}.part"
    with part.open("w", encoding="utf-8") as file:
        file.write(_listing(folder))
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / MANIFEST)


def newest(checkpoints: pathlib.Path) -> Found:
    """Looks from the newest step backwards; folder is None where none was finished.

    Raises:
      DamagedError: There are finished checkpoints, and none is whole.
    """
    problems: dict[pathlib.Path, str] = {}
    damaged = False
    for folder in sorted(steps(checkpoints), key=lambda p: int(p.name), reverse=True):
        if not (folder / MANIFEST).exists() and not _is_old(folder):
            problems[folder] = f"has no {MANIFEST}: it was cut short"
            continue
        problem = damage(folder)
        if not problem:
            return Found(folder, problems)
        problems[folder], damaged = problem, True
    if damaged:
        told = "; ".join(f"{folder}: {text}" for folder, text in problems.items())
        raise DamagedError(f"No whole checkpoint in {checkpoints}: {told}.")
    return Found(None, problems)


def steps(checkpoints: pathlib.Path) -> list[pathlib.Path]:
    """The folders that are named as a step's."""
    return [path for path in checkpoints.glob("*") if path.name.isdigit()]


def damage(folder: pathlib.Path) -> str:
    """What differs from the manifest, and in which file; "" if nothing does."""
    if not (folder / MANIFEST).exists():
        return ""
    told = (folder / MANIFEST).read_bytes()
    found = _listing(folder).encode()
    if told == found:
        return ""
    told, found = told.splitlines(), found.splitlines()
    # A file's new line, its old one, or (the manifest itself is damaged) neither.
    lines = [*sorted(set(found) - set(told)), *sorted(set(told) - set(found))]
    name = lines[0][66:].decode(errors="replace") if lines else ""
    if not (folder / name).is_file():
        return f"{MANIFEST} does not match the files"
    return f"{name} is not as it was written"


def _is_old(folder: pathlib.Path) -> bool:
    """Whether a checkpoint was finished by a version that wrote no manifests."""
    record = folder / "run" / "metadata"
    return record.exists() and b'"versions"' not in record.read_bytes()


def _listing(folder: pathlib.Path) -> str:
    """A line for each file, in the order of their names: digest, two spaces, path."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(MANIFEST)
    )
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(_digest, files))
    lines = zip(digests, files, strict=True)
    return "".join(f"{d}  {file.relative_to(folder)}\n" for d, file in lines)


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
