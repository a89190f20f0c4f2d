"""Published benchmarks: read from their files, asked as agreed, scored as by hand."""

import json

import numpy as np
import published_fixtures as fixtures
import pytest

from timeviper_jax.evals import runner, scores
from timeviper_jax.evals.entries import DataError, Row, find_video, subtitle_file
from timeviper_jax.evals.families import Tools, parse_letter
from timeviper_jax.evals.published import SPECS, PublishedBenchmark

OPTIONS = ("A. red", "B. green", "C. blue")


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    return fixtures.write_video(tmp_path_factory.mktemp("video") / "v.mp4")


@pytest.fixture
def folder(video, tmp_path):
    return fixtures.Folder(tmp_path / "data", video)


def benchmark(name: str, folder: fixtures.Folder, **options) -> PublishedBenchmark:
    getattr(fixtures, name)(folder)
    return PublishedBenchmark(name=name, data=str(folder.root), **options)


def values(benchmark: PublishedBenchmark, given: list[str]) -> dict[tuple, float]:
    """What answers in the order of the questions are worth, by group and metric."""
    records = [
        runner.record(question, text, benchmark)
        for question, text in zip(benchmark.questions(), given, strict=True)
    ]
    groups = {entry.id: entry.groups for entry in benchmark.entries}
    found = scores.summarise(records, groups, mean_of=benchmark.spec.mean_of)
    assert all(s.low <= s.value + 1e-9 and s.value <= s.high + 1e-9 for s in found)
    return {(s.group, s.metric): s.value for s in found}


# What is answered, in the published order, and what that is worth.
CHOICES = {
    "videomme": (
        ["A) red", "(C) blue", "no idea", "D"],
        {
            "all": 2 / 4,
            "duration=short": 1 / 2,
            "duration=long": 1 / 2,
            "task=Counting Problem": 1 / 2,
            "task=OCR Problems": 1 / 2,
            "domain=Knowledge": 2 / 4,
        },
    ),
    "lvbench": (
        ["A", "A", "C. blue"],
        {"all": 2 / 3, "task=entity recognition": 2 / 2, "task=reasoning": 1 / 2},
    ),
    # 2_needle, 4_count and 1_plotQA come in the order of their files.
    "mlvu": (
        ["A", "A", "B", "A", "C", "D"],
        {
            "all": (2 / 3 + 1 / 2 + 1) / 3,
            "task=plotQA": 2 / 3,
            "task=findNeedle": 1 / 2,
            "task=count": 1,
        },
    ),
    "longvideobench": (["D", "B"], {"all": 1 / 2, "duration=60": 1, "task=S2E": 1 / 2}),
    "egoschema": (["E", "B"], {"all": 1 / 2}),
    # action_sequence, episodic_reasoning, then moving_count twice.
    "mvbench": (
        ["B", "C", "A", "B"],
        {"all": (1 + 1 + 1 / 2) / 3, "task=moving_count": 1 / 2},
    ),
    "tempcompass": (
        ["B", "B) no", "A. yes", "It goes down"],
        {
            "all": 3 / 4,
            "kind=yes_no": 1 / 2,
            "kind=caption_matching": 1,
            "task=direction": 2 / 2,
        },
    ),
    "cgbench": (["F", "B"], {"all": 1 / 2, "task=OCR": 1, "domain=Art": 1 / 2}),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_score_as_by_hand(name, folder):
    given, expected = CHOICES[name]
    found = values(benchmark(name, folder), given)
    for group, value in expected.items():
        assert found[group, "accuracy"] == pytest.approx(value), group
    unparsed = 1 / 4 if name == "videomme" else 0
    assert found["all", "unparsed"] == unparsed


def test_a_choice_is_put_as_the_paper_does(folder):
    question = benchmark("videomme", folder).questions()[0]
    ((media, text),) = [turn.content for turn in question.turns]
    assert media.num_frames == len(question.times) == fixtures.SECONDS
    assert text == (
        "What colour is 001-1?\nA. red\nB. green\nC. blue\nD. none\nPlease provide your"
        " answer by stating the letter followed by the full option."
    )
    assert question.answer_prefix == "Best Option: ("
    assert question.choices == ("A", "B", "C", "D")


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "nested"])
def test_a_table_reads_alike_in_every_form(kind, folder):
    rows, names = fixtures.videomme_rows(), ("a.mp4", "b.mp4")
    folder.videos(*names)
    if kind == "csv":
        import csv

        with folder._path("videomme.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "nested":
        common = ("video_id", "duration", "domain", "sub_category")
        videos = [
            {key: row[key] for key in common}
            | {"video_id": row["videoID"]}
            | {"questions": [{k: v for k, v in row.items() if k not in common}]}
            for row in rows
        ]
        for row in videos:
            row["questions"][0].pop("videoID")
        folder.json("videomme.json", videos)
    else:
        getattr(folder, kind)(f"videomme.{kind}", rows)
    read = PublishedBenchmark(name="videomme", data=str(folder.root)).entries
    folder.parquet("videomme/test-00000-of-00001.parquet", rows)
    published = PublishedBenchmark(name="videomme", data=str(folder.root)).entries
    assert read == published


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B) green", "B"),
        ("B", "B"),
        (" (C)", "C"),
        ("B\nbecause A. is wrong", "B"),
        ("The best answer is C.", "C"),
        ("I would choose (B), green", "B"),
        ("Option B", "B"),
        ("green", "B"),
        ("Green.", "B"),
        # None, more than one, or one that is not there.
        ("", None),
        ("A man walks", None),
        ("It is either A or B", None),
        ("between (A) and (B)", None),
        ("D) none", None),
        ("a green one", None),
    ],
)
def test_an_answer_settles_for_one_letter_or_none(text, letter):
    assert parse_letter(text, OPTIONS) == letter


def test_clips_are_watched_between_start_and_end(folder):
    first, second, *_ = benchmark("mvbench", folder).questions()
    assert len(first.times) == 32  # Ten seconds, but at least so many frames.
    assert 10 < first.times[0] and first.times[-1] < 20
    np.testing.assert_allclose(np.diff(first.times), 10 / 32)
    # A folder of three frames a second, whose files count as one each.
    assert 3 < second.times[0] and second.times[-1] < 9


def test_a_long_video_has_its_frames_spread(folder):
    question = benchmark("videomme", folder, max_frames=8, min_frames=4).questions()[0]
    np.testing.assert_allclose(question.times, (np.arange(8) + 0.5) * 5)


def test_subtitles_of_the_frames_come_before_the_question(folder):
    first, *_, last = benchmark("videomme", folder, subtitles=True).questions()
    said = "Subtitles of the video:\nHello there.\nGood bye.\nWhat colour"
    assert first.turns[0].content[1].startswith(said)
    # A video without any is asked all the same.
    none = "Subtitles of the video:\n(none)\nWhat"
    assert last.turns[0].content[1].startswith(none)


def test_a_missing_folder_of_subtitles_is_named(folder):
    fixtures.videomme(folder)
    (folder.root / "subtitle/a.srt").unlink()
    (folder.root / "subtitle").rmdir()
    asked = PublishedBenchmark(name="videomme", data=str(folder.root), subtitles=True)
    with pytest.raises(DataError, match="a.srt: its folder of subtitles is not there"):
        asked.questions()


def test_a_subtitle_without_a_time_is_named(folder):
    fixtures.videomme(folder)
    folder.text("subtitle/a.srt", "1\n00:00 --> 00:02\nHello")
    asked = PublishedBenchmark(name="videomme", data=str(folder.root), subtitles=True)
    with pytest.raises(DataError, match="a.srt: '00:00' is no time"):
        asked.questions()


def test_subtitles_of_a_part_have_its_clock(folder):
    first, _ = benchmark("longvideobench", folder, subtitles=True).questions()
    said = "Subtitles of the video:\nFirst.\nLast.\nWhich?"
    assert first.turns[0].content[1].startswith(said)


GROUNDING = {
    # 24 to 30: overlap 4 of 6 and 5 of 15 seconds.
    "charades": (["from 24 to 28", "5 to 15"], [4 / 6, 5 / 15]),
    "activitynet": (["0 to 10", "20 to 10", "sometime"], [1, 0, 0]),
    "tvgbench": (["10 to 15, or rather 12 to 20.0", "0.5 to 4.5"], [8 / 10, 1]),
}


@pytest.mark.parametrize("name", GROUNDING)
def test_moments_score_as_by_hand(name, folder):
    given, overlaps = GROUNDING[name]
    found = values(benchmark(name, folder), given)
    assert found["all", "mIoU"] == pytest.approx(np.mean(overlaps))
    for low in (0.3, 0.5, 0.7):
        share = np.mean(np.array(overlaps) >= low)
        assert found["all", f"R@1 {low}"] == pytest.approx(share)
    unparsed = sum(" to " not in text for text in given) / len(given)
    assert found["all", "unparsed"] == pytest.approx(unparsed)


def test_a_moment_is_asked_with_the_published_length(folder):
    question = benchmark("charades", folder).questions()[0]
    asked = question.turns[0].content[1]
    assert asked.startswith("The video lasts for 30.96 seconds, and 40 frames are")
    assert "'person turn a light on.'" in asked
    assert question.answer == "24 to 30"


def test_a_window_is_a_video_of_its_own(folder):
    _, window = benchmark("tvgbench", folder).questions()
    assert 30 < window.times[0] and window.times[-1] < 38
    asked = window.turns[0].content[1]
    assert asked.startswith("The video lasts for 8 seconds, and 32 frames")


def test_steps_score_as_by_hand(folder):
    steps = benchmark("youcook2", folder)
    (question,) = steps.questions()
    assert question.video.endswith("raw_videos/validation/113/mixer.mkv")
    # The first step to the second, another one where nothing happens.
    given = "0 - 10 seconds, cut the bread in two\n12 - 18 seconds, drink tea"
    found = values(steps, [given])
    for low in (0.3, 0.5, 0.7, 0.9):
        assert found["all", f"F1 {low}"] == pytest.approx(1 / 2)
    assert found["all", "F1"] == pytest.approx(1 / 2)
    # Two pairs, the second with garbage: words of the first are in one of two.
    assert found["all", "CIDEr"] == pytest.approx((10 + 0) / 2)
    assert ("all", "METEOR") not in found
    assert values(steps, ["They cook."])["all", "unparsed"] == 1


def test_captions_are_judged_as_by_hand(folder):
    asked = []

    def judge(system: str, user: str) -> str:
        asked.append(user)
        if user.startswith("Description"):
            return "one"
        if "Correct answer: one" in user:
            return "{'pred': 'yes', 'score': 5}"
        return "{'pred': 'no', 'score': 2}"

    captions = benchmark("vdc", folder, tools=Tools(judge=judge))
    found = values(captions, ["A caption."] * 5)
    assert found["all", "accuracy"] == 1 / 2
    assert found["all", "score"] == (5 + 2) / 2
    assert found["task=camera", "score"] == 3.5
    assert asked[0] == "Description: A caption.\n\nQuestion: short one?"
    assert len(asked) == 5 * 2 * 2


def test_captions_want_a_judge(folder):
    captions = benchmark("vdc", folder)
    with pytest.raises(ValueError, match="--judge"):
        values(captions, ["A caption."] * 5)


def test_only_and_limit_choose_questions(folder):
    fixtures.videomme(folder)
    ids = lambda **options: [
        entry.id
        for entry in PublishedBenchmark(
            name="videomme", data=str(folder.root), **options
        ).entries
    ]
    assert ids(only=("duration=long",)) == ["601-1", "601-2"]
    assert ids(only=("001-2", "task=Count*")) == ["001-1", "001-2", "601-1"]
    assert len(ids(limit=2)) == 2 and ids(limit=2) == ids(limit=2)
    assert len({tuple(ids(limit=2, seed=seed)) for seed in range(8)}) > 1
    assert len(ids(limit=9)) == 4
    with pytest.raises(ValueError, match="fits none of 4 questions.*duration=long"):
        ids(only=("duration=medium",))


@pytest.mark.parametrize("name", SPECS)
def test_a_missing_folder_or_file_is_one_clear_line(name, tmp_path):
    for root, says in ((tmp_path / "none", "no such folder"), (tmp_path, "put ")):
        with pytest.raises(DataError, match=says) as error:
            _ = PublishedBenchmark(name=name, data=str(root)).entries
        assert str(root) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_field_is_named(folder):
    rows = fixtures.videomme_rows()
    del rows[2]["options"]
    folder.json("videomme.json", rows)
    with pytest.raises(DataError, match="videomme.json: record 2 lacks 'options'"):
        _ = PublishedBenchmark(name="videomme", data=str(folder.root)).entries


def test_a_number_that_is_not_there_is_named():
    row = Row({"correct_choice": float("nan")}, "a.parquet: record 0")
    with pytest.raises(DataError, match="record 0: correct_choice=nan is not a num"):
        row.number("correct_choice")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "http://x/y.mp4"])
def test_a_benchmark_names_nothing_outside_its_folder(tmp_path, name):
    for find in (find_video, subtitle_file):
        with pytest.raises(DataError, match=f"the name '{name}': (a URL|leads out)"):
            find(tmp_path, name)


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("answer", "E", "answer='E' is none of 4"),
        ("options", 3, "not a list of texts"),
        ("options", "red, green", "not a list of texts"),
        ("question", ["Why?"], "not a text"),
        ("question_id", "001-1", "1 ids come twice"),
    ],
)
def test_a_field_that_cannot_be_meant_is_named(field, value, says, folder):
    rows = fixtures.videomme_rows()
    rows[2][field] = value
    folder.json("videomme.json", rows)
    with pytest.raises(DataError, match=says):
        _ = PublishedBenchmark(name="videomme", data=str(folder.root)).entries


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("videomme.json", "[{", "no JSON"),
        ("videomme.json", "{}", "no list of records"),
        ("videomme.jsonl", '{"a": 1}\n{', "line 2"),
        ("videomme.parquet", "hello", "no parquet"),
    ],
)
def test_a_broken_file_is_named(name, content, says, folder):
    folder.text(name, content)
    with pytest.raises(DataError, match=f"{name}.*{says}"):
        _ = PublishedBenchmark(name="videomme", data=str(folder.root)).entries


def test_missing_videos_are_named_or_left_out(folder):
    fixtures.videomme(folder)
    (folder.root / "data/b.mp4").unlink()
    arguments = dict(name="videomme", data=str(folder.root))
    with pytest.raises(DataError, match="1 of 2 videos are missing.*data/b.mp4"):
        _ = PublishedBenchmark(**arguments).entries
    left = PublishedBenchmark(**arguments, skip_missing=True).entries
    assert [entry.id for entry in left] == ["001-1", "001-2"]


def test_unknown_names_and_subtitles_are_refused():
    with pytest.raises(ValueError, match="'imagenet' is no benchmark"):
        PublishedBenchmark(name="imagenet", data="")
    with pytest.raises(ValueError, match="mvbench has no subtitles"):
        PublishedBenchmark(name="mvbench", data="", subtitles=True)


def test_a_mean_of_tasks_has_an_interval_within_tasks():
    from timeviper_jax.evals.base import Record

    records = [
        Record(
            id=f"{task}{i}",
            video=f"{i}",
            frames=1,
            kind="k",
            depth=None,
            answer="",
            given="",
            scores={"accuracy": float(right)},
        )
        for task, rights in {"a": [1] * 99 + [0], "b": [0]}.items()
        for i, right in enumerate(rights)
    ]
    groups = {record.id: (f"task={record.id[0]}",) for record in records}
    found = scores.summarise(records, groups, mean_of="task")[0]
    assert (found.group, found.value) == ("all", pytest.approx(0.495))
    # A lone question cannot vary; a hundred hardly do.
    assert 0.48 < found.low < found.high <= 0.5
    printed = scores.table(scores.summarise(records, groups), "accuracy")
    assert printed.splitlines()[1].split() == "all 98.0 [95.0, 100.0] 101".split()
    json.dumps(scores.as_json([found]))
