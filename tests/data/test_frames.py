"""Frames without questions: halves that show something, and videos put together."""

import functools

import numpy as np
import pytest

from tests.data.conftest import read
from timeviper_jax.data import frames, manifest, shapes
from timeviper_jax.data.media import MediaLimits, VideoError
from timeviper_jax.data.workers import WorkerConfig, decoder


def _records(count, size=10):
    """Every fifth frame shows something: it is bright, and its label its number."""
    for i in range(count):
        numbers = np.arange(i * size, (i + 1) * size)
        shows = numbers % 5 == 1
        pixels = np.zeros((size, 2, 2, 3), np.uint8)
        pixels[:] = np.where(shows, 200, 20)[:, None, None, None]
        labels = np.where(shows, numbers, 0)
        place = {"file": f"{i // 2}.mp4", "start": i % 2 * size}
        yield {"frames": pixels, "labels": labels, **place}


def _batches(**changes):
    options = dict(batch_size=16, per_record=4, share=0.5, seed=0) | changes
    return frames.make_frame_batches(list(_records(8)), **options)


def test_a_share_of_a_batch_shows_something():
    batch = next(_batches())
    assert batch.frames.shape == (16, 2, 2, 3)
    assert np.sum(batch.labels > 0) == 8
    bright = batch.frames.mean(axis=(1, 2, 3)) > 100
    np.testing.assert_array_equal(bright, batch.labels > 0)
    assert np.sum(next(_batches(share=0.25)).labels > 0) == 4


def test_a_resumed_iterator_draws_the_same_frames():
    batches = _batches()
    next(batches)
    state = batches.get_state()
    want = [next(batches) for _ in range(3)]
    resumed = _batches()
    resumed.set_state(state)
    for one in want:
        np.testing.assert_array_equal(next(resumed).frames, one.frames)


def test_hosts_share_the_frames_of_one():
    whole = next(_batches(lanes=2))
    halves = [
        next(_batches(lanes=2, process_index=i, process_count=2)) for i in range(2)
    ]
    together = np.concatenate([half.labels for half in halves])
    np.testing.assert_array_equal(together, whole.labels)
    np.testing.assert_array_equal(sorted(whole.labels), sorted(next(_batches()).labels))


def test_a_batch_knows_its_records():
    batches = _batches()
    batch = next(batches)
    # Frame 10 i + 1 or 6 is of record i.
    records = {label // 10 for label in batch.labels[batch.labels > 0]}
    names = {f"{i // 2}.mp4@{i % 2 * 10}" for i in records}
    assert len(batches.samples) == 4 and set(batches.samples) == names


def test_a_batch_must_divide_into_records():
    with pytest.raises(ValueError, match="batch_size=18 does not divide among 1 lanes"):
        _batches(batch_size=18)


def test_recorded_videos_are_whole():
    files = dict(frames.recorded_videos(_records(4)))
    assert list(files) == ["0.mp4", "1.mp4"]
    bright = np.flatnonzero(files["1.mp4"][:, 0, 0, 0] == 200)
    assert bright.tolist() == [1, 6, 11, 16]


def test_decoded_videos_have_a_frame_a_second(film):
    paths = [str(film("a.mp4", 5)), str(film("b.mp4", 3))]
    media = decoder(MediaLimits(), WorkerConfig())
    videos = list(frames.decoded_videos(paths, 64, num_threads=2, media=media))
    assert [path for path, _ in videos] == paths
    assert [read(f) for _, f in videos] == [[0, 1, 2, 3, 4], [0, 1, 2]]


def test_videos_that_cannot_be_read_are_told_of(film, tmp_path):
    paths = [str(tmp_path / "missing.mp4"), str(film("b.mp4", 3))]
    told = []
    videos = functools.partial(
        frames.decoded_videos,
        *(paths, 64),
        num_threads=2,
        media=decoder(MediaLimits(), WorkerConfig()),
    )
    ((path, _),) = videos(on_error=lambda *found: told.append(found))
    assert path == paths[1]
    ((path, error),) = told
    assert path == paths[0] and isinstance(error, VideoError)
    with pytest.raises(VideoError, match="missing.mp4: no such file"):
        list(videos())


def test_the_squares_are_a_manifest_of_both_kinds(tmp_path):
    shapes.make(tmp_path / "squares")
    path = tmp_path / "squares" / "data.yaml"
    for split, kind in (("videos", "conversation"), ("images", "caption")):
        items = manifest.load(path, split)
        assert [item.id for item in items] == list(shapes.COLOURS)
        assert {item.dataset.format for item in items} == {kind}
