"""The plan of a prefill: what a viewer does, each token once, in memory that counts."""

import collections
import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tiny
from flax import nnx

from pallas_kernels.bench import compiled
from pallas_kernels.chips import Chip
from timeviper_jax import flops
from timeviper_jax.benchmarks.prefill import __main__ as command
from timeviper_jax.benchmarks.prefill import report, settings
from timeviper_jax.benchmarks.prefill.calls import DECODE, QUESTION, Setting
from timeviper_jax.benchmarks.prefill.plan import plan
from timeviper_jax.data.conversation import EncodedText
from timeviper_jax.data.examples import Example, Role
from timeviper_jax.inference import memory, programs
from timeviper_jax.inference.reader import LARGE, ViewerConfig
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.viewer import Viewer
from timeviper_jax.presets import PRESETS
from timeviper_jax.timeviper import TimeViper

VIEWER = ViewerConfig(chunk=16, text_chunk=8, text_room=32, smallest_cache=32)
SETTING = Setting(
    sizes=PRESETS["tiny"],
    viewer=VIEWER,
    frames=25,
    batch=8,
    prefix=3,
    question=11,
    answer=5,
)


@pytest.fixture(autouse=True)
def shapes_for_arrays():
    """Plans are made of shapes, which the checks of array types do not know."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def shapes(args) -> tuple:
    arrays = [z for z in jax.tree.leaves(args) if hasattr(z, "shape")]
    dtype = partial(jax.dtypes.canonicalize_dtype, allow_extended_dtype=True)
    return tuple((z.shape, str(dtype(z.dtype))) for z in arrays)


class Recorder:
    """Stands in for a program: notes its arguments, and draws its results."""

    def __init__(self, function, seen: collections.Counter):
        self.function, self.seen = function, seen

    def __call__(self, *args):
        self.seen[id(self.function), shapes(args)] += 1
        rng = np.random.default_rng(sum(self.seen.values()))

        def drawn(z):
            if jax.dtypes.issubdtype(z.dtype, jax.dtypes.prng_key):
                return jax.random.key(0)
            return jnp.asarray(rng.random(z.shape), z.dtype)  # Integers are 0.

        results = self.function.eval_shape(*args)
        return jax.tree.map(drawn, results)


def watch_and_ask(model: TimeViper, setting: Setting, monkeypatch) -> dict:
    """How often a real viewer runs each program."""
    seen = collections.Counter()
    viewer = Viewer(model, setting.viewer)
    names = ("embed", "embed_text", "run", "rank", "head", "write")
    run_on = viewer.reader.run_on
    viewer.reader.run_on = dataclasses.replace(
        run_on, **{name: Recorder(getattr(run_on, name), seen) for name in names}
    )
    for module, name in [
        (programs, "regroup"),
        (programs, "drop"),
        (programs, "transfer"),
        (memory, "take_cache"),
    ]:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), seen))
    roles = [Role.TEXT] * setting.prefix + [Role.VISION] * setting.vision_tokens
    cfg = setting.sizes
    size = (setting.frames, cfg.tokens_per_frame, cfg.vision.embed_dim)
    video = Example(
        tokens=np.ones(len(roles), np.int32),
        roles=np.array(roles, np.int32),
        loss_mask=np.zeros(len(roles), bool),
        frame_times=np.arange(setting.frames).astype(np.float32),
        features=np.zeros(size, np.float32),
    )
    question = EncodedText(
        tokens=np.ones(setting.question, np.int32),
        roles=np.full(setting.question, Role.INSTRUCTION, np.int32),
        loss_mask=np.zeros(setting.question, bool),
    )
    state = viewer.watch([video])
    viewer.ask(state, [question], decoding=Decoding(max_tokens=setting.answer))
    return seen


@pytest.mark.parametrize("transv", [True, False])
def test_the_plan_is_what_a_viewer_does(transv, monkeypatch):
    sizes = SETTING.sizes if transv else SETTING.sizes.with_transv(())
    setting = dataclasses.replace(SETTING, sizes=sizes)
    model = tiny.build(lambda: TimeViper(sizes, rngs=nnx.Rngs(0)))
    planned = collections.Counter()
    for call in plan(setting):
        # Vision is encoded elsewhere, and no head is run for what `write` decodes.
        if call.part == "vision" or call.name == "head":
            continue
        planned[id(call.program.function), shapes(call.program.args)] += call.times
    assert watch_and_ask(model, setting, monkeypatch) == planned


@pytest.mark.parametrize("preset", ["tiny", "nano_9b"])
@pytest.mark.parametrize("frames", [1, 25, 10_000])
def test_each_token_goes_once_through_each_stretch(preset, frames):
    viewer = LARGE if preset == "nano_9b" else VIEWER
    sizes = settings.in_one_dtype(PRESETS[preset])
    setting = dataclasses.replace(SETTING, sizes=sizes, viewer=viewer, frames=frames)
    calls = plan(setting)
    vision = setting.vision_tokens
    kept = [vision, *(int(vision * stage.keep) for stage in sizes.llm.transv)]
    runs = [call for call in calls if call.part.startswith("layers")]
    assert [call.tokens for call in runs] == [setting.prefix + k for k in kept]
    dropped = [call.tokens for call in calls if call.name.startswith("drop")]
    assert dropped == [a - b for a, b in zip(kept, kept[1:], strict=False)]
    for call in runs:
        ids = [call.values(i)["[2]"] for i in range(call.times)]
        assert sum(row.sum() for row in ids) == call.tokens
        assert all(row.any() for row in ids)
    question = [call for call in calls if call.name.startswith("run")]
    question = [call for call in question if call.part == QUESTION]
    assert [call.tokens for call in question] == [setting.question] * len(kept)


def test_the_arithmetic_of_a_stretch_is_that_of_its_layers():
    """Of "M-*": more than its projections by hand, by what its sequences take."""
    sizes = SETTING.sizes.with_transv(())
    llm = dataclasses.replace(sizes.llm, pattern="M-*", rolled=True)
    setting = dataclasses.replace(
        SETTING, sizes=dataclasses.replace(sizes, llm=llm), frames=20
    )
    (call,) = (call for call in plan(setting) if call.part.startswith("layers"))
    paths = jax.tree.leaves_with_path(call.program.args)
    keys = [jax.tree_util.keystr(path) for path, _ in paths]
    jaxpr = call.program.trace().jaxpr
    per_run = [
        flops.count(jaxpr, [call.values(i).get(key) for key in keys])
        for i in range(call.times)
    ]
    assert all(found.exact for found in per_run)
    D, M, N, K, H = 32, 64, 4, 2, 8
    inner, group = llm.mamba.inner_dim, llm.mamba.group_dim
    mamba = D * (2 * inner + 2 * group + llm.ssm_heads) + inner * D
    attention = D * H * (2 * N + 2 * K)
    least = 2 * VIEWER.chunk * (mamba + 2 * D * M + attention)
    assert all(least < found.flops < 2 * least for found in per_run)


def test_memory_is_what_a_program_takes_and_what_else_is_there():
    chip = Chip("", bandwidth=1e9, clock=1.0, peak=1e12, memory=3 * 2**30, links=1e9)
    one = dict(part="vision", name="encode", times=2, tokens=4, exact=True)
    one |= dict(flops=3e12, moved=1e9, resident=2**30)
    one |= dict(argument=2**30, output=2**29, alias=2**28, temp=2**28)
    decode = one | dict(part=DECODE, name="write", flops=0, moved=5e8, temp=0)
    found = report.of_calls([one, decode], chip)
    assert (found["gib"], found["fits"], found["at"]) == (2.5, True, "encode")
    assert found["bound_seconds"] == 3.0
    assert found["parts"] == {
        "vision": {"bound_seconds": 3.0, "tera_flop": 3.0, "share": 1.0}
    }
    assert found["decode_bound_seconds"] == 0.5


def test_the_nine_billion_are_counted_in_bytes_before_anything_is_compiled():
    sizes = settings.in_one_dtype(PRESETS["nano_9b"])
    setting = dataclasses.replace(
        SETTING, sizes=sizes, viewer=LARGE, frames=10_000, prefix=64, question=192
    )
    assert setting.tokens == 160_256
    calls = plan(setting)
    moved = {call.name: call.moved / call.times for call in calls}
    weights = 8_888_227_328 * 2
    embedding = 131_072 * 4480 * 2
    states = 27 * 4 * 128 * 80 * 128  # Read and written.
    assert moved["write"] == pytest.approx(
        weights - embedding + 2 * states + 3 * 81_920 * 4096, rel=0.02
    )
    assert math.prod(calls[0].program.args[1].shape) == 8 * 384 * 384 * 3


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="not installed: pip install libtpu"):
        command.main(["--preset", "tiny", "--aot", "v5p"])


@pytest.mark.slow
def test_the_tiny_model_is_measured_where_it_runs(tmp_path, capsys):
    frames = ["--frames", "24", "48", "--batch", "8"]
    command.main(["--preset", "tiny", *frames, "--results", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
    assert set(found["saved_by_transv"]) == {"24", "48"}
    for one in found["results"]:
        parts = {"vision", "projector", "first token", "decode", "host"}
        layers = {part for part in one["parts"] if part.startswith("layers")}
        assert len(layers) == (3 if one["transv"] else 1)
        assert set(one["parts"]) - layers - {"transv"} == parts
        assert ("transv" in one["parts"]) == one["transv"]
        assert one["seconds"] > 0 and one["tokens_per_second"] > 0


@pytest.mark.slow
@pytest.mark.skipif(
    not compiled.available(),
    reason="The TPU compiler is not installed: pip install libtpu.",
)
def test_the_tiny_model_compiles_for_a_tpu(capsys):
    command.main(["--preset", "tiny", "--aot", "v5p", "--frames", "64", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 64 * 4 + 256
    for result in (found, found["without_transv"]):
        assert result["fits"] and 0 < result["bound_seconds"] < 1
        assert all(call["gib"] is not None for call in result["programs"])
