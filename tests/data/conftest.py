"""Small videos that say in every frame which frame it is."""

import pathlib
from collections.abc import Callable

import av
import numpy as np
import pytest

SIDE = 64
BITS = 8  # Bars of 8 pixels: white for 1, black for 0.


def draw(index: int) -> np.ndarray:
    """A frame whose bars spell `index`, lowest bit on the left."""
    bars = [(index >> bit) & 1 for bit in range(BITS)]
    row = np.repeat(np.array(bars, np.uint8) * 255, SIDE // BITS)
    return np.broadcast_to(row[None, :, None], (SIDE, SIDE, 3)).copy()


def read(frames: np.ndarray) -> list[int]:
    """The indices that frames of any square size spell."""
    size = frames.shape[1]
    centres = (np.arange(BITS) * 2 + 1) * size // (2 * BITS)
    bits = frames[:, size // 2, centres, 1] > 127
    return (bits @ (1 << np.arange(BITS))).tolist()


def write_video(
    path: pathlib.Path,
    num_frames: int,
    *,
    fps: int = 1,
    gop: int = 12,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(i), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def film(tmp_path_factory) -> Callable[..., pathlib.Path]:
    """Writes a video of numbered frames, once for each name."""
    folder = tmp_path_factory.mktemp("films")

    def make(name: str, num_frames: int, **options) -> pathlib.Path:
        path = folder / name
        return path if path.exists() else write_video(path, num_frames, **options)

    return make
