"""Questions about a scene, and their answers, drawn so that only looking helps.

Options, their order, the order of mention and which end of the scene is asked for
are all uniform; the answers to "how many" are as often 1 as 2 as 3.
"""

import dataclasses
from typing import Any

import numpy as np

from timeviper_jax.data.needle_scenes import Scene, SceneConfig, Showing

KINDS = ("mcq", "what", "when", "first", "count")
OPTIONS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One question; `about` is the showing whose depth and span it is filed under."""

    kind: str
    text: str
    answer: str
    about: Showing


def time_text(seconds: int) -> str:
    """Five digits, so that every time has the same number of tokens."""
    return f"{seconds:05d}"


def span_text(showing: Showing) -> str:
    return f"{time_text(showing.start)} to {time_text(showing.stop)}"


def _mcq(rng: np.random.Generator, about: Showing, absent: list[str]) -> Question:
    """Four options, in any order, of which exactly one is in the scene."""
    options = [str(name) for name in rng.choice(absent, OPTIONS - 1, replace=False)]
    options.insert(int(rng.integers(OPTIONS)), about.name)
    *others, last = options
    text = f"Which is shown, {', '.join(others)} or {last}?"
    return Question(kind="mcq", text=text, answer=about.name, about=about)


def _what(scene: Scene, end: str) -> Question:
    about = scene.showings[0 if end == "first" else -1]
    text = f"What is shown {end}?"
    return Question(kind="what", text=text, answer=about.name, about=about)


def _when(about: Showing) -> Question:
    text = f"When is the {about.name} shown?"
    return Question(kind="when", text=text, answer=span_text(about), about=about)


def _first(rng: np.random.Generator, pair: tuple[Showing, Showing]) -> Question:
    one, other = (pair[i] for i in rng.permutation(2))
    about = min(pair, key=lambda showing: showing.start)
    text = f"Which is shown first, the {one.name} or the {other.name}?"
    return Question(kind="first", text=text, answer=about.name, about=about)


def _count(scene: Scene, about: Showing) -> Question:
    times = sum(showing.name == about.name for showing in scene.showings)
    text = f"How many times is the {about.name} shown?"
    return Question(kind="count", text=text, answer=str(times), about=about)


def _counts(rng: np.random.Generator, scene: Scene, cfg: SceneConfig) -> list[Question]:
    """Questions "how many" whose answers 1, 2 and 3 are equally frequent.

    A repeated object is always asked for, which gives 2 and 3 a share of repeat / 2
    each. Single objects make up the same share: a quarter of the time beside a
    repeated one, so that a repeat in sight does not exclude the answer 1, and the
    rest in the other scenes.
    """
    repeated = [s for s in scene.showings if s not in scene.once]
    beside = 0.25
    if repeated:
        share = beside
    else:
        share = cfg.repeat * (0.5 - beside) / (1 - cfg.repeat)
    questions = [_count(scene, repeated[0])] if repeated else []
    if scene.once and rng.random() < share:
        questions.append(_count(scene, scene.once[rng.integers(len(scene.once))]))
    return questions


def ask(
    rng: np.random.Generator, scene: Scene, names: tuple[str, ...], cfg: SceneConfig
) -> list[Question]:
    """All questions of one scene: "mcq" and "when" for each object shown once."""
    questions = []
    present = {showing.name for showing in scene.showings}
    absent = [name for name in names if name not in present]
    if len(absent) >= OPTIONS - 1:
        questions += [_mcq(rng, about, absent) for about in scene.once]
    if scene.showings:
        questions += [_what(scene, "first"), _what(scene, "last")]
    questions += [_when(about) for about in scene.once]
    if len(scene.once) > 1:
        one, other = rng.choice(len(scene.once), 2, replace=False)
        questions.append(_first(rng, (scene.once[one], scene.once[other])))
    return questions + _counts(rng, scene, cfg)


def ask_one(
    rng: np.random.Generator, scene: Scene, kind: str, names: tuple[str, ...]
) -> Question | None:
    """A question of one kind, or None if this scene has none."""
    of_kind = [q for q in ask(rng, scene, names, SceneConfig()) if q.kind == kind]
    return of_kind[rng.integers(len(of_kind))] if of_kind else None


def where(scene: Scene, image: str) -> dict[str, Any]:
    """A scene as a line of JSON; `image` is the video, as manifests call it."""
    return {
        "image": image,
        "video_start": scene.start,
        "video_end": scene.stop,
        "duration": scene.length,
        "objects": [dataclasses.astuple(showing) for showing in scene.showings],
    }


def item(scene: Scene, question: Question, image: str) -> dict[str, Any]:
    """A line of the manifest; `needle` is for sorting results, not for the model."""
    place = where(scene, image)
    objects, about = place.pop("objects"), question.about
    return place | {
        "conversations": [
            {"from": "human", "value": f"<image>\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ],
        "needle": {
            "kind": question.kind,
            "frames": scene.length,
            "depth": ((about.start + about.stop) / 2 - scene.start) / scene.length,
            "objects": objects,
            "span": [about.start, about.stop],
        },
    }
