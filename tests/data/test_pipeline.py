"""Batches depend on the seed and their number, on nothing else."""

import functools
import itertools
import json
import pathlib

import grain
import numpy as np
import pytest
import yaml

from tests.data.conftest import read
from timeviper_jax.data import lanes, workers
from timeviper_jax.data.examples import Batch, Role
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.data.images import Fit
from timeviper_jax.data.media import VideoError
from timeviper_jax.data.pipeline import DataConfig, TooManyBad, make_batches
from timeviper_jax.data.tokenizer import ByteTokenizer
from timeviper_jax.data.workers import WorkerConfig

TOKENIZER = ByteTokenizer()


def item(i, **changes):
    talk = [
        {"from": "human", "value": f"<image>\nNumber {i}?"},
        {"from": "gpt", "value": f"{i}"},
    ]
    return {"id": str(i), "image": f"{i}.mp4", "conversations": talk, **changes}


@pytest.fixture(scope="module")
def write(film, tmp_path_factory):
    """Writes a manifest of items about short videos; returns its path."""
    folder = tmp_path_factory.mktemp("manifests")
    for i in range(12):
        video = folder / f"{i}.mp4"
        video.write_bytes(film(f"{2 + i % 4}s.mp4", 2 + i % 4).read_bytes())
    whole = film("2s.mp4", 2).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    numbers = itertools.count()

    def write(items, **entry):
        name = f"items{next(numbers)}"
        (folder / f"{name}.json").write_text(json.dumps(items))
        entry = {"name": name, "format": "conversation", **entry}
        entry["json_path"] = f"{name}.json"
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"data": [entry]}))
        return str(path)

    return write


@pytest.fixture(scope="module")
def dozen(write):
    """Twelve items of 2 to 5 frames, each a data set's own row."""
    return write([item(i) for i in range(12)])


@pytest.fixture(scope="module")
def packed(write):
    """The same, sampled at random moments, up to three to a row."""
    return write(
        [item(i) for i in range(12)],
        format="conversation_packed",
        pack_size=3,
        video_sample_type="rand",
    )


def config(path, **changes):
    fields = {
        "manifest": path,
        "batch_size": 4,
        "num_frames": 6,
        "text_tokens": 60,
        "tokens_per_frame": 2,
        "fit": Fit(size=16),
        **changes,
    }
    return DataConfig(**fields)


def packed_config(path, **changes):
    sizes = {"num_frames": 12, "text_tokens": 150, "num_segments": 3}
    return config(path, **sizes, pack_window=7, **changes)


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(got: list[Batch], want: list[Batch]):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        for name in ("tokens", "roles", "segment_ids", "loss_mask", "frame_times"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
        for name in ("frames", "features"):
            assert (getattr(a, name) is None) == (getattr(b, name) is None)
            if getattr(a, name) is not None:
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def numbers(batch: Batch) -> list[int]:
    """Which items a batch is about, by its answers."""
    found = []
    for tokens, roles, segments in zip(
        batch.tokens, batch.roles, batch.segment_ids, strict=True
    ):
        for segment in range(1, segments.max() + 1):
            answer = tokens[(segments == segment) & (roles == Role.ANSWER)]
            found.append(int(TOKENIZER.decode(answer.tolist())))
    return found


def test_a_batch_has_the_frames_of_its_videos(dozen):
    batch = next(make_batches(config(dozen), TOKENIZER, seed=0))
    assert batch.tokens.shape == (4, 6 * 2 + 60)
    assert batch.frames.shape == (4, 6, 16, 16, 3)
    for row, number in enumerate(numbers(batch)):
        length = 2 + number % 4
        vision = int(np.sum(batch.roles[row] == Role.VISION))
        assert vision == 2 * length
        assert read(batch.frames[row, :length]) == list(range(length))
        times = [i + 0.5 for i in range(length)] + [0] * (6 - length)
        assert batch.frame_times[row].tolist() == times


def test_the_last_frame_fills_up_its_clip(dozen):
    clips = config(dozen, num_frames=8, clip_frames=4)
    batch = next(make_batches(clips, TOKENIZER, seed=0))
    for row, number in enumerate(numbers(batch)):
        length = 2 + number % 4
        whole = 4 if length <= 4 else 8
        assert np.sum(batch.roles[row] == Role.VISION) == 2 * whole
        want = [min(i, length - 1) for i in range(whole)]
        assert read(batch.frames[row, :whole]) == want
        assert batch.frame_times[row, :whole].tolist() == [i + 0.5 for i in want]
    with pytest.raises(ValueError, match="num_frames=6 are not whole clips of 4"):
        config(dozen, clip_frames=4)


def test_rows_too_short_for_a_clip_hold_images(dozen):
    images = config(dozen, num_frames=1, clip_frames=4)
    batch = next(make_batches(images, TOKENIZER, seed=0))
    assert batch.frames.shape == (4, 1, 16, 16, 3)


def test_an_epoch_has_each_item_once_and_epochs_differ(dozen):
    batches = take(make_batches(config(dozen), TOKENIZER, seed=0), 6)
    order = [numbers(batch) for batch in batches]
    first, second = sum(order[:3], []), sum(order[3:], [])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second != sorted(second)


def test_the_seed_decides_the_order(dozen):
    def order(seed):
        batches = take(make_batches(config(dozen), TOKENIZER, seed=seed), 3)
        return [numbers(batch) for batch in batches]

    assert order(0) == order(0) != order(1)


def test_rows_are_packed(packed):
    batches = take(make_batches(packed_config(packed), TOKENIZER, seed=0), 6)
    per_row = [batch.segment_ids.max(axis=1) for batch in batches]
    assert np.max(per_row) == 3 and batches[0].num_segments == 3
    # Of the same length, so two or three to a row: an epoch takes half the batches.
    assert sorted(set(sum(map(numbers, batches), []))) == list(range(12))


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_change_nothing(packed, threads):
    want = take(make_batches(packed_config(packed), TOKENIZER, seed=3), 5)
    cfg = packed_config(packed, num_threads=threads, prefetch_examples=threads)
    assert_same(take(make_batches(cfg, TOKENIZER, seed=3), 5), want)


@pytest.mark.parametrize("steps", [0, 2, 5])
def test_a_resumed_iterator_continues_as_if_it_had_not_stopped(packed, steps):
    cfg = packed_config(packed)
    whole = make_batches(cfg, TOKENIZER, seed=1)
    take(whole, steps)
    state = json.loads(json.dumps(whole.get_state()))
    resumed = make_batches(cfg, TOKENIZER, seed=1)
    take(resumed, 1)  # What it did before does not matter.
    resumed.set_state(state)
    assert_same(take(resumed, 3), take(whole, 3))


def test_orbax_saves_and_restores_the_iterator(packed, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    cfg = packed_config(packed)
    batches = make_batches(cfg, TOKENIZER, seed=1)
    take(batches, 2)
    deaths = [("bad.mp4", 7, 0)]  # On which a worker died, in which draw.
    batches.set_state({**batches.get_state(), "deaths": {"0": deaths}})
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(
            2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches))
        )
        manager.wait_until_finished()
        restored = make_batches(cfg, TOKENIZER, seed=1)
        manager.restore(
            2,
            args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)),
        )
    assert restored.get_state()["deaths"]["0"] == deaths
    assert_same(take(restored, 2), take(batches, 2))


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_run_goes_on_alike_on_any_number_of_hosts(dozen, packed, is_packed):
    """Four lanes, on one host throughout, and on 2, 1 and 4 hosts in turn."""
    cfg = packed_config(packed, lanes=4) if is_packed else config(dozen, lanes=4)
    begin = functools.partial(make_batches, cfg, TOKENIZER, seed=2)
    want, states = _rows(begin(), 6), []
    for count in (2, 1, 4):
        hosts = [begin(process_index=i, process_count=count) for i in range(count)]
        for index, host in enumerate(hosts):
            if states:
                host.set_state(lanes.dealt(states, index, count))
        parts = [_rows(host, 2) for host in hosts]
        got = [sum(step, ()) for step in zip(*parts, strict=True)]
        assert got == want[:2]
        want = want[2:]
        states = [json.loads(json.dumps(host.get_state())) for host in hosts]


def _rows(batches, count):
    """The ids of each batch's samples, in the order of its rows."""
    return [(next(batches), batches.samples)[1] for _ in range(count)]


def test_of_other_hosts_the_first_takes_over_the_counts():
    states = [dict(parent={str(i): {"next_row": i}}, skipped=i + 1) for i in range(2)]
    both = {"0": {"next_row": 0}, "1": {"next_row": 1}}
    assert lanes.dealt(states, 1, 2) == dict(parent=both, skipped=2)
    assert lanes.dealt(states, 0, 1) == dict(parent=both, skipped=3)
    assert lanes.dealt(states, 0, 4) == dict(parent=both, skipped=3)
    assert lanes.dealt(states, 3, 4) == dict(parent=both, skipped=0)


def test_lanes_must_be_those_of_before(dozen):
    state = make_batches(config(dozen), TOKENIZER, seed=0).get_state()
    more = make_batches(config(dozen, lanes=2), TOKENIZER, seed=0)
    with pytest.raises(ValueError, match=r"saved in lanes \['0'\], without \['1'\]"):
        more.set_state(state)


def test_a_batch_knows_its_samples(packed):
    batches = make_batches(packed_config(packed), TOKENIZER, seed=1)
    found = [(numbers(next(batches)), batches.samples) for _ in range(3)]
    for used, samples in found:
        assert list(samples) == [str(number) for number in used]


def test_lanes_must_divide_the_batch_and_hosts_the_lanes(dozen):
    with pytest.raises(ValueError, match="batch_size=4 does not divide among 3 lanes"):
        make_batches(config(dozen, lanes=3), TOKENIZER, seed=0)
    with pytest.raises(ValueError, match="lanes=2 do not divide among 4 hosts"):
        make_batches(config(dozen, lanes=2), TOKENIZER, seed=0, process_count=4)


def test_bad_and_long_samples_are_replaced_and_counted(write):
    items = [item(i) for i in range(6)]
    items += [item(6, image="cut.mp4"), item(7, image="missing.mp4")]
    long = [{"from": "human", "value": "why " * 50}, {"from": "gpt", "value": "8"}]
    items += [item(8, conversations=long), item(9, video_start=3, video_end=99)]
    batches = make_batches(config(write(items)), TOKENIZER, seed=0)
    seen = take(batches, 10)
    used = sum(map(numbers, seen), [])
    assert len(used) == 40 and set(used) == set(range(6))
    assert batches.skipped >= 4 * 4  # Four unusable ones in each of four epochs.
    again = make_batches(config(write(items)), TOKENIZER, seed=0)
    again.set_state(batches.get_state())
    assert again.skipped == batches.skipped
    assert_same(take(make_batches(config(write(items)), TOKENIZER, seed=0), 10), seen)


def test_too_large_a_share_of_bad_media_ends_the_run(write):
    items = [item(i) for i in range(4)] + [item(4, image="missing.mp4")]
    path = write(items)
    kept = make_batches(config(path, max_bad_share=0.25), TOKENIZER, seed=0)
    take(kept, 60)
    assert kept.drawn == 240 + kept.skipped and kept.bad == kept.skipped
    batches = make_batches(config(path, max_bad_share=0.1), TOKENIZER, seed=0)
    with pytest.raises(TooManyBad, match="4: .*missing.mp4: no such file"):
        take(batches, 60)
    assert batches.bad == 21  # More than a tenth of 200.
    with pytest.raises(ValueError, match="max_bad_share=2 is no share"):
        config(path, max_bad_share=2)


def test_workers_make_the_same_batches(dozen):
    apart = config(dozen, workers=WorkerConfig(count=2))
    got = take(make_batches(apart, TOKENIZER, seed=0), 2)
    assert_same(got, take(make_batches(config(dozen), TOKENIZER, seed=0), 2))


def test_a_resumed_run_makes_the_choices_of_one_in_which_a_worker_died(
    dozen, monkeypatch
):
    """The worker dies of a file once, as it would for want of memory."""
    whole, dead = workers.LocalDecoder.read_frames, []

    def read(self, path, times, fit):
        if path.endswith("/3.mp4") and not dead:
            dead.append(path)
            raise workers.WorkerDied(path, "died of SIGKILL")
        return whole(self, path, times, fit)

    monkeypatch.setattr(workers.LocalDecoder, "read_frames", read)
    cfg = config(dozen, num_threads=0)
    unbroken = make_batches(cfg, TOKENIZER, seed=0)
    start = unbroken.get_state()
    want = take(unbroken, 3)
    assert dead and unbroken.skipped == unbroken.bad == 1
    # Killed before its first checkpoint but for that list, it reads everything again.
    state = json.loads(json.dumps(unbroken.get_state()))
    resumed = make_batches(cfg, TOKENIZER, seed=0)
    resumed.set_state({**start, "deaths": state["deaths"]})
    assert_same(take(resumed, 3), want)
    assert resumed.bad == 1
    unaware = make_batches(cfg, TOKENIZER, seed=0)
    take(unaware, 3)
    assert unaware.bad == 0


def test_an_input_of_before_there_was_a_quarantine_is_refused(dozen):
    batches = make_batches(config(dozen), TOKENIZER, seed=0)
    old = {"parent": {"parent": {"next_index": 7}, "next_row": 1}, "skipped": 0}
    with pytest.raises(ValueError, match="a version without lanes and quarantine"):
        batches.set_state(old)


def test_data_that_is_bad_throughout_is_an_error(write):
    path = write([item(i, image="missing.mp4") for i in range(3)])
    batches = make_batches(config(path), TOKENIZER, seed=0)
    with pytest.raises(ValueError, match="10 samples in a row .* no such file"):
        next(batches)


def test_a_window_keeps_the_times_of_the_file(write):
    path = write([item(3, video_start=2, video_end=4)])
    batch = next(make_batches(config(path), TOKENIZER, seed=0))
    assert batch.frame_times[0].tolist() == [2.5, 3.5, 0, 0, 0, 0]
    assert read(batch.frames[0, :2]) == [2, 3]


def test_images_are_one_frame_each(dozen, write, film):
    import av
    from PIL import Image

    folder = pathlib.Path(dozen).parent
    with av.open(str(film("5s.mp4", 5))) as container:
        for i, frame in enumerate(container.decode(video=0)):
            frame.to_image().save(folder / f"{i}.png")
    assert Image.open(folder / "1.png").size == (64, 64)
    path = write([item(0, image="1.png | 3.png")], dataset_type="image")
    batch = next(make_batches(config(path), TOKENIZER, seed=0))
    assert read(batch.frames[0, :2]) == [1, 3]
    assert int(np.sum(batch.roles[0] == Role.VISION)) == 4


def test_a_conversation_without_media_is_a_row_without_frames(write):
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "7"}]
    path = write([{"id": "x", "conversations": talk}])
    batch = next(make_batches(config(path), TOKENIZER, seed=0))
    assert not np.any(batch.roles == Role.VISION) and not batch.frames.any()
    assert numbers(batch) == [7] * 4


def test_features_take_the_place_of_frames(dozen, tmp_path):
    store = FeatureStore(tmp_path, "vit-1")
    folder = dozen.rpartition("/")[0]
    for length in (2, 3, 4, 5):
        values = 10 * length + np.arange(length, dtype=np.float16)
        shape = (length, 2, 3)
        store.put(
            f"{folder}/{length - 2}.mp4",
            np.broadcast_to(values[:, None, None], shape),
        )
    frames = next(make_batches(config(dozen), TOKENIZER, seed=0))
    made = make_batches(config(dozen), TOKENIZER, seed=0, features=store)
    batch = next(made)
    assert made.skipped == 0
    assert batch.frames is None
    np.testing.assert_array_equal(batch.tokens, frames.tokens)
    np.testing.assert_array_equal(batch.frame_times, frames.frame_times)
    for row, number in enumerate(numbers(batch)):
        length = 2 + number % 4
        want = [10 * length + i for i in range(length)] + [0] * (6 - length)
        assert batch.features[row, :, 0, 0].tolist() == want


def test_samples_whose_file_was_refused_features_are_replaced(write, tmp_path):
    path = write([item(i) for i in range(2)])
    store = FeatureStore(tmp_path, "vit-1")
    folder = path.rpartition("/")[0]
    store.put(f"{folder}/0.mp4", np.ones((2, 2, 3), np.float16))
    store.refuse(f"{folder}/1.mp4", VideoError("cut short"))
    batches = make_batches(config(path), TOKENIZER, seed=0, features=store)
    assert numbers(next(batches)) == [0] * 4
    assert batches.bad == batches.skipped >= 2
