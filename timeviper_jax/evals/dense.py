"""Scores of dense captions: what happens in a video, and when.

Detection and captions are scored as in https://github.com/ranjaykrishna/densevid_eval:
at overlaps above each threshold, within a video. SODA_c follows
https://github.com/fujiso/SODA (ECCV 2020): one order-keeping matching of all events.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64

from timeviper_jax.evals.cider import cider, words
from timeviper_jax.evals.spans import Event, Span, span_overlap

THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
# Nothing that a caption says, so that a span without a true event earns nothing.
_GARBAGE = "qxzjvkqxzjvk"

# Captions and their references to a score for all and for each: a `Meteor`.
Similarity = Callable[[Sequence[str], Sequence[Sequence[str]]], tuple[float, list]]


def score_events(
    given: Sequence[Event], true: Sequence[Event], meteor: Similarity | None
) -> dict[str, float]:
    """F1 at each overlap and over all, CIDEr, and with `meteor` METEOR and SODA_c."""
    given = [Event(event.span, words(event.text)) for event in given]
    true = [Event(event.span, words(event.text)) for event in true]
    spans = [event.span for event in given], [event.span for event in true]
    scores = detection(overlaps(*spans))
    scores["CIDEr"] = _over_thresholds(given, true, lambda *a: np.mean(cider(*a)))
    if meteor is not None:
        scores["METEOR"] = _over_thresholds(given, true, lambda *a: meteor(*a)[0])
        scores["SODA_c"] = score_story(given, true, meteor)
    return {name: float(score) for name, score in scores.items()}


def overlaps(given: Sequence[Span], true: Sequence[Span]) -> Float64[np.ndarray, "P T"]:
    """Intersection over union of each given span with each true one."""
    table = [[span_overlap(one, other) for other in true] for one in given]
    return np.array(table, np.float64).reshape(len(given), len(true))


def detection(overlap: Float64[np.ndarray, "P T"]) -> dict[str, float]:
    """Precision, recall and F1 at each threshold, and "F1" of their means."""
    scores, means = {}, np.zeros(2)
    for low in THRESHOLDS:
        hits = overlap > low
        precision = hits.any(1).mean() if len(overlap) else 0.0
        recall = hits.any(0).mean() if overlap.size else 0.0
        means += np.array([precision, recall]) / len(THRESHOLDS)
        scores[f"precision {low}"], scores[f"recall {low}"] = precision, recall
        scores[f"F1 {low}"] = _harmonic(precision, recall)
    return scores | {"F1": _harmonic(*means)}


def _over_thresholds(
    given: Sequence[Event], true: Sequence[Event], score: Callable
) -> float:
    """The mean over thresholds of captions paired with the true ones they overlap."""
    if not given:
        return 0.0
    scores = []
    for low in THRESHOLDS:
        pairs = [
            (event.text, [text])
            for event in given
            for text in _overlapping(event, true, low) or [_GARBAGE]
        ]
        scores.append(score(*map(list, zip(*pairs, strict=True))))
    return float(np.mean(np.nan_to_num(scores)))


def _overlapping(event: Event, true: Sequence[Event], low: float) -> list[str]:
    return [other.text for other in true if span_overlap(event.span, other.span) > low]


def score_story(
    given: Sequence[Event], true: Sequence[Event], meteor: Similarity
) -> float:
    """SODA_c of one video."""
    if not given or not true:
        return 0.0
    given = sorted(given, key=lambda event: event.span[0])
    overlap = overlaps([e.span for e in given], [e.span for e in true])
    # As its authors call it: the true caption is judged by the given one.
    likeness = [
        meteor([other.text] * len(given), [[event.text] for event in given])[1]
        for other in true
    ]
    return soda(overlap * np.nan_to_num(likeness).T)


def soda(gains: Float64[np.ndarray, "P T"]) -> float:
    """F1 of the pairs, in the order of both stories, that gain the most in all."""
    best = np.zeros((gains.shape[0] + 1, gains.shape[1] + 1))
    for i, row in enumerate(gains):
        for j, gain in enumerate(row):
            best[i + 1, j + 1] = max(best[i, j + 1], best[i + 1, j], best[i, j] + gain)
    precision, recall = best[-1, -1] / np.array(gains.shape)
    return _harmonic(precision, recall)


def _harmonic(precision: float, recall: float) -> float:
    both = precision + recall
    return float(2 * precision * recall / both) if both > 0 else 0.0
