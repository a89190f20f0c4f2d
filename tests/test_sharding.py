"""Where arrays live: every parameter has one rule, and its shards are whole."""

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from timeviper_jax import sharding
from timeviper_jax.presets import PRESETS, encoder, with_encoder
from timeviper_jax.timeviper import TimeViper

# Those of the pods that large models are meant for, and the eight devices of the tests.
_PODS = [(1, 64, 1, 1), (1, 8, 8, 1), (4, 16, 4, 1), (1, 4, 1, 16)]
_FEW_KV_HEADS = [(1, 64, 1, 1), (1, 32, 2, 1), (4, 8, 2, 1), (1, 4, 1, 16)]
MESHES = {
    "nano_9b": _PODS,
    "nano_12b": _PODS,
    "nemotron_h_8b": _PODS,
    "qwen2_1_5b": _FEW_KV_HEADS,
    "qwen2_3b": _FEW_KV_HEADS,
    "qwen2_7b": _FEW_KV_HEADS,
    "small": [(1, 8, 1, 1), (1, 4, 2, 1), (8, 1, 1, 1)],
    "tiny": [(1, 8, 1, 1), (1, 4, 2, 1), (8, 1, 1, 1)],
}


@pytest.fixture(scope="module", params=PRESETS)
def preset(request):
    return request.param


@pytest.fixture(scope="module")
def shapes(preset):
    return _shapes(PRESETS[preset])


def _shapes(cfg):
    model = nnx.eval_shape(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): param.shape for path, param in flat}


def test_every_parameter_matches_exactly_one_rule(shapes):
    for path, shape in shapes.items():
        assert len(sharding.spec_of(path)) <= len(shape), path


def test_mesh_axes_divide_every_parameter(preset, shapes):
    types = (AxisType.Auto,) * len(sharding.AXES)
    for sizes in MESHES[preset]:
        mesh = AbstractMesh(sizes, sharding.AXES, axis_types=types)
        for path, shape in shapes.items():
            place = jax.sharding.NamedSharding(mesh, sharding.spec_of(path))
            assert len(place.shard_shape(shape)) == len(shape), path


@pytest.mark.parametrize(
    "name", ["dinov2-vit-l+siglip-vit-so400m-384px", "internvideo2-1b-16-224px"]
)
def test_mesh_axes_divide_other_encoders_too(name):
    cfg = with_encoder(PRESETS["nano_9b"], encoder(name), "tome_mlp-16")
    types = (AxisType.Auto,) * len(sharding.AXES)
    for sizes in MESHES["nano_9b"]:
        mesh = AbstractMesh(sizes, sharding.AXES, axis_types=types)
        for path, shape in _shapes(cfg).items():
            place = jax.sharding.NamedSharding(mesh, sharding.spec_of(path))
            assert len(place.shard_shape(shape)) == len(shape), path


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


def test_moments_live_where_their_parameters_do():
    mesh = sharding.make_mesh(fsdp=-1)
    params = {"llm/head/kernel": 0.0, "llm/norm/scale": 0.0}
    state = ({"count": 0}, {"mu": dict(params)})
    places = sharding.shard_like_params(state, params, mesh)
    assert places[1]["mu"]["llm/head/kernel"].spec == P(None, ("tensor", "fsdp"))
    assert places[0]["count"].spec == P()
