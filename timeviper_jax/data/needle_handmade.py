"""A needle video by hand: your clip, your pictures, the seconds you say."""

import argparse
import json
import pathlib
import re

import numpy as np
from PIL import Image

from timeviper_jax.data import needle_questions as questions
from timeviper_jax.data import needle_render as render
from timeviper_jax.data import needle_sources as sources
from timeviper_jax.data.needle_scenes import Scene, SceneConfig, Showing


def add_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--clip",
        type=pathlib.Path,
        action="append",
        default=[],
        help="what the video is cut from, any number of times (default: our clips)",
    )
    group.add_argument(
        "--needle",
        action="append",
        default=[],
        metavar="PICTURE@START-STOP",
        help=f"a picture file, or one of {', '.join(sources.NAMES)}",
    )
    group.add_argument("--length", type=int, default=60, help="seconds (default 60)")


def run(args: argparse.Namespace, cfg: render.RenderConfig) -> str:
    """Makes the video and, beside it, questions about it; says so."""
    seed = getattr(args, "seed", 0)
    manifest = make_video(args.file, args.clip, args.needle, args.length, seed, cfg)
    return f"Wrote {args.file} and questions about it, {manifest}."


def make_video(
    path: pathlib.Path,
    clips: list[pathlib.Path],
    needles: list[str],
    length: int,
    seed: int,
    cfg: render.RenderConfig,
) -> pathlib.Path:
    """Writes the video and returns the path of its manifest of questions."""
    parsed = [_parse(needle) for needle in needles]
    scene = _scene([showing for showing, _ in parsed], length)
    images = {showing.name: _load(picture) for showing, picture in parsed}
    if len(images) < len({picture for _, picture in parsed}):
        raise ValueError(f"Two pictures of {needles} have one name; rename a file.")
    rng = np.random.default_rng(seed)
    clips = clips or [sources.clip_path(name) for name in sources.CLIPS]
    frames = [sources.load_clip(clip) for clip in clips]
    pool = sources.draw_haystack(rng, frames, cfg.shots, cfg.size)

    def look(showing: Showing) -> tuple[Image.Image, sources.View]:
        return images[showing.name], sources.VIEWS["train"]

    packed = render.render_scene(rng, scene, pool, look, cfg)
    render.encode(path, [packed], cfg)
    names = tuple(sorted({*sources.NAMES, *images}))
    asked = questions.ask(rng, scene, names, SceneConfig())
    items = [questions.item(scene, question, image=path.name) for question in asked]
    for i, item in enumerate(items):
        item["id"] = f"{path.stem}/{i}"
    manifest = path.with_suffix(".jsonl")
    text = "".join(json.dumps(item) + "\n" for item in items)
    manifest.write_text(text, encoding="utf-8")
    return manifest


def _parse(needle: str) -> tuple[Showing, str]:
    """`photo.png@12-17` as a showing and the picture it shows."""
    match = re.fullmatch(r"(.+)@(\d+)-(\d+)", needle)
    if not match:
        raise ValueError(f"{needle!r} is not PICTURE@START-STOP, like cat.png@12-17.")
    picture, start, stop = match[1], int(match[2]), int(match[3])
    if stop <= start:
        raise ValueError(f"{needle!r} stops before it starts.")
    name = pathlib.Path(picture).stem
    return Showing(name=name, start=start, stop=stop), picture


def _load(picture: str) -> Image.Image:
    if picture in sources.PHOTOS and not pathlib.Path(picture).exists():
        return sources.photo(picture)
    return sources.load_photo(pathlib.Path(picture))


def _scene(showings: list[Showing], length: int) -> Scene:
    showings = sorted(showings, key=lambda showing: showing.start)
    for one, other in zip(showings, showings[1:], strict=False):
        if other.start < one.stop:
            raise ValueError(
                f"{one.name} is shown until {one.stop}, but {other.name} from "
                f"{other.start}; one needle at a time."
            )
    if showings and showings[-1].stop > length:
        raise ValueError(
            f"{showings[-1].name} is shown until {showings[-1].stop}, but the video is "
            f"{length} s long; use --length {showings[-1].stop} or more."
        )
    return Scene(start=0, length=length, showings=tuple(showings))
