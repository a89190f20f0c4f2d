"""The kinds of published questions: how each is put, and what an answer is worth."""

import dataclasses
import re
from collections.abc import Callable

from timeviper_jax.data.items import GROUNDING_PROMPT, TIME_PROMPT
from timeviper_jax.evals.dense import Similarity, score_events
from timeviper_jax.evals.entries import Entry, letter
from timeviper_jax.evals.judge import Judge, score_caption
from timeviper_jax.evals.spans import parse_events, parse_span, span_overlap

OVERLAPS = (0.3, 0.5, 0.7)
_CHOICE_PROMPT = (
    "{}\n{}\nPlease provide your answer by stating the letter followed by the full"
    " option."
)
# Most certain first; a letter that begins a word ("A man") is none.
_LETTERS = (
    r"\(?([A-Z])(?:[).:,]|\s*$|\s*\n)",
    r"(?i:answer|option|choice)(?: is)?:? \(?([A-Z])\b(?! [a-z])",
    r"\(([A-Z])\)",
    r"\b([A-Z])[.:)]",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tools:
    """What scoring some answers needs; None: it is not here."""

    judge: Judge | None = None
    meteor: Similarity | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of question.

    `put` makes the prompt of an entry, its number of frames and its seconds; `score`
    weighs an answer; `main` is the metric that stands for the rest.
    """

    put: Callable[[Entry, int, float], str]
    score: Callable[[Entry, str, Tools], dict[str, float]]
    main: str
    prefix: str = ""
    max_tokens: int = 128


def parse_letter(text: str, options: tuple[str, ...]) -> str | None:
    """The letter that an answer settles for; None where it names none, or several.

    `options` begin with their letters; an answer may be an option without its own.
    """
    letters = {letter(i) for i in range(len(options))}
    text = text.strip()
    for i, pattern in enumerate(_LETTERS):
        # What an answer begins with counts there alone; the rest anywhere.
        found = [re.match(pattern, text)] if i == 0 else re.finditer(pattern, text)
        named = {match[1] for match in found if match} & letters
        if named:
            return named.pop() if len(named) == 1 else None
    said = " ".join(text.casefold().strip(" .").split())
    whole = [i for i, option in enumerate(options) if _bare(option) == said]
    return letter(whole[0]) if len(whole) == 1 else None


def _bare(option: str) -> str:
    """An option without its letter, as far as wording goes."""
    text = re.sub(r"^[A-Z][.:)]\s*", "", option)
    return " ".join(text.casefold().strip(" .").split())


def _put_choice(entry: Entry, frames: int, seconds: float) -> str:
    return _CHOICE_PROMPT.format(entry.text, "\n".join(entry.options))


def _score_choice(entry: Entry, given: str, tools: Tools) -> dict[str, float]:
    found = parse_letter(given, entry.options)
    right = found is not None and found == entry.answer
    return {"accuracy": float(right), "unparsed": float(found is None)}


def _put_grounding(entry: Entry, frames: int, seconds: float) -> str:
    question = GROUNDING_PROMPT.format(entry.text)
    return f"{_lasts(frames, seconds)} {question}"


def _score_grounding(entry: Entry, given: str, tools: Tools) -> dict[str, float]:
    found = parse_span(given)
    overlap = span_overlap(found, entry.span)
    recall = {f"R@1 {low}": float(overlap >= low) for low in OVERLAPS}
    return {"mIoU": overlap, **recall, "unparsed": float(found is None)}


def _put_dense(entry: Entry, frames: int, seconds: float) -> str:
    return f"{_lasts(frames, seconds)} {entry.text}"


def _score_dense(entry: Entry, given: str, tools: Tools) -> dict[str, float]:
    events = parse_events(given)
    scores = score_events(events, entry.events, tools.meteor)
    return scores | {"unparsed": float(not events)}


def _put_caption(entry: Entry, frames: int, seconds: float) -> str:
    return entry.text


def _score_caption(entry: Entry, given: str, tools: Tools) -> dict[str, float]:
    if tools.judge is None:
        raise ValueError(
            "VDCScore needs a judge: --judge http://HOST:PORT/v1, or the replies of one"
            " in judge.jsonl of --out."
        )
    return score_caption(given, entry.facts, tools.judge)


def _lasts(frames: int, seconds: float) -> str:
    return TIME_PROMPT.format(f"{round(seconds, 2):.12g}", frames)


CHOICE = Family(
    put=_put_choice, score=_score_choice, main="accuracy", prefix="Best Option: ("
)
GROUNDING = Family(put=_put_grounding, score=_score_grounding, main="mIoU")
DENSE = Family(put=_put_dense, score=_score_dense, main="F1", max_tokens=1024)
CAPTION = Family(
    put=_put_caption, score=_score_caption, main="accuracy", max_tokens=512
)
