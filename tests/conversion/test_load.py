"""Loading by name tables: everything lands once, and every misfit is named."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from timeviper_jax.conversion.load import load_params

RULES = (
    (r"up\.(\d)\.weight", r"layers/kernel[\1]", np.transpose),
    (r"head\.weight", r"head/kernel", lambda w: w[:3].T),
    (r"head\.weight", r"head/bias", lambda w: w[3, :3]),
)


class _Stack(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((2, 4, 3), jnp.bfloat16))


class _Model(nnx.Module):
    def __init__(self):
        self.layers = _Stack()
        self.head = nnx.Linear(4, 3, rngs=nnx.Rngs(0))


def _tensors():
    shapes = {"up.0.weight": (3, 4), "up.1.weight": (3, 4), "head.weight": (4, 4)}
    return {
        name: np.random.default_rng(i).normal(size=shape).astype(np.float32)
        for i, (name, shape) in enumerate(shapes.items())
    }


def test_layers_stack_and_a_fused_tensor_splits():
    tensors = _tensors()
    model = _Model()
    load_params(model, tensors, RULES)
    assert model.layers.kernel.dtype == jnp.bfloat16
    want = np.stack([tensors["up.0.weight"].T, tensors["up.1.weight"].T])
    np.testing.assert_array_equal(model.layers.kernel[...], want.astype(jnp.bfloat16))
    np.testing.assert_array_equal(model.head.kernel[...], tensors["head.weight"][:3].T)
    np.testing.assert_array_equal(model.head.bias[...], tensors["head.weight"][3, :3])


def test_every_misfit_is_named_and_nothing_changes():
    tensors = _tensors() | {"extra.weight": np.zeros(1)}
    del tensors["up.1.weight"]
    tensors["up.7.weight"] = np.zeros((3, 4))
    rules = (*RULES[:2], RULES[1], (r"head\.weight", "head/bias", lambda w: w[3]))
    model = _Model()
    before = model.head.kernel[...]
    with pytest.raises(ValueError) as error:
        load_params(model, tensors, rules)
    for line in (
        "5 names do not fit _Model",
        "extra.weight (1,): no rule matches it",
        "layers/kernel[1]: no tensor fills it",
        "layers/kernel[7]: outside (2, 4, 3)",
        "head.weight (4, 4): head/kernel is already filled",
        "head/bias: got (4,), want (3,)",
    ):
        assert line in str(error.value)
    np.testing.assert_array_equal(model.head.kernel[...], before)


def test_an_unfilled_parameter_and_an_unused_tensor_must_be_deliberate():
    tensors = _tensors() | {"extra.weight": np.zeros(1)}
    del tensors["head.weight"]
    with pytest.raises(ValueError, match="head/kernel .* no tensor fills it"):
        load_params(_Model(), tensors, RULES, ignore=(r"extra\..*",))
    load_params(_Model(), tensors, RULES, ignore=(r"extra\..*",), keep=(r"head/.*",))


def test_a_path_the_module_lacks_is_named():
    rules = (*RULES, (r"extra", "tail/kernel", np.asarray))
    with pytest.raises(ValueError, match="tail/kernel: the module has no such"):
        load_params(_Model(), {"extra": np.zeros(1)}, rules, keep=(r".*",))
