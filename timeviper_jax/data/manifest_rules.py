"""What a manifest may hold at most, and how what breaks a rule is refused."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from timeviper_jax.data import untrusted
from timeviper_jax.data.untrusted import Refused, shown
from timeviper_jax.data.video import Number

_MOST_SECONDS = 1e9


class ManifestError(ValueError):
    """A manifest that cannot be read as written; names the file, item and reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManifestLimits:
    """The most that a manifest may ask for."""

    max_bytes: int = 1 << 33  # Of a file of items.
    max_items: int = 50_000_000  # Of a data set, repeats counted.
    max_turns: int = 1_000  # Of an item.
    max_chars: int = 1_000_000  # Of a turn.
    max_media: int = 1_000  # Of an item.
    max_frames: int = 100_000  # That an item lists, or a data set asks of each.
    urls: tuple[str, ...] = ()  # What a URL of a medium begins with; none: no URLs.


LIMITS = ManifestLimits()


@contextlib.contextmanager
def refusing(where: str) -> Iterator[None]:
    """Says of what is refused where it stands."""
    try:
        yield
    except Refused as error:
        raise ManifestError(f"{where}: {error}.") from error


def check_keys(raw: Any, known: set[str], where: str) -> None:
    """Raises `ManifestError` unless `raw` is a mapping, and all its keys known."""
    if not isinstance(raw, dict):
        raise ManifestError(f"{where}: not a mapping of keys to values: {shown(raw)}.")
    if unknown := sorted(shown(key) for key in set(raw) - known):
        raise ManifestError(
            f"{where}: unknown [{', '.join(unknown[:10])}]; the keys are"
            f" {sorted(known)}."
        )


def is_label(text: str) -> bool:
    """Whether a text can stand in one line of a log."""
    return len(text) <= 1_000 and text.isprintable()


def as_text(value: Any, limits: ManifestLimits, where: str) -> str:
    """The value, which is Unicode of a length that may be."""
    if not isinstance(value, str):
        raise ManifestError(f"{where} is {shown(value)}; give a text.")
    with refusing(where):
        untrusted.check_text(value, limits.max_chars)
    return value


def as_seconds(value: Any, where: str) -> Number | None:
    """The value, which is a time of a video, or none."""
    if value is not None and not (
        untrusted.is_number(value) and 0 <= value <= _MOST_SECONDS
    ):
        raise ManifestError(f"{where} is {shown(value)}; give seconds from 0 on.")
    return value
