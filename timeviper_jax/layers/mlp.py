"""Feed-forward mixers: squared ReLU in hybrid models, gated SiLU in plain ones."""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Sizes of one MLP; `out_std` starts the matrix that writes to the residual."""

    embed_dim: int
    mlp_dim: int
    init_std: float = 0.02
    out_std: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"


def _linear(
    cfg: MLPConfig, inputs: int, outputs: int, std: float, rngs: nnx.Rngs
) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        kernel_init=nnx.initializers.normal(std),
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        rngs=rngs,
    )


class MLP(nnx.Module):
    """`down(relu(up(x))^2)`."""

    def __init__(self, cfg: MLPConfig, *, rngs: nnx.Rngs):
        self.up = _linear(cfg, cfg.embed_dim, cfg.mlp_dim, cfg.init_std, rngs)
        self.down = _linear(cfg, cfg.mlp_dim, cfg.embed_dim, cfg.out_std, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.relu(self.up(x)) ** 2)


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`: SwiGLU."""

    def __init__(self, cfg: MLPConfig, *, rngs: nnx.Rngs):
        self.gate = _linear(cfg, cfg.embed_dim, cfg.mlp_dim, cfg.init_std, rngs)
        self.up = _linear(cfg, cfg.embed_dim, cfg.mlp_dim, cfg.init_std, rngs)
        self.down = _linear(cfg, cfg.mlp_dim, cfg.embed_dim, cfg.out_std, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
