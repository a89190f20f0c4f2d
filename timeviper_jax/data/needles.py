r"""Makes the needle data: long videos in which photographs appear, and questions.

python -m timeviper_jax.data.needles --out data/needles
python -m timeviper_jax.data.needles --out data/small --scale 0.05 --seed 1
python -m timeviper_jax.data.needles --describe data/needles

A video of your own, with the pictures and times you choose (needle_handmade.py):

python -m timeviper_jax.data.needles --file out.mp4 --length 60 \
    --clip my.mp4 --needle photo.png@12-17 --needle cat@40-44

The data directory holds, for each split, the videos, `SPLIT.jsonl` (one question a
line) and `SPLIT.scenes.jsonl` (one scene a line: what is shown when); beside them
`data.yaml`, the manifest that names the splits, `tokenizer.json`, learnt from the
training questions, and `config.json`, the settings that made it all.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from timeviper_jax.data import needle_dialogues as dialogues
from timeviper_jax.data import needle_glimpses as glimpses
from timeviper_jax.data import needle_handmade as handmade
from timeviper_jax.data import needle_questions as questions
from timeviper_jax.data import needle_render as render
from timeviper_jax.data import needle_sources as sources
from timeviper_jax.data.needle_scenes import Scene, SceneConfig, Showing, draw_scene
from timeviper_jax.data.tokenizer import train_bpe

SPLITS = ("train", "heldout", "heldout_views")
GLIMPSES, DIALOGUES = "glimpses", "dialogues"
VOCABULARY = 512
MOST_FRAMES = 10_240
PACK_SIZE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedlesConfig:
    """What is made; a number in a name is the seconds of a scene."""

    seed: int = 0
    reel: int = 10_240  # Seconds in a training file of many scenes.
    train_32: int = 1_920  # Scenes in reels, as the next two.
    train_128: int = 320
    train_512: int = 120
    train_glimpses: int = 24_000  # Questions about a few moments of a reel.
    train_files_32: int = 200  # Files of one scene each, as all that follow.
    heldout_32: int = 220
    heldout_512: int = 116
    heldout_2048: int = 16
    heldout_10240: int = 3
    heldout_views_32: int = 220
    scenes: SceneConfig = SceneConfig()
    video: render.RenderConfig = render.RenderConfig()

    def scaled(self, scale: float) -> "NeedlesConfig":
        """The same data set with all counts multiplied, none of them below one."""
        counts = {
            field.name: max(1, round(getattr(self, field.name) * scale))
            for field in dataclasses.fields(self)
            if field.name.startswith(SPLITS)
        }
        return dataclasses.replace(self, **counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """One video to be made: its place, and the lengths of its scenes."""

    split: str
    name: str
    number: int  # Unique in the split; seeds what the file shows.
    lengths: tuple[int, ...]

    @property
    def path(self) -> str:
        """Relative to the data directory."""
        return f"{self.split}/{self.name}.mp4"

    @property
    def seconds(self) -> int:
        return sum(self.lengths)

    def scene_id(self, number: int) -> str:
        return f"{self.split}/{self.name}/{number}"


def _reels(length: int, scenes: int, reel: int) -> Iterator[tuple[int, ...]]:
    """Scenes of one length, as many a file as fit into `reel` seconds."""
    per_file = max(1, reel // length)
    while scenes > 0:
        yield (length,) * min(per_file, scenes)
        scenes -= per_file


def list_files(cfg: NeedlesConfig) -> list[File]:
    """Every file of the data set."""
    wanted = [
        ("train", f"reel{length:05d}", lengths)
        for length, scenes in (
            (32, cfg.train_32),
            (128, cfg.train_128),
            (512, cfg.train_512),
        )
        for lengths in _reels(length, scenes, cfg.reel)
    ]
    for split, length, count in (
        ("train", 32, cfg.train_files_32),
        ("heldout", 32, cfg.heldout_32),
        ("heldout", 512, cfg.heldout_512),
        ("heldout", 2048, cfg.heldout_2048),
        ("heldout", 10_240, cfg.heldout_10240),
        ("heldout_views", 32, cfg.heldout_views_32),
    ):
        wanted += [(split, f"scene{length:05d}", (length,))] * count
    seen = collections.Counter()
    files = []
    for split, stem, lengths in wanted:
        name = f"{stem}_{seen[split, stem]:04d}"
        files.append(File(split=split, name=name, number=seen[split], lengths=lengths))
        seen.update([split, (split, stem)])
    return files


def _rng(cfg: NeedlesConfig, file: File, *rest: int) -> np.random.Generator:
    """A generator that depends on nothing but the seed and the place in the data."""
    split = SPLITS.index(file.split)
    return np.random.default_rng([cfg.seed, split, 2, file.number, *rest])


def plan(file: File, cfg: NeedlesConfig) -> list[Scene]:
    """What happens when in a file."""
    starts = np.cumsum([0, *file.lengths[:-1]])
    return [
        draw_scene(_rng(cfg, file, i, 0), int(start), length, sources.NAMES, cfg.scenes)
        for i, (start, length) in enumerate(zip(starts, file.lengths, strict=True))
    ]


def ask(
    file: File, scenes: Sequence[Scene], cfg: NeedlesConfig
) -> Iterator[dict[str, Any]]:
    """The manifest's items for a file, one a question."""
    for i, scene in enumerate(scenes):
        rng = _rng(cfg, file, i, 1)
        asked = questions.ask(rng, scene, sources.NAMES, cfg.scenes)
        for j, question in enumerate(asked):
            item = questions.item(scene, question, image=file.path)
            item["id"] = f"{file.scene_id(i)}/{j}"
            item["needle"] |= {"scene": file.scene_id(i), "split": file.split}
            yield item


def make_file(file: File, cfg: NeedlesConfig, out: pathlib.Path) -> int:
    """Renders and encodes one file; returns its seconds."""
    pool = sources.haystack(cfg.seed, file.split, cfg.video.shots, cfg.video.size)
    view = sources.VIEWS[file.split]

    def look(showing: Showing) -> tuple[Image.Image, sources.View]:
        return sources.photo(showing.name), view

    blocks = (
        render.render_scene(_rng(cfg, file, i, 2), scene, pool, look, cfg.video)
        for i, scene in enumerate(plan(file, cfg))
    )
    render.encode(out / file.path, blocks, cfg.video)
    return file.seconds


def make(out: pathlib.Path, cfg: NeedlesConfig, workers: int) -> None:
    """Makes the data set in `out`, or what is missing of it."""
    sources.check_sources()
    _check_config(out, cfg)
    files = list_files(cfg)
    missing = [file for file in files if not (out / file.path).exists()]
    # Long ones first, so that no worker is left alone with one at the end.
    _make_files(sorted(missing, key=lambda file: -file.seconds), cfg, out, workers)
    for split in SPLITS:
        _write_manifests(split, [f for f in files if f.split == split], cfg, out)
    _write_glimpses([f for f in files if f.name.startswith("reel00032")], cfg, out)
    _write_dialogues(cfg, out)
    datasets = [(split, split) for split in SPLITS]
    datasets += [("train", GLIMPSES), ("train", DIALOGUES)]
    _write(out / "data.yaml", "data:\n" + "".join(_dataset(*d) for d in datasets))
    if not (out / "tokenizer.json").exists():
        _train_tokenizer(out)


def _dataset(split: str, name: str) -> str:
    """An entry of `data.yaml`: every second of a scene, however long.

    In training, short scenes may share a row with others.
    """
    form = "conversation"
    if split == "train":
        form = f"conversation_packed\n    pack_size: {PACK_SIZE}"
    return f"""\
  - name: needles_{name}
    split: {split}
    format: {form}
    json_path: {name}.jsonl
    data_path: .
    dataset_type: video
    video_sample_type: fps1
    max_num_frames_fps: {MOST_FRAMES}
"""


def _check_config(out: pathlib.Path, cfg: NeedlesConfig) -> None:
    """Refuses to mix two data sets in one directory."""
    path = out / "config.json"
    text = json.dumps(dataclasses.asdict(cfg), indent=1)
    if path.exists() and json.loads(path.read_text()) != json.loads(text):
        raise ValueError(
            f"{out} holds data made with other settings (see {path}); use another "
            "--out, or remove it."
        )
    out.mkdir(parents=True, exist_ok=True)
    _write(path, text)


def _make_files(
    files: list[File], cfg: NeedlesConfig, out: pathlib.Path, workers: int
) -> None:
    if not files:
        return
    job = functools.partial(make_file, cfg=cfg, out=out)
    total = sum(file.seconds for file in files)
    with tqdm(total=total, unit=" frames", unit_scale=True, desc="needles") as bar:
        for seconds in _map(job, files, workers):
            bar.update(seconds)


def _map(job, files: list[File], workers: int) -> Iterator[int]:
    """Results in the order they come; processes only where more than one is wanted."""
    if workers == 1:
        yield from map(job, files)
        return
    with concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_follow_parent,
    ) as pool:
        try:
            for done in concurrent.futures.as_completed(
                [pool.submit(job, file) for file in files]
            ):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leaves Ctrl-C to the parent, and does not outlive it however it ends."""

    def wait_for_end() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait_for_end, daemon=True).start()


def _write_manifests(
    split: str, files: list[File], cfg: NeedlesConfig, out: pathlib.Path
) -> None:
    """Writes a split's questions and timeline, unless they are there."""
    paths = [out / f"{split}.jsonl", out / f"{split}.scenes.jsonl"]
    if all(path.exists() for path in paths):
        return
    asked, timeline = [], []
    for file in files:
        scenes = plan(file, cfg)
        asked += ask(file, scenes, cfg)
        timeline += [
            {"scene": file.scene_id(i), **questions.where(scene, file.path)}
            for i, scene in enumerate(scenes)
        ]
    for path, items in zip(paths, (asked, timeline), strict=True):
        _write(path, "".join(json.dumps(item) + "\n" for item in items))


def _write_glimpses(reels: list[File], cfg: NeedlesConfig, out: pathlib.Path) -> None:
    """Writes the training questions about moments far apart, unless they are there."""
    path = out / f"{GLIMPSES}.jsonl"
    if path.exists():
        return
    reels = [glimpses.Reel(plan(file, cfg), file.path) for file in reels]
    rng = np.random.default_rng([cfg.seed, 3])
    items = []
    while len(items) < cfg.train_glimpses:
        item = glimpses.draw(rng, reels[rng.integers(len(reels))], sources.NAMES)
        if item is not None:
            items.append(item | {"id": f"{GLIMPSES}/{len(items)}"})
    _write(path, "".join(json.dumps(item) + "\n" for item in items))


def _write_dialogues(cfg: NeedlesConfig, out: pathlib.Path) -> None:
    """Writes each training scene's questions as one item, unless they are there."""
    path = out / f"{DIALOGUES}.jsonl"
    if not path.exists():
        rng = np.random.default_rng([cfg.seed, 4])
        items = dialogues.join(rng, read_lines(out / "train.jsonl"))
        _write(path, "".join(json.dumps(item) + "\n" for item in items))


def _train_tokenizer(out: pathlib.Path) -> None:
    """Writes `tokenizer.json`, learnt from the training questions and answers."""
    turns = [
        turn["value"]
        for item in read_lines(out / "train.jsonl")
        for turn in item["conversations"]
    ]
    part = out / ".tokenizer.part.json"
    train_bpe([turn.removeprefix("<image>\n") for turn in turns], VOCABULARY, part)
    part.replace(out / "tokenizer.json")


def _write(path: pathlib.Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The items of a JSONL file of this data set."""
    if not path.is_file():
        raise ValueError(
            f"There is no {path}; make it with "
            f"`python -m timeviper_jax.data.needles --out {path.parent}`."
        )
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def describe(out: pathlib.Path) -> str:
    """A table of what a data directory holds: files, scenes, questions by kind."""
    head = ("split", "seconds", "scenes", *questions.KINDS)
    rows = [head]
    for split in SPLITS:
        asked = collections.Counter(
            (item["needle"]["frames"], item["needle"]["kind"])
            for item in read_lines(out / f"{split}.jsonl")
        )
        scenes = collections.Counter(
            item["duration"] for item in read_lines(out / f"{split}.scenes.jsonl")
        )
        for length, count in sorted(scenes.items()):
            kinds = [asked[length, kind] for kind in questions.KINDS]
            rows.append((split, length, count, *kinds))
    table = [" ".join(f"{cell!s:>13}" for cell in row) for row in rows]
    videos = list(out.glob("*/*.mp4"))
    size = sum(video.stat().st_size for video in videos) / 1e6
    return "\n".join([f"{out}: {len(videos)} videos, {size:.0f} MB", *table])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=pathlib.Path, help="make the data set here")
    what.add_argument("--describe", type=pathlib.Path, help="say what is there")
    what.add_argument("--file", type=pathlib.Path, help="make one video by hand")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--scale", type=float, default=1.0, help="times all counts")
    handmade.add_flags(parser.add_argument_group("with --file"))
    _add_flags(parser.add_argument_group("with --out"), NeedlesConfig())
    return parser


def _add_flags(group: argparse._ArgumentGroup, defaults: Any) -> None:
    """A flag for each field of the configs; those not given stay out of the result."""
    for field in dataclasses.fields(defaults):
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            _add_flags(group, value)
            continue
        many = dict(nargs=len(value)) if isinstance(value, tuple) else {}
        kind = type(value[0] if many else value)
        text = f"default {' '.join(map(str, value)) if many else value}"
        flag = f"--{field.name}"
        group.add_argument(
            flag, type=kind, help=text, default=argparse.SUPPRESS, **many
        )


def _override(defaults: Any, flags: dict[str, Any]) -> Any:
    """The config with the given flags in it, in its nested configs too."""
    changes = {}
    for field in dataclasses.fields(defaults):
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _override(value, flags)
        elif field.name in flags:
            given = flags[field.name]
            changes[field.name] = tuple(given) if isinstance(given, list) else given
    return dataclasses.replace(defaults, **changes)


def _run(args: argparse.Namespace) -> str:
    if args.file:
        return handmade.run(args, _override(NeedlesConfig(), vars(args)).video)
    if args.out:
        cfg = _override(NeedlesConfig().scaled(args.scale), vars(args))
        make(args.out, cfg, args.workers)
    return describe(args.out or args.describe)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    try:
        print(_run(args))
    except (sources.SourceError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("Stopped; the same command goes on from here.") from None


if __name__ == "__main__":
    main(sys.argv[1:])
