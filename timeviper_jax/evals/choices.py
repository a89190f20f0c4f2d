"""Readers of the benchmarks of multiple choice.

Each takes the benchmark's folder and gives its questions in the published order. Which
files they look for, and where these come from, stands at each; `docs/evaluation.md` has
the folders.
"""

import pathlib
import re
from collections.abc import Iterator

from timeviper_jax.evals.entries import (
    DataError,
    Entry,
    Row,
    find_video,
    letter,
    lettered,
    one_of,
    read_json,
    read_rows,
    subfolder,
    subtitle_file,
)

Entries = list[Entry]
_TABLE = ("json", "jsonl", "csv", "parquet")


def videomme(folder: pathlib.Path) -> Entries:
    """Video-MME, 2,700 questions: https://github.com/MME-Benchmarks/Video-MME.

    The parquet of its data set (lmms-lab/Video-MME), or the same table in another form;
    or the JSON of its evaluation, where a video holds its `questions`.
    """
    names = ["videomme/test-*.parquet", *(f"videomme.{kind}" for kind in _TABLE)]
    path = one_of(folder, [*names, "test-*.parquet"], "Video-MME's annotations")
    videos = subfolder(folder, "data", "videos", "video")
    entries = []
    for row in _unnested(read_rows(path)):
        name = row.text("videoID" if "videoID" in row else "video_id")
        kinds = ("duration", "task_type", "domain", "sub_category")
        titles = ("duration", "task", "domain", "category")
        groups = [
            f"{title}={row.text(kind)}"
            for title, kind in zip(titles, kinds, strict=True)
            if kind in row
        ]
        entries.append(
            Entry(
                id=row.text("question_id"),
                video=find_video(videos, name),
                text=row.text("question"),
                options=row.texts("options"),
                answer=_letter(row, "answer", len(row.texts("options"))),
                groups=tuple(groups),
                subtitles=subtitle_file(folder, f"{name}.srt"),
            )
        )
    return entries


def _unnested(rows: list[Row]) -> Iterator[Row]:
    """Questions with what is said of their video."""
    for row in rows:
        if "questions" not in row:
            yield row
            continue
        for question in row.rows("questions"):
            values = {k: v for k, v in row.values.items() if k != "questions"}
            yield Row(values | dict(question.values), question.where)


def lvbench(folder: pathlib.Path) -> Entries:
    """LVBench, 1,549 questions: https://github.com/THUDM/LVBench.

    `video_info.meta.jsonl`: a video a line, its options within the question's text. A
    question has one or more types, and counts for each.
    """
    names = ["video_info.meta.jsonl", "data/video_info.meta.jsonl"]
    path = one_of(folder, names, "LVBench's annotations")
    videos = subfolder(folder, "all_videos", "videos", "video")
    entries = []
    for row in read_rows(path):
        for question in row.rows("qa"):
            text, *options = question.text("question").split("\n")
            options = [re.sub(r"^\(([A-Z])\)\s*", r"\1. ", o) for o in options]
            types = (
                question.texts("question_type") if "question_type" in question else ()
            )
            entries.append(
                Entry(
                    id=question.text("uid"),
                    video=find_video(videos, row.text("key")),
                    text=text,
                    options=tuple(options),
                    answer=_letter(question, "answer", len(options)),
                    groups=tuple(f"task={kind}" for kind in types),
                )
            )
    return entries


def mlvu(folder: pathlib.Path) -> Entries:
    """MLVU's choices (dev), 2,175 questions: https://github.com/JUNJIE99/MLVU.

    A JSON file for each of seven tasks, whose videos lie in a folder of its name; the
    two tasks of free answers are left out. M-Avg is the mean over the tasks. Two
    published questions have no right option: no answer to them is right.
    """
    root = subfolder(folder, "MLVU")
    names = subfolder(root, "json", "data")
    first = one_of(names, ["*_plotQA.json", "*.json"], "MLVU's JSON files")
    entries = []
    for path in sorted(first.parent.glob("*.json")):
        videos = subfolder(root, "video", "videos") / path.stem
        for i, row in enumerate(read_rows(path)):
            if "candidates" not in row:
                continue
            options = row.texts("candidates")
            answer = row.text("answer")
            entries.append(
                Entry(
                    id=f"{path.stem}/{i}",
                    video=find_video(videos, row.text("video")),
                    text=row.text("question"),
                    options=lettered(options),
                    answer=letter(options.index(answer)) if answer in options else "",
                    groups=(f"task={row.text('question_type')}",),
                )
            )
    return entries


def longvideobench(folder: pathlib.Path) -> Entries:
    """LongVideoBench (validation), 1,337 questions: https://longvideobench.github.io.

    `lvb_val.json`, or the parquet of its data set, where options are columns.
    """
    names = ["lvb_val.json", "validation-*.parquet", "data/validation-*.parquet"]
    path = one_of(folder, names, "LongVideoBench's validation split")
    entries = []
    for row in read_rows(path):
        options = _columns(row) if "option0" in row else row.texts("candidates")
        subtitles = row.text("subtitle_path") if "subtitle_path" in row else "none"
        starts = "starting_timestamp_for_subtitles"
        entries.append(
            Entry(
                id=row.text("id"),
                video=find_video(subfolder(folder, "videos"), row.text("video_path")),
                text=row.text("question"),
                options=lettered(options),
                answer=_number(row, "correct_choice", len(options)),
                groups=(
                    f"duration={row.text('duration_group')}",
                    f"task={row.text('question_category')}",
                ),
                subtitles=subtitle_file(folder, subtitles),
                subtitle_start=row.number(starts) if starts in row else 0.0,
            )
        )
    return entries


def _columns(row: Row) -> tuple[str, ...]:
    options = [row.text(f"option{i}") for i in range(5) if f"option{i}" in row]
    return tuple(option for option in options if option != "N/A")


def egoschema(folder: pathlib.Path) -> Entries:
    """EgoSchema, the 500 questions with public answers: https://egoschema.github.io.

    `questions.json` and `subset_answers.json`, or the parquet of the data set's subset.
    """
    names = ["questions.json", "Subset/test-*.parquet"]
    path = one_of(folder, names, "EgoSchema's questions")
    if path.suffix == ".parquet":
        return [_egoschema_row(folder, row) for row in read_rows(path)]
    answers = read_json(
        one_of(folder, ["subset_answers.json"], "EgoSchema's public answers")
    )
    entries = []
    for row in read_rows(path):
        if (name := row.text("q_uid")) not in answers:
            continue
        options = [row.text(f"option {i}") for i in range(5)]
        row = Row({**row.values, "answer": answers[name]}, row.where)
        entries.append(
            Entry(
                id=name,
                video=find_video(subfolder(folder, "videos"), name),
                text=row.text("question"),
                options=lettered(options),
                answer=_number(row, "answer", 5),
            )
        )
    return entries


def _egoschema_row(folder: pathlib.Path, row: Row) -> Entry:
    name = row.text("video_idx")
    return Entry(
        id=name,
        video=find_video(subfolder(folder, "videos"), name),
        text=row.text("question"),
        options=row.texts("option"),
        answer=_number(row, "answer", len(row.texts("option"))),
    )


# Where each task's videos lie; those of one task are folders of 3 frames a second.
_MVBENCH = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}


def mvbench(folder: pathlib.Path) -> Entries:
    """MVBench, 20 tasks of 200: https://github.com/OpenGVLab/Ask-Anything.

    `json/TASK.json` and `video/`. Where a question has a start and an end, only what
    lies between them is watched. Its score is the mean over the tasks.
    """
    first = one_of(subfolder(folder, "json"), ["*.json"], "MVBench's JSON files")
    entries = []
    for path in sorted(first.parent.glob("*.json")):
        if path.stem not in _MVBENCH:
            raise DataError(f"{path}: no task of MVBench; they are {[*_MVBENCH]}.")
        videos = subfolder(folder, "video") / _MVBENCH[path.stem]
        for i, row in enumerate(read_rows(path)):
            options = row.texts("candidates")
            window = None
            if "start" in row and "end" in row:
                window = (row.number("start"), row.number("end"))
            entries.append(
                Entry(
                    id=f"{path.stem}/{i}",
                    video=find_video(videos, row.text("video")),
                    text=row.text("question"),
                    options=lettered(options),
                    answer=_index(row, options),
                    groups=(f"task={path.stem}",),
                    window=window,
                    frame_rate=3.0 if "fps3" in videos.name else 1.0,
                )
            )
    return entries


def tempcompass(folder: pathlib.Path) -> Entries:
    """TempCompass, its three kinds of choice: https://github.com/llyx97/TempCompass.

    `questions/{multi-choice,yes_no,caption_matching}.json`: by video and aspect.
    Captions to be written (`captioning.json`) want a judge and are left out.
    """
    kinds = ("multi-choice", "yes_no", "caption_matching")
    root = subfolder(folder, "questions")
    entries = []
    for kind in kinds:
        path = one_of(root, [f"{kind}.json"], "TempCompass's questions")
        for video, aspects in read_json(path).items():
            for aspect, rows in aspects.items():
                for i, values in enumerate(rows):
                    row = Row(values, f"{path}: {video}/{aspect}/{i}")
                    text, options, answer = _tempcompass_options(row, kind)
                    entries.append(
                        Entry(
                            id=f"{kind}/{video}/{aspect}/{i}",
                            video=find_video(subfolder(folder, "videos"), video),
                            text=text,
                            options=options,
                            answer=answer,
                            groups=(f"kind={kind}", f"task={aspect}"),
                        )
                    )
    return entries


def _tempcompass_options(row: Row, kind: str) -> tuple[str, tuple[str, ...], str]:
    """Question, options and the right one's letter: the lines after the question."""
    text, *options = row.text("question").split("\n")
    if kind == "yes_no":
        options = ["yes", "no"]
    answer = _index(row, tuple(options))
    if kind == "multi-choice":
        return text, tuple(options), answer
    # "Option 1: …" and "Sentence A: …" become letters like all others.
    options = [re.sub(r"^\w+ \w+: ", "", option) for option in options]
    return text, lettered(options), answer


def cgbench(folder: pathlib.Path) -> Entries:
    """CG-Bench, 12,129 questions on whole videos: https://github.com/CG-Bench/CG-Bench.

    `cgbench.json`, or `cgbench_mini.json` where that is all there is. This is the
    accuracy that its authors call long-acc.
    """
    names = ["cgbench.json", "cgbench_mini.json"]
    path = one_of(folder, names, "CG-Bench's annotations")
    videos = subfolder(folder, "cg_videos_720p", "videos")
    entries = []
    for row in read_rows(path):
        options, name = row.texts("choices"), row.text("video_uid")
        entries.append(
            Entry(
                id=row.text("qid"),
                video=find_video(videos, name),
                text=row.text("question"),
                options=lettered(options),
                answer=_letter(row, "right_answer", len(options)),
                groups=(
                    f"domain={row.text('domain')}",
                    f"task={row.text('sub_category')}",
                ),
                subtitles=subtitle_file(folder, f"{name}.srt"),
            )
        )
    return entries


def _letter(row: Row, name: str, count: int) -> str:
    found = row.text(name)
    if len(found) != 1 or not letter(0) <= found < letter(count):
        raise DataError(f"{row.where}: {name}={found!r} is none of {count} options.")
    return found


def _number(row: Row, name: str, count: int) -> str:
    found = row.number(name)
    if found != int(found) or not 0 <= found < count:
        raise DataError(f"{row.where}: {name}={found:g} is none of {count} options.")
    return letter(int(found))


def _index(row: Row, options: tuple[str, ...]) -> str:
    if (answer := row.text("answer")) not in options:
        raise DataError(f"{row.where}: answer={answer!r} is none of {options}.")
    return letter(options.index(answer))
