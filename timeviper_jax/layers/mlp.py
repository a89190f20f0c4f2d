"""The hybrid model's feed-forward mixer: up, squared ReLU, down, no gate."""

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


class MLP(nnx.Module):
    """`down(relu(up(x))^2)`."""

    def __init__(self, cfg: MLPConfig, *, rngs: nnx.Rngs):
        options = dict(
            use_bias=False,
            dtype=cfg.dtype,
            param_dtype=cfg.param_dtype,
            rngs=rngs,
        )
        normal = nnx.initializers.normal
        self.up = nnx.Linear(
            cfg.embed_dim, cfg.mlp_dim, kernel_init=normal(cfg.init_std), **options
        )
        self.down = nnx.Linear(
            cfg.mlp_dim, cfg.embed_dim, kernel_init=normal(cfg.out_std), **options
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.relu(self.up(x)) ** 2)
