"""One item of a manifest: checked field by field, and made an `Item`."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from timeviper_jax.data import untrusted
from timeviper_jax.data.items import MARKER, Dataset, Item
from timeviper_jax.data.manifest_rules import (
    ManifestError,
    ManifestLimits,
    as_seconds,
    as_text,
    check_keys,
    is_label,
    refusing,
)
from timeviper_jax.data.untrusted import Root, shown
from timeviper_jax.data.video import Number

_SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}

_ITEM_KEYS = {
    *("id", "image", "conversations", "caption"),
    *("duration", "video_start", "video_end", "frame_times"),
    "needle",  # What the evaluation of the needle data wants to know; see `Item.notes`.
}


def parse_item(
    raw: Any, dataset: Dataset, root: Root, limits: ManifestLimits, where: str
) -> Item:
    """Raises `ManifestError`, which begins with `where`, for what is no item."""
    check_keys(raw, _ITEM_KEYS, where)
    if not _is_id(raw.get("id")):
        raise ManifestError(f"{where}: id is {shown(raw['id'])}; give a short name.")
    name = where if raw.get("id") is None else str(raw["id"])
    where = f"{where} (id {raw.get('id')!r})"
    media = _media(raw.get("image", ""), dataset, root, limits, f"{where}: image")
    if dataset.kind == "caption":
        caption = as_text(raw.get("caption"), limits, f"{where}: caption")
        conversation = (("assistant", caption),)
    else:
        conversation = tuple(_conversation(raw.get("conversations"), limits, where))
        _check_markers(conversation, len(media), where)
    start, end = _window(raw, where)
    notes = raw.get("needle")
    if notes is not None and not isinstance(notes, dict):
        raise ManifestError(f"{where}: needle is {shown(notes)}; give a mapping.")
    return Item(
        id=name,
        dataset=dataset,
        media=media,
        conversation=conversation,
        duration=as_seconds(raw.get("duration"), f"{where}: duration"),
        start=start,
        end=end,
        frame_times=_times(raw.get("frame_times"), limits, f"{where}: frame_times"),
        notes=notes,
    )


def _is_id(value: Any) -> bool:
    number = isinstance(value, int) and untrusted.is_number(value)
    return value is None or number or (isinstance(value, str) and is_label(value))


def _media(
    value: Any, dataset: Dataset, root: Root, limits: ManifestLimits, where: str
) -> tuple[str, ...]:
    """The paths that `value` names, below the data set's folder, and allowed URLs."""
    names = [name.strip() for name in as_text(value, limits, where).split(" | ")]
    names = [name for name in names if name]
    if len(names) > limits.max_media:
        raise ManifestError(
            f"{where}: {len(names)} media, but the limit is {limits.max_media}."
        )
    paths = []
    for name in names:
        with refusing(f"{where}: {name!r:.120}"):
            if untrusted.is_url(name):
                untrusted.check_url(name, limits.urls)
                paths.append(name)
                continue
            untrusted.check_name(name)
            paths.append(str(pathlib.Path(dataset.data_path) / name))
            root.check(paths[-1])
    return tuple(paths)


def _conversation(
    raw: Any, limits: ManifestLimits, where: str
) -> Iterator[tuple[str, str]]:
    """Speakers and texts: perhaps the system, then questions and answers in turn."""
    if not isinstance(raw, list) or not raw:
        raise ManifestError(f"{where}: 'conversations' is no list of turns.")
    if len(raw) > limits.max_turns:
        raise ManifestError(
            f"{where}: {len(raw)} turns, but the limit is {limits.max_turns}."
        )
    expected = ("user", "system")
    for number, turn in enumerate(raw):
        place = f"{where}: turn {number}"
        check_keys(turn, {"from", "value"}, place)
        given = turn.get("from")
        speaker = _SPEAKERS.get(given) if isinstance(given, str) else None
        if speaker not in expected:
            raise ManifestError(
                f"{place}: from={shown(given)}, but human and gpt must take"
                " turns, human first (after system, if any)."
            )
        expected = ("assistant",) if speaker == "user" else ("user",)
        yield speaker, as_text(turn.get("value"), limits, f"{place}: value")
    if speaker != "assistant":
        raise ManifestError(f"{where}: the last turn is no answer; end with gpt's.")


def _check_markers(
    conversation: Sequence[tuple[str, str]], num_media: int, where: str
) -> None:
    markers = sum(len(MARKER.findall(text)) for _, text in conversation)
    if markers not in {0, num_media} and not (markers == 1 and num_media):
        raise ManifestError(
            f"{where}: {markers} <image> markers for {num_media} media; give as many,"
            " or one for all, or none (the media come first)."
        )


def _window(raw: Mapping[str, Any], where: str) -> tuple[Number | None, Number | None]:
    start = as_seconds(raw.get("video_start"), f"{where}: video_start")
    end = as_seconds(raw.get("video_end"), f"{where}: video_end")
    if end is not None and not (start or 0) < end:
        raise ManifestError(f"{where}: the window from {start} to {end} s is empty.")
    return start, end


def _times(raw: Any, limits: ManifestLimits, where: str) -> tuple[Number, ...] | None:
    if raw is None:
        return None
    if not isinstance(raw, list) or not 0 < len(raw) <= limits.max_frames:
        raise ManifestError(
            f"{where} is {shown(raw)}; give a list of at most {limits.max_frames}"
            " seconds."
        )
    times = tuple(as_seconds(value, where) for value in raw)
    if None in times or list(times) != sorted(times):
        raise ManifestError(f"{where} is {shown(raw)}; give rising seconds.")
    return times
