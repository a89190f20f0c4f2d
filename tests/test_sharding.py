"""Where arrays live: every parameter has one rule, and its shards are whole."""

import dataclasses
import inspect

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from tests.training.mini import make_task
from timeviper_jax import sharding
from timeviper_jax.presets import PRESETS, encoder, with_encoder
from timeviper_jax.training import experiment
from timeviper_jax.training.experiment import StageConfig

# Those of the pods that large models are meant for, and the eight devices of the tests.
_PODS = [(1, 64, 1, 1), (1, 8, 8, 1), (4, 16, 4, 1), (1, 4, 1, 16), (1, 4, 4, 16)]
_PODS += [(1, 64, 1, 4), (1, 8, 1, 8)]
_FEW_KV_HEADS = [(1, 64, 1, 1), (1, 32, 2, 1), (4, 8, 2, 1), (1, 4, 1, 16)]
MESHES = {
    "nano_9b": _PODS,
    "nano_12b": _PODS,
    "nemotron_h_8b": _PODS,
    "qwen2_1_5b": _FEW_KV_HEADS,
    "qwen2_3b": _FEW_KV_HEADS,
    "qwen2_7b": _FEW_KV_HEADS,
    "small": [(1, 8, 1, 1), (1, 4, 1, 2), (8, 1, 1, 1)],
    "tiny": [(1, 8, 1, 1), (1, 4, 2, 1), (1, 2, 2, 2), (8, 1, 1, 1)],
}


@pytest.fixture(scope="module", params=PRESETS)
def preset(request):
    return request.param


@pytest.fixture(scope="module")
def shapes(preset):
    return _shapes(PRESETS[preset])


def _shapes(cfg):
    _, found = experiment.describe(cfg)
    return {path: param.shape for path, param in found.items()}


def test_every_parameter_matches_exactly_one_rule(shapes):
    for path, shape in shapes.items():
        assert len(sharding.spec_of(path)) <= len(shape), path


def _mesh(*sizes):
    auto = (AxisType.Auto,) * len(sharding.AXES)
    return AbstractMesh(sizes, sharding.AXES, axis_types=auto)


STAGE = StageConfig(
    task=make_task(num_frames=256, text_tokens=2048),
    steps=1,
    batch_size=128,
    accumulate=2,
    lr=1.0,
    lr_multipliers=(),
    frozen=(),
    transv=(),
)


def test_meshes_divide_models_and_their_batches(preset):
    for sizes in MESHES[preset]:
        experiment.check_mesh(PRESETS[preset], STAGE, _mesh(*sizes))


def test_every_shard_is_whole(preset, shapes):
    for sizes in MESHES[preset]:
        for path, shape in shapes.items():
            place = jax.sharding.NamedSharding(_mesh(*sizes), sharding.spec_of(path))
            assert len(place.shard_shape(shape)) == len(shape), path


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1, 1, 3, 1), "num_heads=40 does not divide over the mesh's tensor=3"),
        ((1, 96, 1, 1), "does not divide llm/.* \\(.*\\), which is split as"),
        ((1, 1, 20, 1), "num_kv_heads=8 does not divide over the mesh's tensor=20"),
        ((128, 1, 1, 1), "batch_size / accumulate=64 .* data=128 x fsdp=1; use a mult"),
        ((1, 1, 1, 4096), "A row's tokens=6144 does not divide .* context=4096"),
    ],
)
def test_a_mesh_that_does_not_divide_is_an_error_of_one_line(sizes, words):
    with pytest.raises(ValueError, match=words) as error:
        experiment.check_mesh(PRESETS["nano_9b"], STAGE, _mesh(*sizes))
    assert "\n" not in str(error.value)


def test_parts_that_do_not_divide_a_batch_are_an_error():
    stage = dataclasses.replace(STAGE, accumulate=3)
    with pytest.raises(ValueError, match="batch_size=128 does not divide into accum"):
        experiment.check_mesh(PRESETS["tiny"], stage, _mesh(1, 1, 1, 1))


def test_a_single_host_makes_the_whole_batch():
    assert sharding.feed(sharding.make_mesh()) == (0, 1)


@pytest.mark.parametrize(
    "name", ["dinov2-vit-l+siglip-vit-so400m-384px", "internvideo2-1b-16-224px"]
)
def test_mesh_axes_divide_other_encoders_too(name):
    cfg = with_encoder(PRESETS["nano_9b"], encoder(name), "tome_mlp-16")
    for sizes in MESHES["nano_9b"]:
        experiment.check_mesh(cfg, STAGE, _mesh(*sizes))


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="0 sharding rules match parameter 'llm/new'"):
        sharding.spec_of("llm/new")


def test_a_mesh_takes_every_device():
    devices = jax.devices() * 6
    with pytest.raises(ValueError, match="does not take all of 6 devices"):
        sharding.make_mesh(fsdp=4, devices=devices)
    with pytest.raises(ValueError, match="Only one axis"):
        sharding.make_mesh(data=-1, fsdp=-1)
    assert sharding.make_mesh(fsdp=-1).shape["fsdp"] == 1


@dataclasses.dataclass(frozen=True)
class _Chip:
    """What says of a chip where it stands."""

    id: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def test_an_axis_of_a_pod_may_be_cut():
    """16 x 16 chips as 64 x 4: neither axis is one of the torus, or all of both."""
    chips = [_Chip(16 * y + x, (x, y, 0)) for y in range(16) for x in range(16)]
    # They are no `jax.Device`, as the types' check would say.
    mesh = inspect.unwrap(sharding.make_mesh)(fsdp=64, context=4, devices=chips)
    assert {chip.id for chip in mesh.devices.flat} == set(range(256))


_WORDS = ("tensor", "fsdp", "context")


def test_moments_live_where_their_parameters_do():
    mesh = sharding.make_mesh(fsdp=-1)
    params = {"llm/head/kernel": 0.0, "llm/norm/scale": 0.0}
    state = ({"count": 0}, {"mu": dict(params)})
    places = sharding.shard_like_params(state, params, mesh)
    assert places[1]["mu"]["llm/head/kernel"].spec == P(None, _WORDS)
    assert places[0]["count"].spec == P()
