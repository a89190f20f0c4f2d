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

import dataclasses
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from timeviper_jax.data import untrusted
from timeviper_jax.data.items import Dataset, Item
from timeviper_jax.data.manifest_items import parse_item
from timeviper_jax.data.manifest_rules import (
    LIMITS,
    ManifestError,
    ManifestLimits,
    check_keys,
    is_label,
    refusing,
)
from timeviper_jax.data.untrusted import Root, shown
from timeviper_jax.data.video import Number

FORMATS = ("caption", "conversation", "tvg", "dvc")
_MANIFEST_BYTES = 1 << 22  # Of the list of data sets.


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
    with refusing(f"{path}"):
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
        parse_item(raw, dataset, root, limits, f"{path}: item {i}")
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
    with refusing(f"{path}"):
        text = untrusted.read_text(path, limits.max_bytes)
    if path.suffix == ".json":
        with refusing(f"{path}: cannot be read"):
            items = untrusted.parse_json(text)
        if not isinstance(items, list):
            raise ManifestError(f"{path}: holds no list; write the items as one.")
        return items
    items = []
    for number, line in untrusted.lines(text):
        with refusing(f"{path}: line {number}"):
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
    _check_types(entry, where)
    dataset = Dataset(**entry)
    _check_numbers(dataset, limits, where)
    _check_format(dataset, where)
    _check_sampling(dataset, where)
    paths = {}
    for name in ("json_path", "data_path"):
        with refusing(f"{where}: {name}={shown(entry.get(name))}"):
            if not anywhere:
                untrusted.check_name(getattr(dataset, name))
            paths[name] = str(manifest.parent / getattr(dataset, name))
            root.check(paths[name])
    return dataclasses.replace(dataset, **paths)


def _check_types(entry: Any, where: str) -> None:
    fields = dataclasses.fields(Dataset)
    check_keys(entry, {field.name for field in fields}, where)
    for field in fields:
        if field.name not in entry:
            if field.default is dataclasses.MISSING:
                raise ManifestError(f"{where}: {field.name!r} is missing.")
        elif not _is_of(entry[field.name], field.type):
            raise ManifestError(
                f"{where}: {field.name}={shown(entry[field.name])} is not of type"
                f" {getattr(field.type, '__name__', field.type)}."
            )


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
        if not is_label(getattr(dataset, name)):
            raise ManifestError(f"{where}: {name} is no short printable name.")


def _check_format(dataset: Dataset, where: str) -> None:
    if dataset.kind not in FORMATS:
        raise ManifestError(
            f"{where}: format={shown(dataset.format)} is not one of {FORMATS}, nor one"
            " of them with _packed."
        )
    if dataset.format.endswith("_packed") != (dataset.pack_size > 1):
        raise ManifestError(
            f"{where}: format={dataset.format} with pack_size={dataset.pack_size};"
            " items share rows if the format ends in _packed and pack_size is above 1."
        )


def _check_sampling(dataset: Dataset, where: str) -> None:
    kind, frames = dataset.video_sample_type, dataset.video_num_frames
    if not re.fullmatch(r"rand|middle|fps\d{1,4}(\.\d{1,9})?", kind, re.ASCII):
        raise ManifestError(
            f"{where}: video_sample_type={kind!r} is none of rand, middle, and fps with"
            " a number (fps1)."
        )
    if frames != "auto" and not isinstance(frames, int):
        raise ManifestError(
            f"{where}: video_num_frames={shown(frames)}; use a count or auto."
        )
    if frames != "auto" and kind.startswith("fps"):
        raise ManifestError(
            f"{where}: video_num_frames={frames} contradicts"
            f" video_sample_type={kind}; use auto, or middle."
        )
