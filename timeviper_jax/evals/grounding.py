"""Readers of the benchmarks that ask when something happens."""

import pathlib
import re

from timeviper_jax.evals.entries import (
    DataError,
    Entry,
    Row,
    find_video,
    one_of,
    read_json,
    read_rows,
    subfolder,
)
from timeviper_jax.evals.spans import Span

_STA = re.compile(r"(\S+) ([\d.]+) ([\d.]+)##(.+)")


def charades(folder: pathlib.Path) -> list[Entry]:
    """Charades-STA (test), 3,720 queries: https://github.com/jiyanggao/TALL.

    `charades_sta_test.txt`, a query a line, and if it is there `Charades_v1_test.csv`
    with the lengths of the videos.
    """
    anno = subfolder(folder, "Charades_anno", "annotations")
    names = ["charades_sta_test.txt", "Charades_sta_test.txt"]
    path = one_of(anno, names, "the queries of Charades-STA")
    lengths = {}
    if (table := anno / "Charades_v1_test.csv").is_file():
        lengths = {row.text("id"): row.number("length") for row in read_rows(table)}
    videos = subfolder(folder, "Charades_v1_480", "Charades_v1", "videos")
    entries = []
    for i, line in enumerate(filter(None, path.read_text("utf-8").splitlines())):
        if not (found := _STA.fullmatch(line.strip())):
            raise DataError(
                f"{path}: line {i + 1}: {line!r:.60} is no 'VIDEO START END##WHAT'."
            )
        span = float(found[2]), float(found[3])
        entries.append(
            _entry(
                str(i),
                find_video(videos, found[1]),
                found[4],
                span,
                duration=lengths.get(found[1]),
            )
        )
    return entries


def activitynet(folder: pathlib.Path) -> list[Entry]:
    """ActivityNet Captions as queries: https://github.com/ranjaykrishna/densevid_eval.

    `val_2.json`, the split that grounding is tested on; where only `val_1.json` is
    there, that.
    """
    anno = subfolder(folder, "annotations", "captions")
    path = one_of(anno, ["val_2.json", "val_1.json"], "ActivityNet Captions' val split")
    entries = []
    for name, values in read_json(path).items():
        row = Row(values, f"{path}: {name}")
        sentences, spans = row.texts("sentences"), row["timestamps"]
        if len(sentences) != len(spans):
            raise DataError(
                f"{row.where}: {len(sentences)} sentences, {len(spans)} timestamps."
            )
        for i, (text, span) in enumerate(zip(sentences, spans, strict=True)):
            entries.append(
                _entry(
                    f"{name}/{i}",
                    find_video(subfolder(folder, "videos"), name),
                    text,
                    Row({"timestamps": span}, row.where).span("timestamps"),
                    duration=row.number("duration"),
                )
            )
    return entries


def tvgbench(folder: pathlib.Path) -> list[Entry]:
    """TVGBench, 800 queries: https://github.com/xiaomi-research/time-r1.

    `tvgbench.json`. Some queries are about a window of their video; their answers count
    from its start.
    """
    path = one_of(folder, ["tvgbench.json", "annotations/tvgbench.json"], "TVGBench")
    videos = subfolder(folder, "tvgbench_data", "videos/tvgbench_data", "videos")
    entries = []
    for i, row in enumerate(read_rows(path)):
        parts = row.text("answer").split("-")
        window = None
        if "start" in row and "end" in row:
            window = row.number("start"), row.number("end")
        name = pathlib.PurePosixPath(row.text("path")).name
        groups = [
            f"{title}={row.text(kind)}"
            for title, kind in (("task", "qsemtype"), ("source", "dataset_name"))
            if kind in row
        ]
        entries.append(
            _entry(
                str(i),
                find_video(videos, name),
                row.text("question"),
                Row({"answer": parts}, row.where).span("answer"),
                duration=row.number("duration"),
                window=window,
                groups=tuple(groups),
            )
        )
    return entries


def _entry(
    id_: str,
    video: pathlib.Path,
    text: str,
    span: Span,
    *,
    duration: float | None,
    window: Span | None = None,
    groups: tuple[str, ...] = (),
) -> Entry:
    return Entry(
        id=id_,
        video=video,
        text=text.strip(),
        answer=f"{span[0]:.12g} to {span[1]:.12g}",
        span=span,
        duration=duration,
        window=window,
        groups=groups,
    )
