"""A page of the worst answers, each with what the model saw: one file, no script."""

import base64
import html
import io
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from timeviper_jax.data.images import Fit
from timeviper_jax.data.video import VideoError, read_frames
from timeviper_jax.evals.base import Question, Record

_FRAMES, _PIXELS = 8, 144
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; color: #1b1b1b; background: #fff }
article { border-top: 1px solid #ccc; padding: 1rem 0 }
h2 { font-size: 1rem; margin: 0 0 .5rem }
figure { display: inline-block; margin: 0 .3rem .3rem 0 }
figcaption { font-size: .75rem; color: #555; text-align: center }
pre { white-space: pre-wrap; font: inherit; margin: .2rem 0 }
dt { color: #555; font-size: .85rem } dd { margin: 0 0 .5rem }
"""


def write(
    path: pathlib.Path,
    title: str,
    table: str,
    questions: Sequence[Question],
    records: Sequence[Record],
    *,
    main: str,
    worst: int,
) -> None:
    """The scores and the `worst` answers by the metric `main`, the lowest first."""
    by_id = {question.id: question for question in questions}
    lowest = sorted(records, key=lambda record: record.scores[main])[:worst]
    articles = "".join(_article(by_id[record.id], record) for record in lowest)
    name = html.escape(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "<!DOCTYPE html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f"<style>{_STYLE}</style></head><body>\n<h1>{name}</h1>\n"
        f'<pre style="font-family: monospace">{html.escape(table)}</pre>\n'
        f"<p>The {len(lowest)} worst of {len(records)} answers.</p>\n"
        f"{articles}</body></html>\n",
        encoding="utf-8",
    )


def _article(question: Question, record: Record) -> str:
    asked = "".join(
        part
        for turn in question.turns
        for part in turn.content
        if isinstance(part, str)
    )
    scores = ", ".join(f"{name} {value:.3g}" for name, value in record.scores.items())
    rows = {
        "asked": asked,
        "answered": question.answer_prefix + record.given,
        "true": record.answer,
        "scores": scores,
        "video": f"{record.video}, {record.frames} frames",
    }
    listed = "".join(
        f"<dt>{name}</dt><dd><pre>{html.escape(text)}</pre></dd>"
        for name, text in rows.items()
    )
    return (
        f"<article><h2>{html.escape(record.id)}</h2>{_strip(question)}"
        f"<dl>{listed}</dl></article>\n"
    )


def _strip(question: Question) -> str:
    """A few of the frames that the model saw, evenly over all of them."""
    count = min(_FRAMES, len(question.times))
    index = np.linspace(0, len(question.times) - 1, count).astype(int)
    times = question.times[index]
    try:
        frames = read_frames(
            question.video, times, Fit(size=_PIXELS, resize="letterbox")
        )
    except VideoError as error:
        return f"<p>{html.escape(str(error))}</p>"
    return "".join(
        f'<figure><img alt="" width="{_PIXELS}" src="{_jpeg(frame)}">'
        f"<figcaption>{time:.1f} s</figcaption></figure>"
        for frame, time in zip(frames, times, strict=True)
    )


def _jpeg(frame: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(
        "ascii"
    )
