"""Malformed files: every one is made anew from its number, from sound ones."""

import io
import os
import pathlib
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from PIL import Image

from timeviper_jax.benchmarks.bad_media import sound

Maker = Callable[[pathlib.Path], None]
_HUGE = 1 << 14  # Pixels a side.


# ---------------------------------------------------------------------------
# Damage to the bytes of a sound file.


def cut(data: bytearray, rng: np.random.Generator) -> bytearray:
    """The file ends too soon."""
    return data[: int(len(data) * rng.uniform(0.001, 0.999))]


def cut_tail(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Hardly anything of its end is missing."""
    return data[: -int(rng.integers(1, 64))]


def behead(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Its beginning is missing."""
    return data[int(len(data) * rng.uniform(0.001, 0.6)) :]


def flip(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Some bits anywhere are others."""
    return _flipped(data, rng, 0, len(data))


def flip_head(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Some bits where headers are."""
    return _flipped(data, rng, 0, min(1024, len(data)))


def flip_tail(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Some bits where an index may be."""
    return _flipped(data, rng, max(0, len(data) - 1500), len(data))


def _flipped(
    data: bytearray, rng: np.random.Generator, start: int, stop: int
) -> bytearray:
    for _ in range(int(2 ** rng.uniform(0, 6))):
        data[rng.integers(start, stop)] ^= 1 << rng.integers(8)
    return data


def blank(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A block that was never written."""
    start = int(rng.integers(len(data)))
    stop = min(len(data), start + int(2 ** rng.uniform(4, 12)))
    data[start:stop] = bytes(stop - start)
    return data


def shuffle(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Two blocks have changed places."""
    size = max(1, len(data) // 8)
    one, two = sorted(int(i) * size for i in rng.choice(8, 2, replace=False))
    data[one : one + size], data[two : two + size] = (
        data[two : two + size],
        data[one : one + size],
    )
    return data


DAMAGES = (cut, cut_tail, behead, flip, flip_head, flip_tail, blank, shuffle)


def damaged(sources: list[pathlib.Path], count: int) -> Iterator[tuple[str, Maker]]:
    """`count` damaged files by name; the kinds of file and damage take turns."""
    for i in range(count):
        source, turn = sources[i % len(sources)], i // len(sources)
        damage = DAMAGES[turn % len(DAMAGES)]

        def make(path: pathlib.Path, source=source, damage=damage, i=i) -> None:
            rng = np.random.default_rng([7, i])
            path.write_bytes(damage(bytearray(source.read_bytes()), rng))

        yield f"{i:04d}-{damage.__name__}-{source.name}", make


# ---------------------------------------------------------------------------
# Files whose sizes, rates or kinds are lies, or too much.


def special(folder: pathlib.Path) -> dict[str, Maker]:
    """By name; `folder` holds the sound files."""
    return {
        **_sizes(),
        **_lies(folder),
        **_disguises(folder),
        **_lists(folder),
        **_places(folder),
    }


def _sizes() -> dict[str, Maker]:
    film = sound.write_film
    return {
        "no-frames.mp4": lambda p: film(p, frames=0),
        "no-frames.mkv": lambda p: film(p, frames=0),
        "one-frame.mp4": lambda p: film(p, frames=1),
        "one-pixel.mkv": lambda p: film(p, codec="mpeg4", height=1, width=1),
        "two-pixels.mp4": lambda p: film(p, height=2, width=2),
        "ribbon.mkv": lambda p: film(p, codec="mpeg4", frames=2, height=2, width=4096),
        "one-pixel.png": lambda p: Image.new("RGB", (1, 1)).save(p),
        "one-pixel.jpg": lambda p: Image.new("RGB", (1, 1)).save(p),
        "ribbon.png": lambda p: Image.new("RGB", (1, 60_000)).save(p),
        "16k.png": lambda p: write_png(p, _HUGE, _HUGE, rows=_HUGE),
        "16k-empty.png": lambda p: write_png(p, _HUGE, _HUGE, rows=0),
        "2g.png": lambda p: write_png(p, 2**31 - 1, 2**31 - 1, rows=1),
        "no-size.png": lambda p: write_png(p, 0, 0, rows=0),
        "text-bomb.png": lambda p: write_png(p, 4, 4, rows=4, text=1 << 28),
        "16k.jpg": lambda p: p.write_bytes(_jpeg_of(_HUGE, _HUGE)),
        "64k.jpg": lambda p: p.write_bytes(_jpeg_of(65_535, 65_535)),
        "empty.mp4": pathlib.Path.touch,
        "empty.png": pathlib.Path.touch,
    }


def write_png(
    path: pathlib.Path, height: int, width: int, *, rows: int, text: int = 0
) -> None:
    """A black picture of which only so many rows are there, and a long comment."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = bytes(1 + min(width, 1 << 16))
    pixels = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header))
        if text:
            file.write(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(text), 9)))
        file.write(chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def _jpeg_of(height: int, width: int) -> bytes:
    """A small JPEG that says that it is of this size."""
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 90).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _lies(folder: pathlib.Path) -> dict[str, Maker]:
    many = struct.pack(">I", 1_000_000)
    ones, none = b"\xff" * 4, bytes(4)

    def patched(source: str, *edits: tuple[bytes, int, bytes]) -> Maker:
        def make(path: pathlib.Path) -> None:
            data = bytearray((folder / source).read_bytes())
            for box, offset, value in edits:
                start = data.index(box) + len(box) + offset
                data[start : start + len(value)] = value
            path.write_bytes(data)

        return make

    duration = b"\x44\x89\x88"  # Matroska's; a float of 8 bytes follows.
    makers = {}
    for name in ("behind.mp4", "front.mp4"):
        for lie, edits in {
            "million-frames": [(b"stts", 8, many), (b"stsz", 8, many)],
            "million-times": [(b"stts", 8, many)],
            "million-sizes": [(b"stsz", 8, many)],
            "all-sizes": [(b"stsz", 8, ones)],
            "huge-frames": [(b"stsz", 4, b"\x7f\xff\xff\xff")],
            "no-time": [(b"stts", 12, none)],
            "slow": [(b"stts", 12, ones)],
            "no-scale": [(b"mdhd", 12, none)],
            "fast": [(b"mdhd", 12, b"\x7f\xff\xff\xff")],
            "long": [(b"mdhd", 16, b"\x7f\xff\xff\xff"), (b"mvhd", 16, ones)],
            "short": [(b"mdhd", 16, none), (b"mvhd", 16, none)],
            "16k": [(b"avc1", 24, b"\x40\x00\x40\x00")],
            "chunks": [(b"stco", 4, ones)],
            "beyond": [(b"stco", 8, ones)],
        }.items():
            makers[f"{lie}-{name}"] = patched(name, *edits)
    for lie, value in (("long", 1e15), ("nan", float("nan")), ("minus", -1.0)):
        edit = (duration, 0, struct.pack(">d", value))
        makers[f"{lie}.mkv"] = patched("film.mkv", edit)
    sides = (b"strf", 8, struct.pack("<II", _HUGE, _HUGE))
    makers["16k.avi"] = patched("film.avi", sides)
    for fps in (1_000, 100_000, 1_000_000):
        makers[f"{fps}-fps.mkv"] = lambda p, fps=fps: sound.write_film(p, fps=fps)
        makers[f"{fps}-fps.mp4"] = lambda p, fps=fps: sound.write_film(p, fps=fps)
    return makers


def _disguises(folder: pathlib.Path) -> dict[str, Maker]:
    pairs = [
        *(("behind.mp4", "film.png"), ("cat.png", "picture.mp4")),
        *(("cat.jpg", "picture.mkv"), ("cat.jpg", "picture.png")),
        *(("film.webm", "film.mp4"), ("film.avi", "film.webm")),
        *(("cat.webp", "picture.avi"), ("film.ts", "film.bmp")),
    ]
    makers = {
        f"disguised-{name}": lambda p, s=source: sound.copy(folder / s, p)
        for source, name in pairs
    }
    for suffix in ("mp4", "mka", "mkv"):
        makers[f"sound.{suffix}"] = sound.write_sound
    noise = np.random.default_rng(0).bytes(50_000)
    texts = dict(noise=noise, text=b"No film.\n" * 999, zeros=bytes(50_000))
    for kind, data in texts.items():
        for suffix in ("mp4", "mkv", "ts", "avi", "png", "jpg", "tif", "webp", "bmp"):
            makers[f"{kind}.{suffix}"] = lambda p, d=data: p.write_bytes(d)
    return makers


def _lists(folder: pathlib.Path) -> dict[str, Maker]:
    """Files that name other files, or addresses."""
    film = folder / "behind.mp4"
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{}\n#EXT-X-ENDLIST\n"
    texts = {
        "concat.mp4": f"ffconcat version 1.0\nfile '{film}'\nfile 'concat.mp4'\n",
        "concat.ffconcat": f"ffconcat version 1.0\nfile '{film}'\n",
        "passwords.m3u8": playlist.format("file:///etc/passwd"),
        "list.m3u8": playlist.format(film),
        "itself.m3u8": playlist.format("itself.m3u8"),
        "list.mp4": playlist.format("http://127.0.0.1:9/film.ts"),
        "dash.mpd": "<?xml version='1.0'?><MPD type='static'><Period><AdaptationSet>"
        "<Representation id='1'><BaseURL>http://127.0.0.1:9/</BaseURL>"
        "</Representation></AdaptationSet></Period></MPD>",
        "session.sdp": "v=0\nm=video 9 RTP/AVP 96\nc=IN IP4 127.0.0.1\n",
        "playlist.pls": f"[playlist]\nFile1={film}\n",
        "vector.svg": "<svg><image href='file:///etc/passwd'/></svg>",
        "vector.png": "<svg><image href='file:///etc/passwd'/></svg>",
        "script.avs": f"FFVideoSource('{film}')",
    }
    return {n: lambda p, t=text: p.write_text(t) for n, text in texts.items()}


def _places(folder: pathlib.Path) -> dict[str, Maker]:
    """What is no plain file, or is called like an address."""

    def leaving(path: pathlib.Path) -> None:
        path.mkdir()
        (path / "1.png").symlink_to(folder / "cat.png")

    def mixed(path: pathlib.Path) -> None:
        path.mkdir()
        for name in ("cat.png", "cat.jpg"):
            sound.copy(folder / name, path / name)
        (path / "cut.png").write_bytes((folder / "cat.png").read_bytes()[:900])

    return {
        "pipe.mp4": os.mkfifo,
        "pipe.png": os.mkfifo,
        "folder.mp4": pathlib.Path.mkdir,
        "leaving": leaving,
        "mixed": mixed,
        "dangling.mp4": lambda p: p.symlink_to("nowhere.mp4"),
        "itself.mp4": lambda p: p.symlink_to(p.name),
        "device.mp4": lambda p: p.symlink_to("/dev/zero"),
        "device.png": lambda p: p.symlink_to("/dev/zero"),
        "concat:film|film.mp4": lambda p: p.write_text("no film"),
        "http:film.mp4": lambda p: p.write_text("no film"),
        "%03d.png": lambda p: p.write_text("no picture"),
        "new\nline.mp4": lambda p: p.write_text("no film"),
    }


def all_files(
    folder: pathlib.Path, sources: list[pathlib.Path], count: int
) -> Mapping[str, Maker]:
    """`count` malformed files by name, the special ones first."""
    some = special(folder)
    return {**some, **dict(damaged(sources, max(0, count - len(some))))}
