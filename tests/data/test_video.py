"""Frames are the ones on screen, however they were reached, or an error says why."""

import fractions

import av
import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import SIDE, draw, read
from timeviper_jax.data import media, video
from timeviper_jax.data.video import (
    VideoError,
    fps_times,
    iter_frames,
    probe,
    read_frames,
    sample_times,
)
from timeviper_jax.data.video_reader import VideoReader

FASTSTART = {"movflags": "faststart"}


def test_times_are_mid_points_of_equal_spans():
    np.testing.assert_allclose(sample_times(10, 4), [1.25, 3.75, 6.25, 8.75])
    np.testing.assert_allclose(sample_times(10, 2, start=4, end=8), [5, 7])


@pytest.mark.parametrize(
    "seconds, max_frames, min_frames, want",
    [
        (3, 256, 1, [0.5, 1.5, 2.5]),
        (8, 4, 1, [1, 3, 5, 7]),  # Too many at 1 fps: spread evenly.
        (2, 256, 4, [0.25, 0.75, 1.25, 1.75]),  # Too few: likewise.
        (0.2, 256, 1, [0.1]),
    ],
)
def test_one_frame_a_second_within_bounds(seconds, max_frames, min_frames, want):
    got = fps_times(seconds, 1.0, max_frames, min_frames)
    np.testing.assert_allclose(got, want)


def test_a_window_outside_the_video_is_an_error():
    with pytest.raises(ValueError, match="from 4 to 12 s does not lie in .* 10 s"):
        sample_times(10, 2, start=4, end=12)


@pytest.mark.parametrize(
    "name, options",
    [
        ("b_frames.mp4", {}),
        ("open_gop.mp4", {"options": {"x264-params": "open-gop=1:bframes=3"}}),
        ("fast.mp4", {"options": {"preset": "ultrafast", "tune": "fastdecode"}}),
        ("moved.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("plain.mkv", {}),
        ("plain.avi", {}),
        ("plain.ts", {}),
        ("nine.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}}),
    ],
)
def test_the_frame_is_the_one_on_screen(film, name, options):
    path = film(name, 96, fps=4, **options)
    info = probe(path)
    assert (info.duration, info.num_frames) == (24.0, 96)
    rng = np.random.default_rng(0)
    for count in (1, 3, 200):
        times = np.sort(rng.uniform(0, info.duration, count))
        want = np.floor(times * 4).astype(int).tolist()
        assert read(read_frames(path, times, 64)) == want


def _late(path, *, pictures, sound, fragments):
    """A film whose pictures and sound begin so many seconds after its start."""
    flags = {"movflags": "frag_keyframe"} if fragments else {}
    with av.open(str(path), "w", options=flags) as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "3"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        voice = container.add_stream("aac", rate=16_000)
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(draw(i), format="rgb24")
            frame.pts, frame.time_base = i + 10 * pictures, fractions.Fraction(1, 10)
            container.mux(stream.encode(frame))
        silence = np.zeros((1, 16_000), np.float32)
        samples = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        samples.sample_rate, samples.pts = 16_000, 16_000 * sound
        samples.time_base = fractions.Fraction(1, 16_000)
        container.mux(voice.encode(samples))
        container.mux([*voice.encode(), *stream.encode()])
    return path


@pytest.mark.parametrize("fragments", [False, True])
@pytest.mark.parametrize("pictures, sound", [(0, 0), (3, 0), (0, 2)])
def test_an_index_tells_what_a_look_at_the_frames_does(
    tmp_path, monkeypatch, pictures, sound, fragments
):
    path = tmp_path / "late.mp4"
    info = probe(_late(path, pictures=pictures, sound=sound, fragments=fragments))
    assert info.num_frames >= 12
    thorough = lambda path, limits, **_: media.open_video(path, limits)
    monkeypatch.setattr(video, "open_video", thorough)
    assert probe(path) == info


def test_the_size_of_an_image_is_known_without_its_pixels(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(draw(1)[:, :48]).save(path)
    path.write_bytes(path.read_bytes()[:60])
    info = probe(path)
    assert (info.height, info.width, info.duration) == (SIDE, 48, 1.0)
    with pytest.raises(VideoError, match="not a readable image"):
        read_frames(path, [0.5], 64)


@pytest.mark.parametrize("x264", ["bframes=3", "open-gop=1:bframes=3", "bframes=0"])
def test_seeking_and_decoding_straight_on_agree(film, x264):
    path = film(f"long_{x264}.mp4", 250, fps=8, gop=20, options={"x264-params": x264})
    straight = read_frames(path, (np.arange(250) + 0.5) / 8, 64)
    assert read(straight) == list(range(250))
    for step in (3, 11, 31, 120):
        for first in range(0, step, 7):
            index = np.arange(first, 250, step)
            sought = read_frames(path, (index + 0.5) / 8, 64)
            np.testing.assert_array_equal(sought, straight[index])


@pytest.mark.parametrize("step", [1, 5, 60])
def test_threads_decode_the_same_frames(film, step):
    path = film("threads.mp4", 250, fps=8, gop=20)
    times = (np.arange(0, 250, step) + 0.5) / 8
    got = np.stack(list(iter_frames(path, times, 64, threads=3)))
    assert read(got) == list(range(0, 250, step))


def test_a_sought_frame_costs_no_more_than_the_frames_since_its_key_frame(
    film, monkeypatch
):
    decoded = []
    whole = VideoReader._decode_packets
    monkeypatch.setattr(
        VideoReader,
        "_decode_packets",
        lambda self: (decoded.append(len(f[0])) or f for f in whole(self)),
    )
    path = film("far.mp4", 200, fps=8, gop=50, options={"x264-params": "bframes=3"})
    times = (np.array([3, 101, 152]) + 0.5) / 8  # Next to key frames 0, 100 and 150.
    assert read(read_frames(path, times, 64)) == [3, 101, 152]
    assert sum(decoded) < 3 * 12


def test_a_start_of_a_frame_belongs_to_that_frame(film):
    path = film("thirds.mp4", 30, fps=3)
    assert read(read_frames(path, np.arange(30) / 3, 64)) == list(range(30))


def test_a_frame_may_be_asked_for_twice(film):
    path = film("fast.mp4", 96, fps=4)
    assert read(read_frames(path, [1.0, 1.1, 1.1, 1.3], 64)) == [4, 4, 4, 5]


def test_frames_come_one_at_a_time(film):
    frames = iter_frames(film("fast.mp4", 96, fps=4), [0.1, 5.1], 64)
    assert read(next(frames)[None]) == [0]


def test_pixels_are_what_pillow_makes_of_them(film):
    import av

    path = film("fast.mp4", 96, fps=4)
    with av.open(str(path)) as container:
        images = [frame.to_image() for frame in container.decode(video=0)][:5]
    times = (np.arange(5) + 0.5) / 4
    for size in (64, 24):
        want = [np.asarray(i.resize((size, size), Image.BICUBIC)) for i in images]
        np.testing.assert_array_equal(read_frames(path, times, size), want)


def test_an_image_is_a_video_of_one_second(tmp_path):
    Image.fromarray(draw(5)).save(tmp_path / "five.png")
    assert probe(tmp_path / "five.png").duration == 1.0
    got = read_frames(tmp_path / "five.png", [0.5], 64)
    np.testing.assert_array_equal(got[0], draw(5))


def test_a_folder_of_images_is_a_video_at_one_a_second(tmp_path):
    for i in range(4):
        Image.fromarray(draw(i)).save(tmp_path / f"{i:04d}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    info = probe(tmp_path)
    assert (info.duration, info.num_frames, info.width) == (4.0, 4, 64)
    assert read(read_frames(tmp_path, [0.5, 2.2, 3.9], 64)) == [0, 2, 3]


def test_a_phone_held_upright_films_upright(film, tmp_path):
    upright = read_frames(film("fast.mp4", 96, fps=4), [1.0], 64)
    data = bytearray(film("fast.mp4", 96, fps=4).read_bytes())
    # The display matrix of the track header: a quarter turn clockwise.
    start = data.index(b"tkhd") + 4 + 40
    one, none = (1 << 16).to_bytes(4, "big"), bytes(4)
    minus = (-1 << 16).to_bytes(4, "big", signed=True)
    data[start : start + 20] = none + one + none + minus + none
    (tmp_path / "phone.mp4").write_bytes(data)
    turned = read_frames(tmp_path / "phone.mp4", [1.0], 64)
    np.testing.assert_array_equal(turned[0], np.rot90(upright[0], -1))


def _all_frames(path):
    return read_frames(path, fps_times(probe(path).duration, 4, 10_000), 64)


def _assert_one_clear_line(error, path):
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", np.linspace(0.02, 0.999, 25))
def test_a_truncated_file_is_an_error(film, tmp_path, share):
    whole = film("head.mp4", 96, fps=4, container_options=FASTSTART).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(VideoError, match=r"of 96 frames|not a video") as error:
        _all_frames(path)
    with pytest.raises(VideoError, match=r"of 96 frames|not a video"):
        list(iter_frames(path, np.arange(0.1, 24, 0.25), 64, threads=2))
    _assert_one_clear_line(error, path)


def test_the_last_frame_of_a_truncated_file_is_not_replaced_by_another(film, tmp_path):
    whole = film("head.mp4", 96, fps=4, container_options=FASTSTART).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: int(len(whole) * 0.9)])
    with pytest.raises(VideoError, match=r"only \d+ of 96 frames"):
        read_frames(path, [1.0, 23.9], 64)


@pytest.mark.parametrize("name", ["cut.mkv", "cut.ts"])
def test_containers_without_a_count_end_where_they_say(film, tmp_path, name):
    whole = film(name.replace("cut", "plain"), 96, fps=4).read_bytes()
    path = tmp_path / name
    path.write_bytes(whole[: int(len(whole) * 0.6)])
    if name == "cut.mkv":  # A transport stream says nothing: it is a shorter video.
        with pytest.raises(VideoError, match=r"only \d+ of 96 frames"):
            _all_frames(path)
    else:
        assert read(_all_frames(path)) == list(range(len(_all_frames(path))))


def test_other_files_are_errors(film, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("This is no video.\n" * 100)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    no_frames = film("no_frames.mp4", 0)
    picture = tmp_path / "picture.png"
    picture.write_text("This is no picture.")
    folder = tmp_path / "folder"
    folder.mkdir()
    missing = tmp_path / "missing.mp4"
    for path in (text, empty, no_frames, picture, folder, missing):
        with pytest.raises(VideoError) as error:
            _all_frames(path)
        _assert_one_clear_line(error, path)


def test_a_time_past_the_end_is_an_error(film):
    path = film("fast.mp4", 96, fps=4)
    with pytest.raises(VideoError, match="lasts 24 s, but frames were asked for"):
        read_frames(path, [1.0, 25.0], 64)


def test_times_must_ascend(film):
    with pytest.raises(ValueError, match="sort the times"):
        read_frames(film("fast.mp4", 96, fps=4), [2.0, 1.0], 64)
