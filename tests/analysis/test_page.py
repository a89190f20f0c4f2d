"""The page about a video: whole in one file, and without an error in a browser."""

import base64
import dataclasses
import html.parser
import io
import shutil
import subprocess

import av
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image

from timeviper_jax import sharding
from timeviper_jax.analysis import __main__ as program
from timeviper_jax.analysis import flow, plots
from timeviper_jax.data.conversation import NANO, Media, Turn
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.data.tokenizer import ByteTokenizer
from timeviper_jax.evals import run
from timeviper_jax.evals.base import Question
from timeviper_jax.llm.transv import Stage
from timeviper_jax.presets import PRESETS
from timeviper_jax.timeviper import TimeViper

SIZES = PRESETS["tiny"].with_transv((Stage(layer=1, keep=0.5),))
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FRAMES = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> run.Run:
    """A run with random parameters in place of a checkpoint's."""
    folder = tmp_path_factory.mktemp("features")
    return run.Run(
        model=tiny.build(lambda: TimeViper(SIZES, rngs=nnx.Rngs(0))),
        tokenizer=ByteTokenizer(),
        template=NANO,
        features=FeatureStore(folder, "random"),
        mesh=sharding.make_mesh(),
        config={"data": {"encode_batch": 8, "num_threads": 1, "features": str(folder)}},
    )


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    """The folder that the command leaves, for a video of three frames."""
    folder = tmp_path_factory.mktemp("look")
    video = folder / "a <b> & c.mp4"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(FRAMES):
            pixels = np.full((64, 64, 3), 80 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    picture = folder / "curves.png"
    points = [
        plots.Point(
            cut=cut, layer=layer, kind="mcq", value=0.5, low=0.4, high=0.6, count=8
        )
        for cut in (*flow.ROUTES, plots.DROPPED)
        for layer in flow.depths(SIZES.llm.pattern)
    ]
    plots.save(plots.depth_curves(points, SIZES.llm.pattern), picture)
    command = [str(video), "--workdir=run", "--ask=Is 1 < 2?", "--answer=<yes>"]
    command += [f"--out={folder / 'out'}", f"--picture={picture}", "--groups=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load", lambda workdir: dataclasses.replace(trained))
        program.main(command)
    return folder / "out"


class Page(html.parser.HTMLParser):
    """What a page shows, and what it would load; tags must close as they opened."""

    def __init__(self, text: str):
        super().__init__()
        self.shown, self.loads, self.tags, self._open = "", [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)
        self.loads += [v for name, v in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.shown += data


def test_the_page_is_whole_and_loads_nothing(written):
    page = Page((written / "index.html").read_text("utf-8"))
    assert "script" not in page.tags and "style" in page.tags
    assert all(address.startswith("data:") for address in page.loads)
    for text in ("a <b> & c.mp4", "Is 1 < 2?", "<yes>", "3 frames", "curves.png"):
        assert text in page.shown
    pictures = [a for a in page.loads if a.startswith("data:image/png")]
    mixing = SIZES.llm.pattern.replace("-", "")
    maps = len(mixing) + mixing.count("M")  # Of Mamba-2 layers with and without dt.
    # Two shares, two readers, what is kept, and the picture made elsewhere.
    assert len(pictures) == maps + 6
    for address in pictures:
        picture = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        assert np.asarray(picture.convert("L")).std() > 1


def test_the_numbers_are_kept_beside_it(written):
    found = np.load(written / "maps.npz")
    names = [*found["names"]]
    assert names == ["system", "frames 0 to 1", "frame 2", "instruction", "answer"]
    layer = SIZES.llm.pattern.index("*")
    regions = found[f"{layer}.attention.regions"]
    np.testing.assert_allclose(regions.sum(axis=1), 1, rtol=1e-5)
    assert found[f"{layer}.attention.readers"].shape == (2, FRAMES)
    (kept,) = (found[name] for name in found if name.startswith("kept"))
    assert kept.sum() == FRAMES * SIZES.tokens_per_frame // 2


def test_a_browser_has_nothing_to_complain_about(written, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"No browser to open the page in: none of {', '.join(BROWSERS)}.")
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu"),
            *("--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--enable-logging=stderr", "--window-size=1024,4000"),
            *(f"--screenshot={tmp_path / 'page.png'}",),
            (written / "index.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert np.asarray(Image.open(tmp_path / "page.png").convert("L")).std() > 1


def test_the_strongest_frame_of_a_long_video_is_in_the_picture():
    rows = np.full((2, 10_240), 1e-3)
    rows[0, 7_777], rows[1, 0] = 0.5, -0.5
    figure = plots.frame_rows(rows, ["a", "b"], {}, "", np.arange(10_240) + 0.5)
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape[1] < 1_000
    np.testing.assert_allclose(shown.max(axis=1), 1)
    assert shown[0].argmax() == 7_777 * shown.shape[1] // 10_240
    (right,) = figure.axes[0].child_axes
    labels = [label.get_text() for label in right.get_yticklabels()]
    assert labels == ["7778 s", "0 s"]
    plots.plt.close(figure)


def test_an_empty_question_is_an_error(tmp_path):
    command = ["v.mp4", "--workdir=run", "--ask= ", f"--out={tmp_path}"]
    with pytest.raises(SystemExit, match="empty"):
        program.main(command)


def test_a_missing_video_is_an_error(tmp_path):
    command = ["no.mp4", "--workdir=run", "--ask=What?", f"--out={tmp_path}"]
    with pytest.raises(SystemExit, match="no.mp4"):
        program.main(command)


# Flow.


@pytest.fixture(scope="module")
def questions(trained, tmp_path_factory) -> list[Question]:
    """About three short videos of which only the features are there."""
    rng = np.random.default_rng(0)
    found = []
    for number, answer in enumerate(("cat", "a", "moon")):
        video = tmp_path_factory.mktemp("videos") / f"{number}.mp4"
        video.write_bytes(bytes([number]))
        shape = (FRAMES, SIZES.tokens_per_frame, SIZES.vision.embed_dim)
        trained.features.put(video, rng.normal(size=shape).astype(np.float16))
        found.append(
            Question(
                id=str(number),
                video=str(video),
                times=np.arange(FRAMES) + 0.5,
                turns=(Turn("user", (Media(FRAMES), "What?")),),
                answer=answer,
                notes={"kind": "what"},
            )
        )
    return found


@tiny.quick_jit
def _logits(model, batch):
    output = model.forward(batch)
    return model.llm.logits(output.hidden), output.positions


def test_an_answer_is_right_when_each_token_is_the_likeliest(trained, questions):
    examples = [flow.example(trained, question) for question in questions]
    model = trained.model
    first, last = flow.batches(examples, 2, model.cfg.tokens_per_frame)
    assert last.batch.tokens.shape == first.batch.tokens.shape
    # "cat", then a line break and the end of the turn.
    np.testing.assert_array_equal(first.targets[0, :3], [*b"cat"])
    assert np.count_nonzero(first.targets[0] >= 0) == 5
    written = first.batch.tokens[0, first.at[0, 1:5]]
    np.testing.assert_array_equal(written, first.targets[0, :4])

    assert not flow.answered(model, first).any()
    logits, positions = _logits(model, first.batch)
    places = [
        [int(np.flatnonzero(row == at)[0]) for at in mine]
        for row, mine in zip(np.asarray(positions), first.at, strict=True)
    ]
    best = np.stack(
        [row[p].argmax(-1) for row, p in zip(np.asarray(logits), places, strict=True)]
    )
    likeliest = np.where(first.targets >= 0, best, -1).astype(np.int32)
    asked = dataclasses.replace(first, targets=likeliest)
    assert flow.answered(model, asked).all()
    spoilt = likeliest.copy()
    spoilt[1, 1] += 1
    asked = dataclasses.replace(first, targets=spoilt)
    assert flow.answered(model, asked).tolist() == [True, False]


def test_who_writes_the_answer_and_who_is_asked(trained, questions):
    (asked,) = flow.batches([flow.example(trained, questions[0])], 1, 4)
    words = lambda cut: bytes(
        token for token in asked.batch.tokens[asked.receivers(cut)] if token < 256
    )
    assert words("answer") == b"\ncat\n"
    assert words("instruction") == b"What?\nAssistant"
    both = asked.receivers("instruction") | asked.receivers("answer")
    np.testing.assert_array_equal(both, asked.receivers("instruction and answer"))
    assert not asked.receivers(plots.DROPPED).any()


def test_every_cut_is_measured_at_every_layer(trained, questions):
    points = flow.measure(trained, questions, rows=2)
    layers = flow.depths(SIZES.llm.pattern)
    assert layers[-1] == len(SIZES.llm.pattern)
    assert len(points) == 4 * len(layers)
    assert {point.count for point in points} == {3}
    lines = flow.table(points).splitlines()
    assert lines[0].split() == ["from", "layer", *map(str, layers)]
    assert len(lines) == 5
