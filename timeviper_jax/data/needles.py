r"""Makes the needle data: long videos in which photographs appear, and questions.

python -m timeviper_jax.data.needles --out data/needles
python -m timeviper_jax.data.needles --out data/small --scale 0.05 --seed 1
python -m timeviper_jax.data.needles --describe data/needles

A video of your own, with the photographs and times you choose:

python -m timeviper_jax.data.needles --file out.mp4 --length 60 \
    --clip my.mp4 --needle photo.png@12-17 --needle cat@40-44

The data directory then holds, for each split, the videos, `SPLIT.jsonl` (one
question a line) and `SPLIT.scenes.jsonl` (one scene a line: what is shown when).
"""

import argparse
import collections
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from timeviper_jax.data import needle_questions as questions
from timeviper_jax.data import needle_render as render
from timeviper_jax.data import needle_sources as sources
from timeviper_jax.data.needle_scenes import Scene, SceneConfig, Showing, draw_scene
from timeviper_jax.data.tokenizer import train_bpe


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedlesConfig:
    """What is made. Counts are of scenes, except where a name says files."""

    seed: int = 0
    reel: int = 10_240  # Seconds in one training file of many scenes.
    train_32: int = 2_560  # In reels.
    train_512: int = 100  # In reels.
    train_files_32: int = 200  # Files of one scene each.
    heldout_32: int = 220
    heldout_512: int = 116
    heldout_2048: int = 24
    heldout_10240: int = 4
    heldout_views_32: int = 220
    scenes: SceneConfig = SceneConfig()
    video: render.RenderConfig = render.RenderConfig()

    def scaled(self, scale: float) -> "NeedlesConfig":
        """The same data set with all counts multiplied, none of them below one."""
        counts = {
            field.name: max(1, round(getattr(self, field.name) * scale))
            for field in dataclasses.fields(self)
            if field.name.startswith(tuple(SPLITS))
        }
        return dataclasses.replace(self, **counts)


SPLITS = ("train", "heldout", "heldout_views")
VOCABULARY = 512
TIME_PROMPT = (
    "The video lasts for {} seconds, and {} frames are uniformly sampled from it."
)


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


def _reels(length: int, scenes: int, reel: int) -> Iterator[tuple[int, ...]]:
    """Scenes of one length, as many a file as fit into `reel` seconds."""
    per_file = max(1, reel // length)
    while scenes > 0:
        yield (length,) * min(per_file, scenes)
        scenes -= per_file


def list_files(cfg: NeedlesConfig) -> list[File]:
    """Every file of the data set."""
    named = [
        ("train", f"reel{length:05d}", lengths)
        for length, scenes in ((32, cfg.train_32), (512, cfg.train_512))
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
        named += [(split, f"scene{length:05d}", (length,))] * count
    numbers, in_split = collections.Counter(), collections.Counter()
    files = []
    for split, stem, lengths in named:
        name = f"{stem}_{numbers[split, stem]:04d}"
        number = in_split[split]
        files.append(File(split=split, name=name, number=number, lengths=lengths))
        numbers[split, stem] += 1
        in_split[split] += 1
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


def ask(file: File, cfg: NeedlesConfig) -> Iterator[dict[str, Any]]:
    """The manifest's items for a file, one a question."""
    for i, scene in enumerate(plan(file, cfg)):
        asked = questions.ask(_rng(cfg, file, i, 1), scene, sources.NAMES, cfg.scenes)
        for j, question in enumerate(asked):
            yield manifest_item(file.split, file.path, i, j, scene, question)


def manifest_item(
    split: str,
    path: str,
    scene_number: int,
    number: int,
    scene: Scene,
    question: questions.Question,
) -> dict[str, Any]:
    """One question in the conversation format; `needle` is for evaluation only."""
    about = question.about
    scene_id = f"{path.removesuffix('.mp4')}/{scene_number}"
    return {
        "id": f"{scene_id}/{number}",
        "image": path,
        "video_start": scene.start,
        "video_end": scene.stop,
        "duration": scene.length,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ],
        "needle": {
            "kind": question.kind,
            "frames": scene.length,
            "depth": ((about.start + about.stop) / 2 - scene.start) / scene.length,
            "objects": [dataclasses.astuple(s) for s in scene.showings],
            "span": [about.start, about.stop],
            "scene": scene_id,
            "split": split,
        },
    }


def _scene_item(file: File, number: int, scene: Scene) -> dict[str, Any]:
    return {
        "scene": f"{file.path.removesuffix('.mp4')}/{number}",
        "image": file.path,
        "video_start": scene.start,
        "video_end": scene.stop,
        "objects": [dataclasses.astuple(s) for s in scene.showings],
    }


def make_file(file: File, cfg: NeedlesConfig, out: pathlib.Path) -> int:
    """Renders and encodes one file; returns its seconds."""
    half = "train" if file.split == "train" else "heldout"
    pool = sources.haystack(cfg.seed, half, cfg.video.shots, cfg.video.size)
    view = sources.VIEWS[file.split]

    def look(showing: Showing) -> tuple[Image.Image, sources.View]:
        return sources.photo(showing.name), view

    blocks = (
        render.render_scene(_rng(cfg, file, i, 2), scene, pool, look, cfg.video)
        for i, scene in enumerate(plan(file, cfg))
    )
    render.encode(out / file.path, blocks, cfg.video)
    return file.seconds


def _write(path: pathlib.Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _write_lines(path: pathlib.Path, items: Sequence[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(item) + "\n" for item in items))


def _check_config(out: pathlib.Path, cfg: NeedlesConfig) -> None:
    """Refuses to mix two data sets in one directory."""
    path = out / "config.json"
    text = json.dumps(dataclasses.asdict(cfg), indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise SystemExit(
            f"{out} holds data made with other settings (see {path}); "
            "use another --out, or remove it."
        )
    out.mkdir(parents=True, exist_ok=True)
    _write(path, text)


def make(out: pathlib.Path, cfg: NeedlesConfig, workers: int) -> None:
    """Makes the data set in `out`, or what is missing of it."""
    sources.check_sources()
    _check_config(out, cfg)
    files = list_files(cfg)
    missing = [file for file in files if not (out / file.path).exists()]
    missing.sort(key=lambda file: -file.seconds)  # Long ones first: no lone straggler.
    if missing:
        _make_files(missing, cfg, out, workers)
    for split in SPLITS:
        mine = [file for file in files if file.split == split]
        items = [item for file in mine for item in ask(file, cfg)]
        _write_lines(out / f"{split}.jsonl", items)
        scenes = [
            _scene_item(file, i, scene)
            for file in mine
            for i, scene in enumerate(plan(file, cfg))
        ]
        _write_lines(out / f"{split}.scenes.jsonl", scenes)
        if split == "train":
            _train_tokenizer(out, items)


def _train_tokenizer(out: pathlib.Path, items: Sequence[dict[str, Any]]) -> None:
    """Writes `tokenizer.json`, learnt from the training questions and answers."""
    turns = [turn["value"] for item in items for turn in item["conversations"]]
    texts = [text.removeprefix("<image>\n") for text in turns]
    part = out / ".tokenizer.part.json"
    train_bpe([*texts, TIME_PROMPT], VOCABULARY, part)
    part.replace(out / "tokenizer.json")


def _make_files(
    files: list[File], cfg: NeedlesConfig, out: pathlib.Path, workers: int
) -> None:
    job = functools.partial(make_file, cfg=cfg, out=out)
    total = sum(file.seconds for file in files)
    with (
        tqdm(total=total, unit=" frames", unit_scale=True, desc="needles") as bar,
        multiprocessing.get_context("spawn").Pool(workers) as pool,
    ):
        for seconds in pool.imap_unordered(job, files):
            bar.update(seconds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    make(args.out, NeedlesConfig(seed=args.seed).scaled(args.scale), args.workers)


if __name__ == "__main__":
    main(sys.argv[1:])
