"""Spans of time in answers: read out of text, and compared."""

import re
from typing import NamedTuple

Span = tuple[float, float]

_NUMBER = r"(\d+(?:\.\d+)?)"
# An event begins a line or a sentence, so that "fry for 5 to 10 minutes" is none.
_EVENT = re.compile(
    rf"(?:^|\n|(?<=[.;!?]\s))[ \t]*(?:[-*•]\s+|\d+[.)]\s+)?(?:from\s+)?{_NUMBER}"
    rf"\s*(?:s|sec|seconds)?\s*(?:-|–|to)\s*{_NUMBER}"
    r"[ \t]*(?:(?:seconds|secs|sec|s)\b)?[ \t]*[,:.]?[ \t]*",
    re.IGNORECASE,
)


class Event(NamedTuple):
    """What happens in a span of a video."""

    span: Span
    text: str


def parse_span(text: str) -> Span | None:
    """The last "a to b" in a text, if it has any."""
    spans = re.findall(rf"{_NUMBER}\s*to\s*{_NUMBER}", text)
    if not spans:
        return None
    start, end = spans[-1]
    return float(start), float(end)


def parse_events(text: str) -> list[Event]:
    """The events of a text such as "90 - 102 seconds, spread the butter.", in order.

    One without words is none.
    """
    found = list(_EVENT.finditer(text))
    ends = [*(match.start() for match in found), len(text)][1:]
    events = [
        Event((float(match[1]), float(match[2])), text[match.end() : end].strip())
        for match, end in zip(found, ends, strict=True)
    ]
    return [event for event in events if event.text]


def span_overlap(one: Span | None, other: Span | None) -> float:
    """Intersection over union; nothing overlaps a span that is missing or reversed."""
    if one is None or other is None or one[1] <= one[0] or other[1] <= other[0]:
        return 0.0
    shared = min(one[1], other[1]) - max(one[0], other[0])
    return max(0.0, shared) / (max(one[1], other[1]) - min(one[0], other[0]))
