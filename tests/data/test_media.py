"""What strangers' files may be, and that nothing else is opened."""

import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import read
from timeviper_jax.data.media import MediaLimits, VideoError
from timeviper_jax.data.video import probe, read_frames


@pytest.mark.parametrize(
    "limits, message",
    [
        (dict(max_bytes=1_000), r"\d+ bytes, but the limit is 1000"),
        (dict(max_pixels=4_000), "4096 pixels a frame, but the limit is 4000"),
        (dict(max_side=60), "64 pixels a side, but the limit is 60"),
        (dict(max_frames=95), "96 frames, but the limit is 95"),
        (dict(max_seconds=20), "24 seconds, but the limit is 20"),
        (dict(max_fps=3), "4 frames a second, but the limit is 3"),
        (dict(codecs=("vp9",)), "its codec, h264, is not among those"),
        (dict(containers=("avi",)), "not a video that can be decoded"),
    ],
)
def test_a_video_beyond_a_limit_is_refused(film, limits, message):
    path = film("fast.mp4", 96, fps=4)
    for use in (probe, lambda p, limits: read_frames(p, [1.0], 64, limits=limits)):
        with pytest.raises(VideoError, match=message) as error:
            use(path, limits=MediaLimits(**limits))
        assert str(path) in str(error.value)


def _png_of(height: int, width: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    body = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    # Pillow looks no further than where pixels begin.
    return b"\x89PNG\r\n\x1a\n" + body + struct.pack(">I", 9) + b"IDAT" + bytes(13)


@pytest.mark.parametrize(
    "size, message",
    [
        ((9_000, 9_000), "81000000 pixels a frame, but the limit is 67108864"),
        ((16_384, 16_384), "decompression bomb|pixels a frame"),
        ((2**31 - 1, 2**31 - 1), "not a readable image|pixels a frame"),
        ((1, 16_384), "times as long as wide"),
    ],
)
def test_images_that_say_they_are_huge_are_not_made(tmp_path, size, message):
    path = tmp_path / "huge.png"
    path.write_bytes(_png_of(*size))
    with pytest.raises(VideoError, match=message):
        probe(path)


def test_images_by_other_formats_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "a.png")
    with pytest.raises(VideoError, match="not a readable image"):
        probe(tmp_path / "a.png")


def test_lists_lead_nowhere(film, tmp_path):
    path = film("fast.mp4", 96, fps=4)
    (tmp_path / "a.mp4").write_text(f"ffconcat version 1.0\nfile '{path}'\n")
    (tmp_path / "b.mp4").write_text(f"#EXTM3U\n#EXTINF:6,\n{path}\n#EXT-X-ENDLIST\n")
    (tmp_path / f"concat:{'x' * 9}.mp4").write_text("no film")
    for path in tmp_path.iterdir():
        with pytest.raises(VideoError, match="not a video that can be decoded"):
            probe(path)


def test_what_may_never_end_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zeros.mp4").symlink_to("/dev/zero")
    for path in tmp_path.iterdir():
        with pytest.raises(VideoError, match="neither a file nor a folder"):
            probe(path)


def test_a_link_in_a_folder_of_frames_may_not_leave_it(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "1.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(VideoError, match="a link that leaves its folder"):
        probe(tmp_path / "frames")


def _patched(whole: bytes, box: bytes, offset: int, value: int) -> bytes:
    start = whole.index(box) + len(box) + offset
    return whole[:start] + struct.pack(">I", value) + whole[start + 4 :]


@pytest.mark.parametrize(
    "box, offset, value, message",
    [
        (b"stts", 8, 1_000_000, r"1000000 frames cannot be in \d+ bytes"),
        (b"mdhd", 12, 0, "96 frames in .* s, each of .* s; the file is damaged"),
    ],
)
def test_declared_frames_are_held_against_the_file(
    film, tmp_path, box, offset, value, message
):
    whole = film("fast.mp4", 96, fps=4).read_bytes()
    path = tmp_path / "lie.mp4"
    path.write_bytes(_patched(whole, box, offset, value))
    with pytest.raises(VideoError, match=message):
        read_frames(path, [0.1], 64)


# The tables of a programme, sent again and again; its pictures are not.
_TABLES = 3 * 188


def test_a_recording_that_begins_between_key_frames_is_short(film, tmp_path):
    options = {"sc_threshold": "0"}  # Key frames every 12 only, which are 3 s.
    whole = film("regular.ts", 96, fps=4, options=options).read_bytes()
    path = tmp_path / "beheaded.ts"
    # The first key frame is four packets long.
    path.write_bytes(whole[:_TABLES] + whole[_TABLES + 5 * 188 :])
    with pytest.raises(VideoError, match=r"only 8\d of 9\d frames can be decoded"):
        read_frames(path, [0.1], 64)


def test_a_recording_that_begins_at_a_later_key_frame_is_one_of_what_is_left(
    film, tmp_path
):
    # It declares no length, and starts at no certain time: nothing is known to miss.
    whole = film("plain.ts", 96, fps=4).read_bytes()
    path = tmp_path / "joined_late.ts"
    path.write_bytes(whole[:_TABLES] + whole[len(whole) // 10 :])
    assert probe(path).duration == 22
    np.testing.assert_array_equal(read(read_frames(path, [0.1, 21.9], 64)), [8, 95])


@pytest.mark.parametrize(
    "order, message",
    [
        ("bframes=0", r"only \d+ of 96 frames .* or its frames last differently"),
        # Frames that were to be shown before the hole lean on others beyond it.
        ("bframes=3", "a frame of .* s comes after later ones"),
    ],
)
def test_a_hole_in_a_video_that_counts_no_frames_is_noticed(
    film, tmp_path, order, message
):
    options = {"x264-params": order}
    whole = film(f"{order}.mkv", 96, fps=4, options=options).read_bytes()
    _, second, third, *_ = re.finditer(b"\x1f\x43\xb6\x75", whole)  # Clusters.
    path = tmp_path / "hole.mkv"
    path.write_bytes(whole[: second.start()] + whole[third.start() :])
    with pytest.raises(VideoError, match=message):
        read_frames(path, np.arange(0.125, 24, 0.25), 64)
