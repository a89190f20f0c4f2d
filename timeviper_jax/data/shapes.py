"""Tiny videos and images of coloured squares, with questions: made in a second.

They let every config run from end to end on any machine, and teach nothing.
"""

import json
import pathlib

import av
import numpy as np
import yaml
from jaxtyping import UInt8
from PIL import Image

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 70, 220),
    "yellow": (230, 220, 50),
}
SIZE = 32
FRAMES = 6


def make(folder: pathlib.Path) -> None:
    """Writes `data.yaml` and what it names: a video and an image of each colour."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, captioned = [], []
    for colour in COLOURS:
        frames = draw(colour)
        write_video(folder / f"{colour}.mp4", frames)
        Image.fromarray(frames[0]).save(folder / f"{colour}.png")
        asked.append(_question(colour))
        captioned.append(
            {"id": colour, "image": f"{colour}.png", "caption": f"A {colour} square."}
        )
    (folder / "videos.json").write_text(json.dumps(asked))
    (folder / "images.json").write_text(json.dumps(captioned))
    common = dict(data_path=".")
    data_sets = [
        dict(
            name="squares",
            format="conversation",
            json_path="videos.json",
            dataset_type="video",
            split="videos",
            **common,
        ),
        dict(
            name="square_images",
            format="caption",
            json_path="images.json",
            dataset_type="image",
            split="images",
            **common,
        ),
    ]
    # Last, so that a manifest means that all is there.
    (folder / "data.yaml").write_text(yaml.safe_dump({"data": data_sets}))


def draw(colour: str) -> UInt8[np.ndarray, "F H W 3"]:
    """A square that moves to the right."""
    frames = np.full((FRAMES, SIZE, SIZE, 3), 30, np.uint8)
    for i, frame in enumerate(frames):
        frame[10:22, 3 * i : 3 * i + 12] = COLOURS[colour]
    return frames


def write_video(path: pathlib.Path, frames: UInt8[np.ndarray, "F H W 3"]) -> None:
    """Encodes frames as H.264, one a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _question(colour: str) -> dict:
    return {
        "id": colour,
        "image": f"{colour}.mp4",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat colour is the square?"},
            {"from": "gpt", "value": f"It is {colour}."},
        ],
    }
