"""Readers of the benchmarks that want a video described."""

import pathlib

from timeviper_jax.evals.entries import (
    Entry,
    Row,
    find_video,
    one_of,
    read_json,
    read_rows,
    subfolder,
)
from timeviper_jax.evals.spans import Event

# VDC's five kinds of caption, each asked for in our words.
VDC_PROMPTS = {
    "short": "Sum up the video in one sentence.",
    "background": (
        "Describe the background of the video: the place, the objects in it, the"
        " weather and the time of day."
    ),
    "main_object": (
        "Describe the main subject of the video: what it looks like, what it does,"
        " where it is and how it moves."
    ),
    "camera": (
        "Describe the camera work of the video: shots, angles, movements and how they"
        " change."
    ),
    "detailed": "Describe the video in detail, from beginning to end.",
}
DENSE_PROMPT = (
    "List what happens in the video in order, each event on a line of its own, as"
    " 'start - end seconds, what happens'."
)


def vdc(folder: pathlib.Path) -> list[Entry]:
    """VDC, 1,027 videos and five captions of each: https://github.com/rese1f/aurora.

    `VDC_1k.jsonl` names the videos; `VDCScore_qa/KIND.jsonl` holds the questions that a
    caption should answer.
    """
    names = ["VDC_1k.jsonl", "VDC_1k_captions.jsonl"]
    rows = read_rows(one_of(folder, names, "VDC's videos"))
    videos = subfolder(folder, "videos/videos", "videos", "Test_Videos")
    facts = {kind: _vdc_facts(folder, kind) for kind in VDC_PROMPTS}
    return [
        Entry(
            id=f"{kind}/{row.text('video_id')}",
            video=find_video(videos, row.text("video_name")),
            text=prompt,
            answer=row.text(f"{kind}_caption"),
            groups=(f"task={kind}",),
            facts=facts[kind][row.text("video_id")],
        )
        for kind, prompt in VDC_PROMPTS.items()
        for row in rows
        if row.text("video_id") in facts[kind]
    ]


def _vdc_facts(folder: pathlib.Path, kind: str) -> dict[str, tuple]:
    """What is asked about each video's caption, and the answers."""
    root = subfolder(folder, "VDCScore_qa", "VDCSscore_qa", "post_eval")
    path = one_of(root, [f"{kind}.jsonl"], f"the questions of VDC's {kind} captions")
    facts = {}
    for row in read_rows(path):
        for name in row.values:
            pairs = row.rows(name)
            facts[name] = tuple((p.text("question"), p.text("answer")) for p in pairs)
    return facts


def youcook2(folder: pathlib.Path) -> list[Entry]:
    """YouCook2's validation videos, all their steps: http://youcook2.eecs.umich.edu.

    `youcookii_annotations_trainval.json`, and `raw_videos/validation/RECIPE/` or a
    folder of all videos.
    """
    anno = subfolder(folder, "annotations")
    names = ["youcookii_annotations_trainval.json"]
    path = one_of(anno, names, "YouCook2's annotations")
    entries = []
    for name, values in Row(read_json(path), str(path))["database"].items():
        row = Row(values, f"{path}: {name}")
        if row.text("subset") != "validation":
            continue
        folders = (
            [f"raw_videos/validation/{row.text('recipe_type')}"]
            if "recipe_type" in row
            else []
        )
        videos = subfolder(folder, *folders, "raw_videos", "videos")
        events = tuple(
            Event(step.span("segment"), step.text("sentence"))
            for step in row.rows("annotations")
        )
        entries.append(
            Entry(
                id=name,
                video=find_video(videos, name),
                text=DENSE_PROMPT,
                answer="\n".join(
                    f"{e.span[0]:g} - {e.span[1]:g} seconds, {e.text}" for e in events
                ),
                events=events,
                duration=row.number("duration"),
            )
        )
    return entries
