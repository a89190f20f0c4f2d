"""Tiny folders in the form of each published benchmark; the videos are all the same."""

import json
import pathlib
import shutil

import av
import numpy as np
from pyarrow import Table, parquet

SECONDS = 40


def write_video(path: pathlib.Path, seconds: int = SECONDS) -> pathlib.Path:
    """Noise at one frame a second."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(seconds):
            pixels = rng.integers(0, 255, (64, 64, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


class Folder:
    """A benchmark's folder in the making."""

    def __init__(self, root: pathlib.Path, video: pathlib.Path):
        self.root, self._video = root, video

    def _path(self, name: str) -> pathlib.Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def videos(self, *names: str) -> None:
        for name in names:
            shutil.copy(self._video, self._path(name))

    def json(self, name: str, values: object) -> None:
        self._path(name).write_text(json.dumps(values), "utf-8")

    def jsonl(self, name: str, values: list) -> None:
        self.text(name, "".join(json.dumps(value) + "\n" for value in values))

    def text(self, name: str, text: str) -> None:
        self._path(name).write_text(text, "utf-8")

    def parquet(self, name: str, values: list[dict]) -> None:
        parquet.write_table(Table.from_pylist(values), self._path(name))


_FOUR = ["A. red", "B. green", "C. blue", "D. none"]
_BARE = ["red", "green", "blue", "none"]
_SRT = """1
00:00:00,000 --> 00:00:02,000
<font color="white" size=".72c">Hello there.</font>

2
00:00:39,990 --> 00:00:39,999
Between two frames.

3
00:00:30,000 --> 00:00:31,500
Good bye.
"""


def videomme_rows() -> list[dict]:
    kinds = [
        ("001-1", "a", "short", "Counting Problem", "A"),
        ("001-2", "a", "short", "OCR Problems", "B"),
        ("601-1", "b", "long", "Counting Problem", "C"),
        ("601-2", "b", "long", "OCR Problems", "D"),
    ]
    return [
        {
            "video_id": name[:3],
            "duration": duration,
            "domain": "Knowledge",
            "sub_category": "Law",
            "url": "",
            "videoID": video,
            "question_id": name,
            "task_type": task,
            "question": f"What colour is {name}?",
            "options": _FOUR,
            "answer": answer,
        }
        for name, video, duration, task, answer in kinds
    ]


def videomme(folder: Folder) -> None:
    folder.parquet("videomme/test-00000-of-00001.parquet", videomme_rows())
    folder.videos("data/a.mp4", "data/b.mp4")
    folder.text("subtitle/a.srt", _SRT)


def lvbench(folder: Folder) -> None:
    text = "What is it?\n(A) red\n(B) green\n(C) blue\n(D) none"
    kinds = [
        ("0", "A", ["entity recognition", "reasoning"]),
        ("1", "B", ["reasoning"]),
        ("2", "C", ["entity recognition"]),
    ]
    questions = [
        {
            "uid": uid,
            "question": text,
            "answer": answer,
            "question_type": types,
            "time_reference": "00:01-00:05",
        }
        for uid, answer, types in kinds
    ]
    video = {"key": "k", "qa": questions, "type": "cartoon", "video_info": {}}
    folder.jsonl("data/video_info.meta.jsonl", [video])
    folder.videos("all_videos/k.mp4")


def mlvu(folder: Folder) -> None:
    def rows(kind: str, answers: list[str]) -> list[dict]:
        return [
            {
                "video": "v.mp4",
                "duration": 40,
                "question": "Which?",
                "candidates": _BARE,
                "answer": answer,
                "question_type": kind,
            }
            for answer in answers
        ]

    folder.json("MLVU/json/1_plotQA.json", rows("plotQA", ["red"] * 3))
    folder.json("MLVU/json/4_count.json", rows("count", ["none"]))
    # As published: the right answer is not among the options.
    folder.json("MLVU/json/2_needle.json", rows("findNeedle", ["a red one", "blue"]))
    free = {"video": "v.mp4", "duration": 40, "question": "Tell.", "answer": "So."}
    folder.json("MLVU/json/9_summary.json", [free | {"question_type": "summary"}])
    for name in ("1_plotQA", "4_count", "2_needle"):
        folder.videos(f"MLVU/video/{name}/v.mp4")


def longvideobench(folder: Folder) -> None:
    def row(i: int, group: int, options: list[str], right: int) -> dict:
        return {
            "id": f"v_{i}",
            "video_id": "v",
            "video_path": "v.mp4",
            "subtitle_path": "v_en.json",
            "question": "Which?",
            "candidates": options,
            "correct_choice": right,
            "question_category": "S2E",
            "duration_group": group,
            "duration": 40.0,
            "starting_timestamp_for_subtitles": 100,
        }

    folder.json("lvb_val.json", [row(0, 60, _BARE, 3), row(1, 3600, ["x", "y"], 0)])
    said = [
        {"start": "00:01:40.000", "end": "00:01:42.000", "line": "First."},
        {"timestamp": [110.0, None], "text": "Last."},
        {"timestamp": [1.0, 2.0], "text": "Before the video."},
    ]
    folder.json("subtitles/v_en.json", said)
    folder.videos("videos/v.mp4")


def egoschema(folder: Folder) -> None:
    options = {f"option {i}": text for i, text in enumerate("abcde")}
    rows = [
        {"q_uid": name, "google_drive_id": "", "question": "Why?", **options}
        for name in ("u1", "u2", "secret")
    ]
    folder.json("questions.json", rows)
    folder.json("subset_answers.json", {"u1": 4, "u2": 0})
    folder.videos("videos/u1.mp4", "videos/u2.mp4")


def mvbench(folder: Folder) -> None:
    row = {"video": "v.mp4", "question": "Which?", "candidates": _BARE[:3]}
    clip = row | {"answer": "green", "start": 10.0, "end": 20.0}
    folder.json("json/action_sequence.json", [clip])
    folder.json("json/moving_count.json", [row | {"answer": "red"}] * 2)
    frames = row | {"video": "friends", "answer": "blue", "start": 1.0, "end": 3.0}
    folder.json("json/episodic_reasoning.json", [frames])
    folder.videos("video/star/Charades_v1_480/v.mp4")
    folder.videos("video/clevrer/video_validation/v.mp4")
    pixels = folder.root / "video/tvqa/frames_fps3_hq/friends"
    pixels.mkdir(parents=True)
    from PIL import Image

    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(pixels / f"{i:05}.jpg")


def tempcompass(folder: Folder) -> None:
    choice = {"question": "What?\nA. up\nB. down", "answer": "B. down"}
    folder.json("questions/multi-choice.json", {"1": {"direction": [choice]}})
    yes = {"question": "Is it up?", "answer": "no"}
    folder.json("questions/yes_no.json", {"1": {"direction": [yes], "speed": [yes]}})
    match = {
        "question": "Which fits?\nOption 1: It goes up.\nOption 2: It goes down.",
        "answer": "Option 2: It goes down.",
    }
    folder.json("questions/caption_matching.json", {"1": {"order": [match]}})
    folder.videos("videos/1.mp4")


def cgbench(folder: Folder) -> None:
    row = {
        "video_uid": "v",
        "question": "Which?",
        "choices": [*_BARE, "five", "six"],
        "clue_intervals": [[8, 11]],
        "domain": "Art",
        "duration": 40,
    }
    rows = [
        row | {"qid": 14, "answer": "six", "right_answer": "F", "sub_category": "OCR"},
        row | {"qid": 19, "answer": "red", "right_answer": "A", "sub_category": "Time"},
    ]
    folder.json("cgbench_mini.json", rows)
    folder.videos("cg_videos_720p/v.mp4")


def charades(folder: Folder) -> None:
    lines = ["3MSZA 24.0 30.0##person turn a light on.", "3MSZA 0.0 10.0##they sit."]
    folder.text("Charades_anno/charades_sta_test.txt", "\n".join(lines) + "\n\n")
    folder.text(
        "Charades_anno/Charades_v1_test.csv", "id,subject,length\n3MSZA,X,30.96\n"
    )
    folder.videos("Charades_v1_480/3MSZA.mp4")


def activitynet(folder: Folder) -> None:
    video = {
        "duration": 39.5,
        "timestamps": [[0, 10], [10, 20], [5, 39.5]],
        "sentences": [" A man sits. ", "He stands.", "He runs."],
    }
    folder.json("val_2.json", {"v_one": video})
    folder.videos("videos/v_one.mp4")


def tvgbench(folder: Folder) -> None:
    row = {
        "path": "./dataset/timer1/videos/tvgbench_data/v.mp4",
        "question": "a person sits.",
        "question_type": "video temporal grounding",
        "qsemtype": "Human Pose",
    }
    whole = {"answer": "10.0-20.0", "start": None, "end": None, "duration": 40.0}
    window = {"answer": "0.5-4.5", "start": 30.0, "end": 38.0, "duration": 8.0}
    folder.json("tvgbench.json", [row | whole, row | window])
    folder.videos("videos/v.mp4")


def vdc(folder: Folder) -> None:
    kinds = ("short", "background", "main_object", "camera", "detailed")
    captions = {f"{kind}_caption": f"True {kind}." for kind in kinds}
    video = {"video_id": "id-1", "video_name": "v.mp4", **captions}
    folder.jsonl("VDC_1k.jsonl", [video])
    for kind in kinds:
        facts = [{"question": f"{kind} {n}?", "answer": n} for n in ("one", "two")]
        folder.jsonl(f"VDCScore_qa/{kind}.jsonl", [{"id-1": facts}, {"other": []}])
    folder.videos("videos/v.mp4")


def youcook2(folder: Folder) -> None:
    steps = [
        {"segment": [0, 10], "id": 0, "sentence": "cut the bread in two"},
        {"segment": [20, 40], "id": 1, "sentence": "spread the butter on it"},
    ]
    video = {"duration": 40.0, "recipe_type": "113", "annotations": steps}
    database = {
        "mixer": video | {"subset": "validation"},
        "train": video | {"subset": "training"},
    }
    path = "annotations/youcookii_annotations_trainval.json"
    folder.json(path, {"database": database})
    folder.videos("raw_videos/validation/113/mixer.mkv")
