"""Features are found by what a file holds and by who encoded it."""

import errno
import os
import pathlib
import re
import shutil

import numpy as np
import pytest

from timeviper_jax.data import features as data_features
from timeviper_jax.data.features import FeatureStore, second_times
from timeviper_jax.data.video import VideoError


@pytest.fixture
def video(film, tmp_path):
    return shutil.copy(film("seconds.mp4", 10), tmp_path / "video.mp4")


def features(num_frames=10):
    rng = np.random.default_rng(0)
    return rng.normal(size=(num_frames, 2, 3)).astype(np.float16)


def test_what_was_put_is_got(tmp_path, video):
    store = FeatureStore(tmp_path / "store", "vit-1")
    assert video not in store
    store.put(video, features())
    assert video in store
    np.testing.assert_array_equal(store.get(video), features())
    again = FeatureStore(tmp_path / "store", "vit-1")
    np.testing.assert_array_equal(again.get(video), features())


def test_a_full_disk_leaves_nothing_behind(tmp_path, video, monkeypatch):
    def full(file, _):
        file.write(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    store = FeatureStore(tmp_path / "store", "vit-1")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space"):
        store.put(video, features())
    assert video not in store
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_a_moved_file_keeps_its_features_and_a_changed_one_loses_them(
    film, tmp_path, video
):
    store = FeatureStore(tmp_path / "store", "vit-1")
    store.put(video, features())
    moved = shutil.move(video, tmp_path / "moved.mp4")
    assert moved in store
    shutil.copy(film("other.mp4", 11), video)
    assert video not in store
    with pytest.raises(LookupError, match="video.mp4 by 'vit-1'.*encode the videos"):
        store.get(video)


def test_another_encoder_has_other_features(tmp_path, video):
    FeatureStore(tmp_path / "store", "vit-1").put(video, features())
    assert video not in FeatureStore(tmp_path / "store", "vit-2")


def test_times_find_the_second_they_lie_in(tmp_path, video):
    store = FeatureStore(tmp_path / "store", "vit-1")
    store.put(video, features())
    got = store.at(video, np.array([0.0, 0.99, 3.5, 9.9, 10.0]))
    np.testing.assert_array_equal(got, features()[[0, 0, 3, 9, 9]])
    assert second_times(3.4).tolist() == [0.5, 1.5, 2.5]
    assert second_times(0.3).tolist() == [0.3]


def test_each_choice_of_moments_is_kept_for_itself(tmp_path, video):
    store = FeatureStore(tmp_path / "store", "vit-1")
    for number, times in enumerate((second_times(10), np.arange(1, 9) / 2)):
        assert store.find(video, times) is None
        made = features(len(times)) + np.float16(number)
        store.grow(video, times, tokens=2, width=3).append(made)
        np.testing.assert_array_equal(store.find(video, times)[:], made)
    np.testing.assert_array_equal(store.get(video), features())
    np.testing.assert_array_equal(store.find(video, second_times(6))[:], features()[:6])
    assert store.find(video, second_times(6) + 0.1) is None


def test_a_large_file_is_read_once_for_its_name_and_again_when_it_changed(
    tmp_path, video, monkeypatch
):
    monkeypatch.setattr(data_features, "_LARGE_FILE", 1)
    FeatureStore(tmp_path / "store", "vit-1").put(video, features())
    digest = data_features.file_digest
    monkeypatch.delattr(data_features, "file_digest")
    store = FeatureStore(tmp_path / "store", "vit-1")
    assert video in store
    with open(video, "ab") as file:
        file.write(b"more")
    with pytest.raises(NameError):
        store.get(video)
    monkeypatch.setattr(data_features, "file_digest", digest, raising=False)
    assert video not in store


def test_a_write_that_fails_leaves_nothing_to_be_found(tmp_path, video, monkeypatch):
    store = FeatureStore(tmp_path / "store", "vit-1")

    def fail(file, array):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        store.put(video, features())
    assert video not in store


def test_a_file_that_was_refused_is_not_tried_again(tmp_path, video):
    store = FeatureStore(tmp_path / "store", "vit-1")
    assert store.lacks(video)
    store.refuse(video, VideoError("cut short"))
    again = FeatureStore(tmp_path / "store", "vit-1")
    assert not again.lacks(video) and video not in again
    with pytest.raises(VideoError, match=r"refused .*cut short.* remove (.*) to") as e:
        again.at(video, np.zeros(1))
    pathlib.Path(re.search("remove (.*) to", str(e.value))[1]).unlink()
    assert again.lacks(video)
    again.put(video, features())
    assert not again.lacks(video)


def test_what_may_never_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    store = FeatureStore(tmp_path / "store", "vit-1")
    assert not store.lacks(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="pipe.mp4: no such file, or no plain one"):
        store.get(tmp_path / "pipe.mp4")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(VideoError, match="missing.mp4: no such file"):
        FeatureStore(tmp_path, "vit-1").get(tmp_path / "missing.mp4")
