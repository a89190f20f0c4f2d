"""Dialogues: all questions about a training scene, one after another.

Watching eight minutes costs far more than a question about them, so a long scene is
watched once for all of its questions. Later answers are learned beside earlier ones;
their order is drawn, so that none can count on another.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np


def join(
    rng: np.random.Generator, items: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One item a scene from the manifest's items, which name scenes one by one."""
    for scene, same in itertools.groupby(items, lambda item: item["needle"]["scene"]):
        same = list(same)
        turns = [same[i]["conversations"] for i in rng.permutation(len(same))]
        (opening, answer), *rest = turns
        bare = [[_without_marker(asked), answered] for asked, answered in rest]
        first = same[0]
        yield {
            **{key: first[key] for key in _PLACE},
            "conversations": [opening, answer, *itertools.chain(*bare)],
            "needle": {"dialogue": first["needle"]["frames"], "split": "train"},
            "id": f"dialogue/{scene}",
        }


_PLACE = ("image", "video_start", "video_end", "duration")


def _without_marker(turn: dict[str, str]) -> dict[str, str]:
    return turn | {"value": turn["value"].removeprefix("<image>\n")}
