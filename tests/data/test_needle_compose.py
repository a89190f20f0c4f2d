"""Composed videos: the needle lies where it is said to, all else shows nothing."""

import json
import pathlib

import numpy as np
import pytest

from timeviper_jax.data import needle_questions
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.data.needle_compose import Moments
from timeviper_jax.data.needle_scenes import SceneConfig, draw_scene
from timeviper_jax.data.needle_sources import NAMES

LENGTHS = (32, 32, 200, 512)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    """Scenes on paper and, for each second, a feature that says what it is of."""
    out = tmp_path_factory.mktemp("composed")
    store, lines = FeatureStore(out / "features", "numbers"), []
    for i, length in enumerate(LENGTHS):
        rng = np.random.default_rng(i)
        scene = draw_scene(rng, 0, length, NAMES, SceneConfig())
        image = f"heldout/{i}.mp4"
        (out / image).parent.mkdir(exist_ok=True)
        (out / image).write_text(image)
        lines.append({"scene": image, **needle_questions.where(scene, image)})
        features = np.zeros((length, 1, 3), np.float16)
        features[:, 0, 0], features[:, 0, 1] = i, np.arange(length)
        for showing in scene.showings:
            number = NAMES.index(showing.name) + 1
            features[showing.start : showing.stop, 0, 2] = number
        store.put(str(out / image), features)
    (out / "heldout.scenes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return out


@pytest.fixture(scope="module")
def moments(data) -> Moments:
    return Moments(data, "heldout")


@pytest.fixture(scope="module")
def store(data) -> FeatureStore:
    return FeatureStore(data / "features", "numbers")


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("seconds", [32, 300])
def test_the_needle_is_where_it_is_said_to_be_and_nothing_else_is_shown(
    moments, store, seconds, depth
):
    for number in range(5):
        video = moments.compose(0, number, seconds, depth)
        shown = video.features(store)[:, 0, 2]
        showing = video.showing
        expected = np.zeros(seconds)
        number = NAMES.index(showing.name) + 1
        expected[showing.start : showing.stop] = number
        np.testing.assert_array_equal(shown, expected)
        room = seconds - (showing.stop - showing.start)
        assert showing.start == round(depth * room)


def test_a_needle_is_a_whole_showing_and_no_second_is_there_twice(moments, store):
    video = moments.compose(0, 3, 300, 0.5)
    whole = {(p.start, p.stop) for p in moments.showings[video.showing.name]}
    assert any((p.start, p.stop) in whole for p in video.pieces)
    places = [tuple(second) for second in video.features(store)[:, 0, :2]]
    assert len({*places}) == 300


def test_depth_moves_the_needle_and_changes_nothing_else(moments, store):
    early, late = (moments.compose(0, 7, 100, depth) for depth in (0.0, 0.75))
    assert early.showing.name == late.showing.name
    rest = [
        np.delete(v.features(store), slice(v.showing.start, v.showing.stop), axis=0)
        for v in (early, late)
    ]
    np.testing.assert_array_equal(*rest)


def test_videos_follow_from_the_seed_and_their_number(moments):
    assert moments.compose(4, 2, 64, 0.5) == moments.compose(4, 2, 64, 0.5)
    others = [moments.compose(*place, 64, 0.5) for place in [(4, 2), (4, 3), (5, 2)]]
    assert len({video.pieces for video in others}) == 3


def test_answers_are_those_of_the_composed_video(moments):
    for number in range(20):
        video = moments.compose(0, number, 128, 0.25)
        kinds = ("mcq", "what", "when")
        mcq, what, when = video.ask(np.random.default_rng(number), kinds)
        showing = video.showing
        assert mcq.answer == what.answer == showing.name
        assert mcq.text.count(showing.name) == 1
        assert when.answer == f"{showing.start:05d} to {showing.stop:05d}"
        assert f"the {showing.name} " in when.text


def test_a_single_needle_cannot_come_first(moments):
    with pytest.raises(ValueError, match=r"no questions of kinds \['first'\]"):
        moments.compose(0, 0, 64, 0.0).ask(np.random.default_rng(0), ("first",))


def test_only_held_out_files_are_read(moments):
    assert moments.videos
    assert all("/heldout/" in video for video in moments.videos)


def test_too_little_haystack_is_an_error(moments):
    with pytest.raises(ValueError, match="of haystack and .* larger --scale"):
        moments.compose(0, 0, 5000, 0.0)


def test_missing_data_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="timeviper_jax.data.needles --out"):
        Moments(tmp_path, "heldout")
