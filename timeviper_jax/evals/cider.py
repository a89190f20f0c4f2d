"""CIDEr-D (https://arxiv.org/abs/1411.5726), and the words that captions are made of.

The published numbers of captioning come from https://github.com/tylin/coco-caption,
whose scorer this follows (the clipped and length-penalised variant, by the name CIDEr)
and whose tokenizer is the Penn Treebank's in Java. `words` gives its tokens on English
captions; recordings of both hold it to them.
"""

import collections
import math
import re
from collections.abc import Sequence

_ORDERS = 4  # n-grams of 1 to 4 words.
_SIGMA = 6.0  # Of the Gaussian in the difference of lengths.

_TOKEN = re.compile(
    r"(?:[a-z]\.){2,}"  # i.e., u.s.
    r"|(?:mr|mrs|ms|dr|prof|st|jr|sr|vs|etc)\."
    r"|[a-z]+(?=n't\b)|n't\b"
    r"|o'clock|'n'"
    r"|'(?:s|re|ve|ll|d|m)\b"
    r"|[a-z0-9]+(?:(?:[-/]|(?<=\d)[.,:](?=\d))[a-z0-9]+)*"
    r"|[?!]{2,}"
    r"|[$%&#@+=*<>^~|\\_()\[\]{}]"
)
_PARTED = re.compile(r"\b(can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|gim(?=me\b))")
_BRACKETS = dict(
    zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split(), strict=True)
)


def words(text: str) -> str:
    """A caption in lower case, its words apart and its punctuation gone."""
    text = "".join(c if c.isascii() else " " for c in text).lower()
    text = _PARTED.sub(r"\1 ", text)
    return " ".join(_BRACKETS.get(token, token) for token in _TOKEN.findall(text))


Grams = collections.Counter[tuple[str, ...]]


def cider(given: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10; how rare words are is learnt from all of them.

    Args:
      given: Captions whose words are apart, as `words` leaves them.
      references: For each of them what it should say, in one or more ways.
    """
    if len(given) != len(references):
        raise ValueError(f"{len(given)} captions for {len(references)} references.")
    found = [[_grams(text) for text in texts] for texts in references]
    seen = collections.Counter(
        gram for texts in found for gram in {gram for text in texts for gram in text}
    )
    scores = []
    for caption, texts in zip(map(_grams, given), found, strict=True):
        alike = [_alike(caption, text, seen, len(given)) for text in texts]
        scores.append(10 * sum(alike) / len(alike))
    return scores


def _grams(text: str) -> Grams:
    parts = text.split()
    return collections.Counter(
        tuple(parts[i : i + n])
        for n in range(1, _ORDERS + 1)
        for i in range(len(parts) - n + 1)
    )


def _alike(one: Grams, other: Grams, seen: Grams, documents: int) -> float:
    """The mean over n of clipped cosines, less what lengths differ."""
    lengths = [sum(c for gram, c in g.items() if len(gram) == 2) for g in (one, other)]
    penalty = math.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * _SIGMA**2))
    rarity = lambda gram: math.log(documents) - math.log(max(1, seen[gram]))
    weights = [{gram: c * rarity(gram) for gram, c in g.items()} for g in (one, other)]
    return penalty * sum(_cosine(*weights, n) for n in range(1, _ORDERS + 1)) / _ORDERS


def _cosine(one: dict, other: dict, order: int) -> float:
    one, other = (
        {gram: w for gram, w in g.items() if len(gram) == order} for g in (one, other)
    )
    norms = [math.sqrt(sum(w * w for w in g.values())) for g in (one, other)]
    shared = one.keys() & other.keys()
    dot = sum(min(one[gram], other[gram]) * other[gram] for gram in shared)
    return dot / (norms[0] * norms[1]) if all(norms) else 0.0
