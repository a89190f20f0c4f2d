"""Manifests are read as documented, and what is wrong is said in one line."""

import json

import numpy as np
import pytest
import yaml

from timeviper_jax.data import manifest
from timeviper_jax.data.conversation import Media, Turn
from timeviper_jax.data.manifest_rules import ManifestError, ManifestLimits

TALK = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
]


def rng():
    return np.random.default_rng(0)


@pytest.fixture
def write(tmp_path):
    """Writes items and a manifest of one data set; returns the manifest's path."""

    def write(items, lines=False, **entry):
        name = "items.jsonl" if lines else "items.json"
        text = "\n".join(map(json.dumps, items)) if lines else json.dumps(items)
        (tmp_path / name).write_text(text)
        entry = {"name": "a", "format": "conversation", "json_path": name, **entry}
        path = tmp_path / "data.yaml"
        path.write_text(yaml.safe_dump({"data": [entry]}))
        return path

    return write


@pytest.mark.parametrize("lines", [False, True])
def test_conversations_from_json_and_json_lines(write, tmp_path, lines):
    item = {"id": "x", "image": "x.mp4", "conversations": TALK}
    path = write([item, item], lines, data_path="videos")
    items = manifest.load(path, "train")
    assert len(items) == 2
    assert items[0].media == (str(tmp_path / "videos" / "x.mp4"),)
    assert items[0].turns([8], 8.0, rng()) == [
        Turn("user", (Media(8), "What is it?")),
        Turn("assistant", ("A cat.",)),
    ]


@pytest.mark.parametrize(
    "question, want",
    [
        ("<image>\nWhich?<image>", (Media(1), "Which?", Media(2))),
        ("First <image>\nthen\n<image>.", ("First ", Media(1), "then", Media(2), ".")),
        ("<image>\nWhich?", (Media(1), Media(2), "Which?")),
        ("Which?", (Media(1), Media(2), "Which?")),
    ],
)
def test_media_take_the_places_of_their_markers(write, question, want):
    talk = [{"from": "human", "value": question}, TALK[1]]
    path = write([{"image": "a.jpg | b.jpg", "conversations": talk}])
    (item,) = manifest.load(path, "train")
    assert [m.rsplit("/")[-1] for m in item.media] == ["a.jpg", "b.jpg"]
    assert item.turns([1, 2], 2.0, rng())[0] == Turn("user", want)


def test_captions_get_a_question(write):
    item = {"id": "x", "image": "x.jpg", "caption": "A red bus."}
    path = write([item], format="caption", dataset_type="image")
    (item,) = manifest.load(path, "train")
    question, answer = item.turns([1], 1.0, rng())
    assert question.content[0] == Media(1) and "image" in question.content[1]
    assert answer == Turn("assistant", ("A red bus.",))


def test_grounding_says_how_long_the_video_is(write):
    talk = [
        {"from": "human", "value": "a man sits down"},
        {"from": "gpt", "value": "3.5 to 7.0"},
    ]
    item = {"image": "x.mp4", "duration": 30.961, "conversations": talk}
    (item,) = manifest.load(write([item], format="tvg"), "train")
    assert item.turns([8], 8.0, rng())[0].content == (
        Media(8),
        "The video lasts for 30.96 seconds, and 8 frames are uniformly sampled from it."
        " When does this happen in the video: 'a man sits down'? Answer with the start"
        " and the end in seconds, as 'start to end'.",
    )


def test_dense_captions_keep_their_question(write):
    item = {"image": "x.mp4", "conversations": TALK}
    (item,) = manifest.load(write([item], format="dvc"), "train")
    assert item.turns([4], 16.0, rng())[0].content == (
        Media(4),
        "The video lasts for 16 seconds, and 4 frames are uniformly sampled from it."
        " What is it?",
    )


@pytest.mark.parametrize(
    "keys, want",
    [
        ({}, [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]),
        ({"video_sample_type": "fps0.5"}, [1, 3, 5]),
        ({"max_num_frames_fps": 2}, [1.5, 4.5]),
        ({"min_num_frames_fps": 8}, (np.arange(8) + 0.5) * 0.75),
        ({"video_sample_type": "middle", "video_num_frames": 3}, [1, 3, 5]),
    ],
)
def test_sampling_rates(write, keys, want):
    path = write([{"image": "x.mp4", "conversations": TALK}], **keys)
    (item,) = manifest.load(path, "train")
    times = item.dataset.sampling.times(0, 6, rng(), capacity=100)
    np.testing.assert_allclose(times, want)


def test_random_sampling_takes_one_moment_of_each_span(write):
    keys = {"video_sample_type": "rand", "video_num_frames": 4}
    path = write([{"image": "x.mp4", "conversations": TALK}], **keys)
    sampling = manifest.load(path, "train")[0].dataset.sampling
    times = sampling.times(10, 18, rng(), capacity=100)
    np.testing.assert_array_equal(np.floor((times - 10) / 2), [0, 1, 2, 3])
    assert len(set(np.round((times - 10) % 2, 3))) == 4


def test_a_row_that_holds_less_spreads_the_frames(write):
    path = write([{"image": "x.mp4", "conversations": TALK}], min_num_frames_fps=8)
    sampling = manifest.load(path, "train")[0].dataset.sampling
    np.testing.assert_allclose(sampling.times(0, 6, rng(), capacity=3), [1, 3, 5])


@pytest.mark.parametrize(
    "keys, want",
    [({"max_size": 3}, 3), ({"sample_ratio": 0.5}, 5), ({"sample_ratio": 2.3}, 23)],
)
def test_sizes_and_ratios(write, keys, want):
    raw = [{"id": i, "image": "x.mp4", "conversations": TALK} for i in range(10)]
    ids = [item.id for item in manifest.load(write(raw, **keys), "train")]
    assert len(ids) == want
    counts = [ids.count(str(i)) for i in range(10)]
    assert max(counts) - min(counts[: want if want < 5 else 10]) <= 1
    assert ids == [item.id for item in manifest.load(write(raw, **keys), "train")]


def test_windows_and_notes_are_carried(write):
    raw = {
        "image": "x.mp4",
        "conversations": TALK,
        "video_start": 32,
        "video_end": 64,
        "needle": {"kind": "mcq"},
    }
    (item,) = manifest.load(write([raw]), "train")
    assert (item.start, item.end, item.notes) == (32, 64, {"kind": "mcq"})


def test_items_are_chosen_by_their_notes(write):
    notes = [("mcq", 32), ("when", 32), ("when", 512), ("what", 32)]
    raw = [
        {"image": "x.mp4", "conversations": TALK, "needle": {"kind": k, "frames": f}}
        for k, f in notes
    ]
    items = manifest.load(write(raw), "train")
    where = (("kind", ("mcq", "when")), ("frames", (32,)))
    chosen = manifest.select(items, where)
    assert [item.notes["kind"] for item in chosen] == ["mcq", "when"]
    assert manifest.select(items, ()) == items
    with pytest.raises(ManifestError, match="None of 4 items"):
        manifest.select(items, (("kind", ("whne",)),))


def _item(**changes):
    return {"id": "x", "image": "x.mp4", "conversations": TALK, **changes}


@pytest.mark.parametrize(
    "items, keys, message",
    [
        ([_item(imgae="y")], {}, r"item 0: unknown \['imgae'\]"),
        ([_item(), _item(conversations=[])], {}, r"item 1 \(id 'x'\): 'conversations'"),
        ([_item(conversations=TALK[:1])], {}, "the last turn is no answer"),
        ([_item(conversations=TALK[1:])], {}, "turn 0: from='gpt', but human and gpt"),
        ([_item(image="a.jpg | b.jpg | c.jpg", conversations=[
            {"from": "human", "value": "<image><image>?"}, TALK[1]])], {},
         "2 <image> markers for 3 media"),
        ([_item(video_start=5, video_end=4)], {}, "the window from 5 to 4 s is empty"),
        ([_item(video_end="4")], {}, "video_end is '4'; give seconds"),
        ([_item()], {"format": "caption"}, "caption is None; give a text"),
        ([_item()], {"format": "captions"}, "format='captions' is not one of"),
        ([_item()], {"pack_sise": 2}, r"data set 0: unknown \['pack_sise'\]"),
        ([_item()], {"pack_size": 2}, "items share rows if the format ends in _packed"),
        ([_item()], {"max_size": "3"}, "max_size='3' is not of type"),
        ([_item()], {"video_sample_type": "fast"}, "'fast' is none of rand, middle"),
        ([_item()], {"video_num_frames": 8}, "contradicts video_sample_type=fps1"),
        ([_item()], {"split": "val"}, r"no items of split 'train'; it has \['val'\]"),
        (["x"], {}, "item 0: not a mapping"),
        ({"data": []}, {}, "holds no list"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(write, items, keys, message):
    with pytest.raises(ManifestError, match=message) as error:
        manifest.load(write(items, **keys), "train")
    assert "\n" not in str(error.value)
    assert "data.yaml" in str(error.value) or "items.json" in str(error.value)


def test_broken_files_are_named(write, tmp_path):
    path = write([_item()], lines=True)
    (tmp_path / "items.jsonl").write_text(json.dumps(_item()) + "\n{oops")
    with pytest.raises(ManifestError, match="items.jsonl: line 2: no JSON"):
        manifest.load(path, "train")
    (tmp_path / "items.jsonl").unlink()
    with pytest.raises(ManifestError, match="items.jsonl: no such file"):
        manifest.load(path, "train")
    path.write_text("data: [")
    with pytest.raises(ManifestError, match="data.yaml: cannot be read"):
        manifest.load(path, "train")


@pytest.mark.parametrize(
    "name, reason",
    [
        ("../x.mp4", "leads out of its folder"),
        ("a/../../x.mp4", "leads out of its folder"),
        ("/etc/passwd", "leads out of its folder"),
        ("http://host/x.mp4", "a URL, but only files are read"),
        ("outside/passwd", "a link takes it out of"),
        ("x\x00.mp4", "no name of a file"),
        ("\ud800.mp4", "half a surrogate pair"),
        ("x" * 5_000, "no name of a file"),
    ],
)
def test_paths_stay_below_their_root(write, tmp_path, name, reason):
    (tmp_path / "outside").symlink_to("/etc")
    with pytest.raises(ManifestError, match=rf"item 0 \(id 'x'\): image.*{reason}"):
        manifest.load(write([_item(image=name)]), "train")
    for key in ("data_path", "json_path"):
        with pytest.raises(ManifestError, match=f"data set 0: {key}"):
            manifest.load(write([_item()], **{key: name}), "train")


def test_a_root_that_is_named_may_lie_elsewhere(write, tmp_path_factory):
    videos = tmp_path_factory.mktemp("videos")
    path = write([_item()], data_path=str(videos))
    with pytest.raises(ManifestError, match="data_path=.*leads out of its folder"):
        manifest.load(path, "train")
    (item,) = manifest.load(path, "train", root=str(videos.parent))
    assert item.media == (str(videos / "x.mp4"),)


@pytest.mark.parametrize(
    "items, keys, message",
    [
        ([_item(image=" | ".join("xxxx"))], {}, "4 media, but the limit is 3"),
        ([_item(conversations=TALK * 3)], {}, "6 turns, but the limit is 4"),
        ([_item(id="x" * 2_000)], {}, "item 0: id is .*; give a short name"),
        ([_item(id="a\nb")], {}, "item 0: id is"),
        ([_item(needle=[1])], {}, "needle is a list of 1; give a mapping"),
        ([_item(duration=float("nan"))], {}, "NaN is no number of JSON"),
        ([_item(duration=True)], {}, "duration is True; give seconds"),
        ([_item(duration=10**400)], {}, "duration is a number of many digits"),
        ([_item(frame_times=[1] * 9)], {}, "a list of at most 8 seconds"),
        ([_item()], {"sample_ratio": 1e12}, "sample_ratio=1e.12 is not between"),
        ([_item()], {"max_size": True}, "max_size=True is not of type"),
    ],
)  # fmt: skip
def test_limits_are_held(write, items, keys, message):
    limits = ManifestLimits(max_media=3, max_turns=4, max_frames=8)
    keys = {"max_num_frames_fps": 8, **keys}
    with pytest.raises(ManifestError, match=message):
        manifest.load(write(items, **keys), "train", limits=limits)


def test_bombs_are_not_unpacked(write, tmp_path):
    path = write([_item()])
    (tmp_path / "items.json").write_text("[" * 100_000)
    with pytest.raises(ManifestError, match="items.json: cannot be read: no JSON"):
        manifest.load(path, "train")
    path.write_text("a: &a [x]\ndata: [*a]\n")
    with pytest.raises(ManifestError, match=r"data.yaml: has an alias \(\*name\)"):
        manifest.load(path, "train")
    path.write_text("data: !!python/name:os.system\n")
    with pytest.raises(ManifestError, match="data.yaml: has a tag"):
        manifest.load(path, "train")


def test_only_a_line_feed_ends_a_line(write, tmp_path):
    talk = [{"from": "human", "value": "a\u2028b"}, TALK[1]]
    path = write([], lines=True)
    text = json.dumps(_item(conversations=talk), ensure_ascii=False) + "\n\n"
    (tmp_path / "items.jsonl").write_text(text, encoding="utf-8")
    (item,) = manifest.load(path, "train")
    assert item.conversation[0][1] == "a\u2028b"
