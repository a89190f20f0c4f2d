"""The projector: the release's outputs and gradients, merging before it included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden_cases import load, under
from timeviper_jax.conversion.load import load_params
from timeviper_jax.conversion.vision import PROJECTOR_RULES
from timeviper_jax.vision.projector import Projector, ProjectorConfig
from timeviper_jax.vision.tome import merge


def _projector(params, fused=False):
    """A projector holding the release's parameters, sized by them."""
    first, last = params["projector.0.weight"], params["projector.2.weight"]
    cfg = ProjectorConfig(vision_dim=first.shape[1], llm_dim=last.shape[0], fused=fused)
    projector = Projector(cfg, rngs=nnx.Rngs(0))
    load_params(projector, params, PROJECTOR_RULES)
    return projector


@pytest.mark.parametrize("case", ["tome_36x64_to4", "tome_fused_mlp", "tome_desc"])
def test_release_projects_and_differentiates_alike(case):
    config, arrays = load(case)
    keep, order = config["num_compressed_tokens"], config["token_order"]
    fused = config["mlp_type"] == "fused_tome_mlp"
    definition, params = nnx.split(_projector(under("param.", arrays), fused))

    @jax.jit
    def loss(params, x):
        y = nnx.merge(definition, params)(merge(x, keep, order=order)[0])
        return jnp.sum(y * arrays["in.cotangent"]), y

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (grads, grad_x), y = grad(params, arrays["in.x"])
    np.testing.assert_allclose(y, arrays["out.y"], atol=2e-6)
    np.testing.assert_allclose(grad_x, arrays["grad.in.x"], atol=2e-6)
    recorded = {key: g for key, g in under("grad.", arrays).items() if key != "in.x"}
    want = nnx.state(_projector(recorded, fused))
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5), grads, want
    )


def test_release_projects_unmerged_tokens_alike():
    _, arrays = load("projector_multi")
    projector = _projector(under("param.single.", arrays))
    got = projector(jnp.asarray(arrays["in.a"]))
    np.testing.assert_allclose(got, arrays["out.single_mlp"], atol=2e-6)


def test_any_leading_axes_go_token_by_token():
    cfg = ProjectorConfig(vision_dim=8, llm_dim=4)
    projector = nnx.jit(Projector(cfg, rngs=nnx.Rngs(0)))
    tokens = jax.random.normal(jax.random.key(0), (2, 3, 5, 8))
    np.testing.assert_allclose(
        projector(tokens)[1, 2, 3], projector(tokens[1, 2, 3]), atol=1e-6
    )
