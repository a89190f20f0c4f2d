"""Loading by name tables: everything lands once, and every misfit is named."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from timeviper_jax.conversion.load import load_params, save_params
from timeviper_jax.conversion.rules import Cut, Rule

RULES = (
    Rule(r"up\.(\d)\.weight", r"layers/kernel[\1]", "D E -> E D"),
    Rule(r"head\.weight", r"head/kernel", "D E -> E D", cut=Cut(0, 3, 4)),
    Rule(r"head\.weight", r"head/bias", "1 D -> D", cut=Cut(3, 4, 4)),
)


class _Stack(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((2, 4, 3), jnp.bfloat16))


class _Head(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((4, 3)))
        self.bias = nnx.Param(jnp.zeros((4,)))


class _Model(nnx.Module):
    def __init__(self):
        self.layers = _Stack()
        self.head = _Head()


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
    np.testing.assert_array_equal(model.head.bias[...], tensors["head.weight"][3])


def test_every_misfit_is_named_and_nothing_changes():
    tensors = _tensors() | {"extra.weight": np.zeros(1)}
    del tensors["up.1.weight"]
    tensors["up.7.weight"] = np.zeros((3, 4))
    wrong = Rule(
        r"head\.weight", "head/bias", "1 (D n) -> D n", dict(n=2), RULES[2].cut
    )
    rules = (*RULES[:2], RULES[1], wrong)
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
        "head/bias: got (2, 2), want (4,) (head.weight is (4, 4))",
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
    rules = (*RULES, Rule(r"extra", "tail/kernel"))
    with pytest.raises(ValueError, match="tail/kernel: the model has no such"):
        load_params(_Model(), {"extra": np.zeros(1)}, rules, keep=(r".*",))


def test_what_is_loaded_is_saved_as_it_was():
    tensors, model = _tensors(), _Model()
    load_params(model, tensors, RULES)
    saved = save_params(model, RULES)
    assert sorted(saved) == sorted(tensors)
    np.testing.assert_array_equal(saved["head.weight"], tensors["head.weight"])
    up = tensors["up.1.weight"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(saved["up.1.weight"].astype(up.dtype), up)


def test_what_has_no_published_name_or_only_part_of_one_is_named():
    rules = (Rule(r"up\.([1-9])\.weight", r"layers/kernel[\1]"), RULES[1])
    with pytest.raises(ValueError) as error:
        save_params(_Model(), rules)
    for line in (
        "layers/kernel[0]: no rule names it",
        "head/bias (4,): no rule names it",
        "head.weight: its part 3..4 is nowhere",
    ):
        assert line in str(error.value)


def test_a_rule_without_a_way_back_is_an_error():
    rule = Rule(r"up\.(\d)\.weight", "layers/kernel", "D E -> E D")
    with pytest.raises(ValueError, match="must use each group of"):
        save_params(_Model(), (rule,))
