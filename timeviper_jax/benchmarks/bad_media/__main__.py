r"""Reads malformed media, hostile manifests and prompts; says what came of each.

python -m timeviper_jax.benchmarks.bad_media --json
python -m timeviper_jax.benchmarks.bad_media --short

All are made anew from sound files (`--workdir`; the needle data's clips among them).
Files are read in bounded workers, as training reads strangers' (docs/data.md). What is
examined already is not examined again: repeat the command to go on. `--json` prints the
report. Exits with 1 unless nothing crashed, hung, grew too large or went unnoticed.
"""

import collections
import json
import pathlib
import platform
import resource
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import av
from PIL import Image
from tqdm import tqdm

from timeviper_jax.benchmarks import trial
from timeviper_jax.benchmarks.bad_media import hostile, malformed, sound
from timeviper_jax.benchmarks.bad_media.examine import Counter, examine, new_pool
from timeviper_jax.data.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    Tokenizer,
    train_bpe,
)

_MEMORY = 2 << 30  # Of a worker, beyond what it takes to start.
_SECONDS = 60  # Of processor time, for one request.


def read_files(work: pathlib.Path, count: int) -> dict[str, Any]:
    """What came of `count` malformed files."""
    sources = sound.make(work / "sound")
    files = malformed.all_files((work / "sound").absolute(), sources, count)
    log = work / "files.jsonl"
    done = map(json.loads, log.read_text().splitlines()) if log.exists() else []
    found = {one["name"]: one for one in done}
    pool, counter = new_pool(_MEMORY, _SECONDS), Counter(_MEMORY)
    with log.open("a") as file, tempfile.TemporaryDirectory(dir=work) as folder:
        for name, make in tqdm(files.items(), desc="files", mininterval=5):
            if name in found:
                continue
            path = pathlib.Path(folder) / name
            make(path)
            one = dict(name=name, **examine(path, pool))
            one["short"] = one["outcome"] == "read" and counter.is_short(path)
            found[name] = one
            file.write(json.dumps(one) + "\n")
            file.flush()
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    pool.close()
    counter.close()
    return summary([found[name] for name in files])


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and the names of all that should not be."""
    died = [one for one in found if one["outcome"] == "died"]
    unnoticed = [one["name"] for one in found if one["short"]]
    unnamed = [one["name"] for one in found if not one.get("named", True)]
    return dict(
        files=len(found),
        outcomes=dict(collections.Counter(one["outcome"] for one in found)),
        workers_replaced=[dict(name=o["name"], reason=o["reason"]) for o in died],
        short_decodes_flagged=sum(
            " can be decoded;" in one.get("reason", "") for one in found
        ),
        short_decodes_unnoticed=unnoticed,
        reasons_without_the_file=unnamed,
        most_seconds=max(one["seconds"] for one in found),
        peak_gib_of_a_worker=_peak_gib(resource.RUSAGE_CHILDREN),
        cap_gib=_MEMORY / 2**30,
        ok=not unnoticed and not unnamed and not _beyond(died),
    )


def _beyond(died: list[dict[str, Any]]) -> bool:
    """Whether a worker died of anything but its bounds."""
    return any(
        "took over" not in o["reason"] and "GiB" not in o["reason"] for o in died
    )


def _peak_gib(who: int) -> float:
    return round(resource.getrusage(who).ru_maxrss / 2**20, 3)


def read_manifests(count: int) -> dict[str, Any]:
    """What came of `count` hostile manifests."""
    with tempfile.TemporaryDirectory() as folder:
        found = hostile.manifests(pathlib.Path(folder), count)
    bad = [one for one in found if not one["ok"]]
    outcomes = dict(collections.Counter(one["outcome"] for one in found))
    return dict(manifests=len(found), outcomes=outcomes, not_ok=bad, ok=not bad)


def read_prompts(work: pathlib.Path, count: int) -> dict[str, Any]:
    """What came of `count` hostile prompts, by each kind of tokenizer."""
    kinds: dict[str, Tokenizer] = dict(
        bytes=ByteTokenizer(), bpe=_learnt(work / "tokenizer.json")
    )
    found = {}
    for name, tokenizer in kinds.items():
        with tqdm(total=count, desc=f"prompts ({name})", mininterval=5) as bar:
            found[name] = hostile.prompts(tokenizer, count, lambda _: bar.update())
    ok = all(not one["specials"] and not one["changed"] for one in found.values())
    return dict(prompts=count, **found, ok=ok)


def _learnt(path: pathlib.Path) -> JsonTokenizer:
    """A BPE that has read about special tokens, as one from the web has."""
    return train_bpe(["<s> and <SPECIAL_12> are special tokens"] * 9, 400, path)


def main(argv: Sequence[str] | None = None) -> None:
    args = trial.parser(__doc__, "runs/bad_media").parse_args(argv)
    if args.again:
        shutil.rmtree(args.workdir, ignore_errors=True)
    args.workdir.mkdir(parents=True, exist_ok=True)
    files, manifests, prompts = (260, 60, 300) if args.short else (1_200, 200, 10_000)
    found = dict(
        manifests=read_manifests(manifests),
        prompts=read_prompts(args.workdir, prompts),
        files=read_files(args.workdir, files),
    )
    report = dict(
        versions=dict(
            python=platform.python_version(),
            av=av.__version__,
            pillow=Image.__version__,
        ),
        peak_gib=_peak_gib(resource.RUSAGE_SELF),
        **found,
    )
    trial.conclude(found, report, args.json)


if __name__ == "__main__":
    main()
