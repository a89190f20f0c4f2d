"""A page about one question and one video: one file, which needs nothing else."""

import base64
import dataclasses
import html
import io
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float64
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from timeviper_jax.analysis import plots
from timeviper_jax.analysis.plots import Thumbnails
from timeviper_jax.analysis.reading import LayerReading, Reading

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem; color: #1b1b1b; background: #fff }
h2 { font-size: 1.1rem; border-top: 1px solid #ccc; padding-top: 1rem }
img { max-width: 100% } figure { margin: 0 0 1rem }
.pair { display: flex; flex-wrap: wrap; gap: 0 1rem }
figcaption { color: #555 } dt { color: #555 } dd { margin: 0 0 .5rem }
"""
_MAPS = (
    "Who takes (down) of what (across): the sum over a region's tokens, for the mean"
    " token of each region and the mean head."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What the page is about."""

    video: str
    question: str
    answer: str
    workdir: str
    pattern: str
    tokens_per_frame: int
    times: Float64[np.ndarray, "F"]
    thumbnails: Thumbnails


def write(
    path: pathlib.Path,
    about: About,
    reading: Reading,
    pictures: Sequence[pathlib.Path] = (),
) -> None:
    """Everything that was read, and `pictures` (PNG files) that were made elsewhere."""
    title = html.escape(f"{pathlib.Path(about.video).name}: {about.question}")
    body = "".join(_sections(about, reading, pictures))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "<!DOCTYPE html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        # An icon of its own, so that a browser asks for none.
        '<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
        f"{body}</body></html>\n",
        encoding="utf-8",
    )


def _sections(
    about: About, reading: Reading, pictures: Sequence[pathlib.Path]
) -> Iterator[str]:
    facts = {
        "asked": about.question,
        "answered": about.answer,
        "video": f"{about.video}, {len(about.times)} frames",
        "model": f"{about.workdir}, layers {about.pattern}",
    }
    listed = "".join(
        f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items()
    )
    yield f'<dl>{listed}</dl>\n<h2>By layer</h2>\n<div class="pair">\n'
    for name in ("instruction", "answer"):
        if name in reading.regions.names:
            yield _figure(_shares(about, reading, name))
    yield "</div>\n<h2>Frames that the last tokens read</h2>\n"
    for number, name in enumerate(reading.reader_names):
        yield _figure(_reader(about, reading, number, name))
    if reading.kept:
        yield "<h2>What TransV keeps</h2>\n"
        yield _figure(
            plots.kept_tokens(
                [*reading.kept.values()],
                [*reading.kept],
                about.tokens_per_frame,
                about.thumbnails,
                about.times,
            )
        )
    yield f"<h2>Maps</h2>\n<p>{_MAPS}</p>\n"
    for layer in reading.layers:
        figures = "".join(map(_figure, _maps(about, reading, layer)))
        yield f'<div class="pair">{figures}</div>\n'
    if pictures:
        yield "<h2>Measured on many questions</h2>\n"
    for picture in pictures:
        yield _image(picture.read_bytes(), picture.name)


def _shares(about: About, reading: Reading, name: str) -> Figure:
    """How a region's magnitudes divide among text before, vision, instruction, answer.

    Of the answer what it takes of itself is a part, of the instruction likewise.
    """
    row = reading.regions.names.index(name)
    sizes = np.stack([layer.sizes[row] for layer in reading.layers])
    sizes = sizes / np.maximum(sizes.sum(axis=1, keepdims=True), 1e-30)
    groups = reading.regions.groups
    parts = {
        "system": sizes[:, 0],
        "vision": sizes[:, groups].sum(axis=1),
        "instruction": sizes[:, groups.stop],
        "answer": sizes[:, groups.stop + 1],
    }
    return plots.shares(
        parts,
        [layer.layer for layer in reading.layers],
        about.pattern,
        f"What the {name}'s tokens take of (of magnitudes)",
    )


def _reader(about: About, reading: Reading, number: int, name: str) -> Figure:
    names = [f"{layer.layer} {layer.kind}" for layer in reading.layers]
    return plots.frame_rows(
        np.stack([layer.readers[number] for layer in reading.layers]),
        names,
        about.thumbnails,
        f"{name[0].upper()}{name[1:]}: what each layer takes of each frame",
        about.times,
    )


def _maps(about: About, reading: Reading, layer: LayerReading) -> Iterator[Figure]:
    name = f"Layer {layer.layer}, {layer.kind}"
    maps = {name: layer.regions}
    if layer.undriven is not None:
        maps = {f"{name}, with dt": layer.regions, f"{name}, without": layer.undriven}
    for title, values in maps.items():
        yield plots.region_map(
            values,
            reading.regions.names,
            reading.regions.groups,
            len(about.times),
            about.thumbnails,
            title,
        )


def _figure(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=plots.DPI)
    plt.close(figure)
    return _image(buffer.getvalue(), "")


def _image(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="" src="data:image/png;base64,{data}">{below}</figure>\n'
