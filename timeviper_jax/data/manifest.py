"""Manifests: a YAML list of data sets, each a JSON or JSONL file of items.

    data:
      - name: llava_video
        format: conversation  # Or caption, tvg, dvc; `_packed` lets items share rows.
        json_path: llava_video.jsonl  # Relative to this file.
        data_path: videos
        dataset_type: video
        video_sample_type: fps1  # Or rand, middle.
        max_num_frames_fps: 256

An item is {"id", "image", "conversations"} or {"id", "image", "caption"}. `image`
names media, several as "a.jpg | b.jpg": images, videos, folders of frames. In
conversations each `<image>` stands for the next of them; without any, they all come
first. `video_start` and `video_end` cut a window (seconds) out of each video;
`frame_times` lists the seconds to look at, instead of sampling.

A key that is not known here is an error, so a misspelt one never goes unnoticed.
A manifest may be a stranger's: it is held to `ManifestLimits`, and everything that it
names lies, links followed, in its own folder, or in the `root` that the reader names.
"""

import contextlib
import dataclasses
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from timeviper_jax.data import untrusted
from timeviper_jax.data.conversation import Media, Turn
from timeviper_jax.data.untrusted import Refused, Root, shown
from timeviper_jax.data.video import Number, fps_times, sample_times

FORMATS = ("caption", "conversation", "tvg", "dvc")
TIME_PROMPT = (
    "The video lasts for {} seconds, and {} frames are uniformly sampled from it."
)
GROUNDING_PROMPT = (
    "When does this happen in the video: '{}'? Answer with the start and the end in"
    " seconds, as 'start to end'."
)
CAPTION_PROMPTS = (
    "Describe the {}.",
    "What does the {} show?",
    "Say what can be seen in the {}.",
    "Give a caption for the {}.",
)
# A newline beside a marker belongs to it: media and text have no separator.
_MARKER = re.compile(r"\n?<image>\n?")
_SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}


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


LIMITS = ManifestLimits()
_MANIFEST_BYTES = 1 << 22  # Of the list of data sets.
_MOST_SECONDS = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which moments of a video become frames."""

    kind: str = (
        "fps"  # fps, or a number of spans with frames in their `middle`, `rand`.
    )
    fps: Number = 1
    num_frames: int | None = None  # None: one for each 1 / fps seconds.
    max_frames: int = 256
    min_frames: int = 1

    def times(
        self,
        start: Number,
        end: Number,
        rng: np.random.Generator,
        *,
        capacity: int,
    ) -> np.ndarray:
        """Ascending seconds between `start` and `end`, at most `capacity` of them."""
        if self.num_frames is not None:
            times = sample_times(end, self.num_frames, start=start)
        else:
            most = min(self.max_frames, capacity)
            least = min(self.min_frames, most)
            times = fps_times(end, self.fps, most, least, start=start)
        if self.kind == "rand":
            times = times + rng.uniform(-0.5, 0.5, len(times)) * (
                (end - start) / len(times)
            )
        return times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """One entry of a manifest."""

    name: str
    format: str
    json_path: str
    data_path: str = "."
    split: str = "train"
    dataset_type: str = "video"  # Or image; names the medium in caption prompts.
    pack_size: int = 1  # Items that may share a row; the format says `_packed`.
    max_size: int | None = None  # Use at most this many items.
    sample_ratio: Number = 1  # Share of the items used; over 1 repeats them.
    max_txt_seq_len: int | None = None  # Items with more text tokens are skipped.
    use_template: bool = True  # For tvg: wrap the query in a question.
    video_sample_type: str = "fps1"
    video_num_frames: int | str = "auto"
    max_num_frames_fps: int = 256
    min_num_frames_fps: int = 1

    @property
    def kind(self) -> str:
        return self.format.removesuffix("_packed")

    @property
    def sampling(self) -> Sampling:
        kind, fps = self.video_sample_type, 1
        if kind.startswith("fps"):
            kind, fps = "fps", float(kind.removeprefix("fps"))
        fixed = self.video_num_frames != "auto"
        return Sampling(
            kind=kind,
            fps=fps,
            num_frames=self.video_num_frames if fixed else None,
            max_frames=self.max_num_frames_fps,
            min_frames=self.min_num_frames_fps,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One sample as it stands in a manifest, its media still files."""

    id: str
    dataset: Dataset
    media: tuple[str, ...]  # Paths.
    conversation: tuple[tuple[str, str], ...]  # Speaker and text with markers.
    duration: Number | None = None
    start: Number | None = None
    end: Number | None = None
    frame_times: tuple[Number, ...] | None = None
    notes: Mapping[str, Any] | None = None  # What evaluation wants to know.

    def turns(
        self, num_frames: Sequence[int], seconds: Number, rng: np.random.Generator
    ) -> list[Turn]:
        """The conversation, once each medium's frames and the length are known."""
        kind = self.dataset.kind
        if kind == "caption":
            prompt = CAPTION_PROMPTS[rng.integers(len(CAPTION_PROMPTS))]
            question = prompt.format(self.dataset.dataset_type)
            return [
                Turn("user", (*map(Media, num_frames), question)),
                Turn("assistant", (self.conversation[0][1],)),
            ]
        turns = _place_media(self.conversation, num_frames)
        if kind in ("tvg", "dvc"):
            lasts = round(self.duration or seconds, 2)
            times = TIME_PROMPT.format(f"{lasts:.12g}", sum(num_frames))
            turns = list(self._with_times(turns, times))
        return turns

    def _with_times(self, turns: Sequence[Turn], times: str) -> Iterator[Turn]:
        """Says how long the video is, after the media of the first question."""
        said = False
        for turn in turns:
            if turn.speaker != "user" or said:
                yield turn
                continue
            said = True
            media = tuple(part for part in turn.content if isinstance(part, Media))
            text = "".join(part for part in turn.content if isinstance(part, str))
            if self.dataset.kind == "tvg" and self.dataset.use_template:
                text = GROUNDING_PROMPT.format(text)
            yield Turn("user", (*media, f"{times} {text}"))


def load(
    path: str | pathlib.Path,
    split: str,
    *,
    root: str = "",
    limits: ManifestLimits = LIMITS,
) -> list[Item]:
    """The items of every data set of `split`, in the manifest's order.

    Files are read below `root` only; without one, below the manifest's own folder.
    """
    path = pathlib.Path(path)
    with _refusing(f"{path}"):
        spec = untrusted.parse_yaml(untrusted.read_text(path, _MANIFEST_BYTES))
    if (
        not isinstance(spec, dict)
        or set(spec) != {"data"}
        or not isinstance(spec["data"], list)
    ):
        raise ManifestError(f"{path}: write the data sets as a list under 'data:'.")
    inside = Root(root or path.parent)
    datasets = [
        _dataset(entry, path, inside, limits, f"{path}: data set {i}", bool(root))
        for i, entry in enumerate(spec["data"])
    ]
    items = [
        item
        for dataset in datasets
        if dataset.split == split
        for item in read(dataset, inside, limits)
    ]
    if not items:
        splits = sorted({dataset.split for dataset in datasets})
        raise ManifestError(f"{path}: no items of split {split!r}; it has {splits}.")
    return items


@contextlib.contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Says of what is refused where it stands."""
    try:
        yield
    except Refused as error:
        raise ManifestError(f"{where}: {error}.") from error


def select(
    items: Sequence[Item], where: Sequence[tuple[str, Sequence[Any]]]
) -> list[Item]:
    """The items whose notes have, for every key named, one of the values given."""
    chosen = [
        item
        for item in items
        if all((item.notes or {}).get(key) in values for key, values in where)
    ]
    if not chosen:
        raise ManifestError(f"None of {len(items)} items has notes that fit {where}.")
    return chosen


def read(dataset: Dataset, root: Root, limits: ManifestLimits = LIMITS) -> list[Item]:
    """The items of one data set, as many and as often as it asks for."""
    path = pathlib.Path(dataset.json_path)
    items = [
        _item(raw, dataset, root, limits, f"{path}: item {i}")
        for i, raw in enumerate(_raw(path, limits))
    ][: dataset.max_size]
    count = round(len(items) * dataset.sample_ratio)
    if count > limits.max_items:
        raise ManifestError(
            f"{path}: {count} items with sample_ratio={dataset.sample_ratio:g}, but the"
            f" limit is {limits.max_items}."
        )
    repeats, part = divmod(count, len(items) or 1)
    rng = np.random.default_rng(zlib.crc32(dataset.name.encode()))
    some = np.sort(rng.permutation(len(items))[:part])
    return items * repeats + [items[i] for i in some]


def _raw(path: pathlib.Path, limits: ManifestLimits) -> list[Any]:
    """The parsed items of a JSON list, or of JSON lines."""
    if path.suffix not in (".json", ".jsonl"):
        raise ManifestError(f"{path}: neither .json nor .jsonl; rename or convert it.")
    with _refusing(f"{path}"):
        text = untrusted.read_text(path, limits.max_bytes)
    if path.suffix == ".json":
        with _refusing(f"{path}: cannot be read"):
            items = untrusted.parse_json(text)
        if not isinstance(items, list):
            raise ManifestError(f"{path}: holds no list; write the items as one.")
        return items
    items = []
    for number, line in untrusted.lines(text):
        with _refusing(f"{path}: line {number}"):
            items.append(untrusted.parse_json(line))
    return items


def _dataset(
    entry: Any,
    manifest: pathlib.Path,
    root: Root,
    limits: ManifestLimits,
    where: str,
    anywhere: bool,
) -> Dataset:
    """Checks an entry of a manifest; its paths are relative to the manifest.

    With a root that was named for it, they may be any that lie there.
    """
    _check_keys(entry, {field.name for field in dataclasses.fields(Dataset)}, where)
    for field in dataclasses.fields(Dataset):
        required = field.default is dataclasses.MISSING
        if field.name not in entry:
            if required:
                raise ManifestError(f"{where}: {field.name!r} is missing.")
        elif not _is_of(entry[field.name], field.type):
            raise ManifestError(
                f"{where}: {field.name}={shown(entry[field.name])} is not of type"
                f" {getattr(field.type, '__name__', field.type)}."
            )
    dataset = Dataset(**entry)
    _check_numbers(dataset, limits, where)
    if dataset.kind not in FORMATS:
        raise ManifestError(
            f"{where}: format={dataset.format!r} is not one of {FORMATS}, nor one of"
            " them with _packed."
        )
    if dataset.pack_size < 1 or dataset.format.endswith("_packed") != (
        dataset.pack_size > 1
    ):
        raise ManifestError(
            f"{where}: format={dataset.format} with pack_size={dataset.pack_size};"
            " items share rows if the format ends in _packed and pack_size is above 1."
        )
    if not re.fullmatch(
        r"rand|middle|fps\d{1,4}(\.\d{1,9})?", dataset.video_sample_type, re.ASCII
    ):
        raise ManifestError(
            f"{where}: video_sample_type={dataset.video_sample_type!r} is none of rand,"
            " middle, and fps with a number (fps1)."
        )
    frames = dataset.video_num_frames
    if frames != "auto" and not isinstance(frames, int):
        raise ManifestError(
            f"{where}: video_num_frames={frames!r}; use a count or auto."
        )
    if frames != "auto" and dataset.video_sample_type.startswith("fps"):
        raise ManifestError(
            f"{where}: video_num_frames={frames} contradicts"
            f" video_sample_type={dataset.video_sample_type}; use auto, or middle."
        )
    paths = {}
    for name in ("json_path", "data_path"):
        with _refusing(f"{where}: {name}={shown(entry.get(name))}"):
            if not anywhere:
                untrusted.check_name(getattr(dataset, name))
            paths[name] = str(manifest.parent / getattr(dataset, name))
            root.check(paths[name])
    return dataclasses.replace(dataset, **paths)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type; true and false are no numbers."""
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int | float) and not untrusted.is_number(value):
        return False
    return isinstance(value, kind)


def _check_numbers(dataset: Dataset, limits: ManifestLimits, where: str) -> None:
    least_and_most = dict(
        pack_size=(1, 10_000),
        max_size=(0, limits.max_items),
        sample_ratio=(0, limits.max_items),
        max_txt_seq_len=(1, limits.max_chars),
        video_num_frames=(1, limits.max_frames),
        max_num_frames_fps=(1, limits.max_frames),
        min_num_frames_fps=(1, limits.max_frames),
    )
    for name, (least, most) in least_and_most.items():
        value = getattr(dataset, name)
        if isinstance(value, Number) and not least <= value <= most:
            raise ManifestError(
                f"{where}: {name}={value:g} is not between {least} and {most}."
            )
    for name in ("name", "split", "dataset_type", "video_sample_type"):
        if not _is_label(getattr(dataset, name)):
            raise ManifestError(f"{where}: {name} is no short printable name.")


def _is_label(text: str) -> bool:
    return len(text) <= 1_000 and text.isprintable()


_ITEM_KEYS = {
    *("id", "image", "conversations", "caption"),
    *("duration", "video_start", "video_end", "frame_times"),
    "needle",  # What the evaluation of the needle data wants to know; see `Item.notes`.
}


def _item(
    raw: Any, dataset: Dataset, root: Root, limits: ManifestLimits, where: str
) -> Item:
    _check_keys(raw, _ITEM_KEYS, where)
    name = str(raw.get("id", where)) if _is_id(raw.get("id")) else None
    if name is None:
        raise ManifestError(f"{where}: id is {shown(raw['id'])}; give a short name.")
    where = f"{where} (id {raw.get('id')!r})"
    media = _media(raw.get("image", ""), dataset, root, limits, f"{where}: image")
    if dataset.kind == "caption":
        caption = _text(raw.get("caption"), limits, f"{where}: caption")
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
        duration=_number(raw.get("duration"), f"{where}: duration"),
        start=start,
        end=end,
        frame_times=_times(raw.get("frame_times"), limits, f"{where}: frame_times"),
        notes=notes,
    )


def _is_id(value: Any) -> bool:
    number = isinstance(value, int) and untrusted.is_number(value)
    return value is None or number or (isinstance(value, str) and _is_label(value))


def _media(
    value: Any, dataset: Dataset, root: Root, limits: ManifestLimits, where: str
) -> tuple[str, ...]:
    """The paths that `value` names, all of them below the data set's folder."""
    names = [name.strip() for name in _text(value, limits, where).split(" | ")]
    names = [name for name in names if name]
    if len(names) > limits.max_media:
        raise ManifestError(
            f"{where}: {len(names)} media, but the limit is {limits.max_media}."
        )
    paths = []
    for name in names:
        with _refusing(f"{where}: {name!r:.120}"):
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
        _check_keys(turn, {"from", "value"}, place)
        given = turn.get("from")
        speaker = _SPEAKERS.get(given) if isinstance(given, str) else None
        if speaker not in expected:
            raise ManifestError(
                f"{place}: from={shown(given)}, but human and gpt must take"
                " turns, human first (after system, if any)."
            )
        expected = ("assistant",) if speaker == "user" else ("user",)
        yield speaker, _text(turn.get("value"), limits, f"{place}: value")
    if speaker != "assistant":
        raise ManifestError(f"{where}: the last turn is no answer; end with gpt's.")


def _check_markers(
    conversation: Sequence[tuple[str, str]], num_media: int, where: str
) -> None:
    markers = sum(len(_MARKER.findall(text)) for _, text in conversation)
    if markers not in {0, num_media} and not (markers == 1 and num_media):
        raise ManifestError(
            f"{where}: {markers} <image> markers for {num_media} media; give as many,"
            " or one for all, or none (the media come first)."
        )


def _place_media(
    conversation: Sequence[tuple[str, str]], num_frames: Sequence[int]
) -> list[Turn]:
    """Puts media in the places of their markers, or before the first question."""
    markers = sum(len(_MARKER.findall(text)) for _, text in conversation)
    if markers == len(num_frames):
        waiting = [(Media(count),) for count in num_frames]
    else:
        waiting = [tuple(map(Media, num_frames))]
    turns = []
    for speaker, text in conversation:
        first, *others = _MARKER.split(text)
        content: tuple[str | Media, ...] = (first,)
        if speaker == "user" and not markers:
            content, waiting = (*sum(waiting, ()), first), []
        for other in others:
            content += (*waiting.pop(0), other)
        turns.append(Turn(speaker, tuple(part for part in content if part != "")))
    return turns


def _window(raw: Mapping[str, Any], where: str) -> tuple[Number | None, Number | None]:
    start = _number(raw.get("video_start"), f"{where}: video_start")
    end = _number(raw.get("video_end"), f"{where}: video_end")
    if end is not None and not (start or 0) < end:
        raise ManifestError(f"{where}: the window from {start} to {end} s is empty.")
    return start, end


def _check_keys(raw: Any, known: set[str], where: str) -> None:
    if not isinstance(raw, dict):
        raise ManifestError(f"{where}: not a mapping of keys to values: {shown(raw)}.")
    if unknown := sorted(shown(key) for key in set(raw) - known):
        raise ManifestError(
            f"{where}: unknown [{', '.join(unknown[:10])}]; the keys are"
            f" {sorted(known)}."
        )


def _times(raw: Any, limits: ManifestLimits, where: str) -> tuple[Number, ...] | None:
    if raw is None:
        return None
    if not isinstance(raw, list) or not 0 < len(raw) <= limits.max_frames:
        raise ManifestError(
            f"{where} is {shown(raw)}; give a list of at most {limits.max_frames}"
            " seconds."
        )
    times = tuple(_number(value, where) for value in raw)
    if None in times or list(times) != sorted(times):
        raise ManifestError(f"{where} is {shown(raw)}; give rising seconds.")
    return times


def _text(value: Any, limits: ManifestLimits, where: str) -> str:
    if not isinstance(value, str):
        raise ManifestError(f"{where} is {shown(value)}; give a text.")
    with _refusing(where):
        untrusted.check_text(value, limits.max_chars)
    return value


def _number(value: Any, where: str) -> Number | None:
    if value is not None and not (
        untrusted.is_number(value) and 0 <= value <= _MOST_SECONDS
    ):
        raise ManifestError(f"{where} is {shown(value)}; give seconds from 0 on.")
    return value
