"""The Mamba-2 mixer: project, convolve, scan, gate, project back.

https://arxiv.org/abs/2405.21060. The input projection and the convolution are kept
as one matrix for each of z, x, B, C and dt, so that each shards on its own heads.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.causal_conv1d.context_parallel import causal_conv1d_sharded
from pallas_kernels.ssd import ssd, ssd_step
from pallas_kernels.ssd.context_parallel import ssd_sharded
from timeviper_jax.layers.cache import MambaCache
from timeviper_jax.layers.layout import Layout
from timeviper_jax.layers.norm import GatedRMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Sizes of one Mamba-2 layer.

    `dt_limit` clips the step size after softplus; `dt_init` is the range it starts
    in. `implementation` is an SSD implementation's name, or "auto".
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int
    conv_kernel: int = 4
    chunk_size: int = 128
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, math.inf)
    dt_init: tuple[float, float] = (0.001, 0.1)
    dt_floor: float = 1e-4
    implementation: str = "auto"
    init_std: float = 0.02
    out_std: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.num_heads % self.num_groups:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of"
                f" num_groups={self.num_groups}."
            )

    @property
    def inner_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def group_dim(self) -> int:
        """Width of B, and of C, over all groups."""
        return self.num_groups * self.state_dim


class CausalConv(nnx.Module):
    """A depthwise causal convolution's parameters, and SiLU after it."""

    def __init__(self, dim: int, cfg: Mamba2Config, *, rngs: nnx.Rngs):
        bound = cfg.conv_kernel**-0.5
        uniform = lambda shape: jax.random.uniform(  # noqa: E731
            rngs.params(), shape, cfg.param_dtype, -bound, bound
        )
        self.dtype = cfg.dtype
        self.kernel = nnx.Param(uniform((cfg.conv_kernel, dim)))
        self.bias = nnx.Param(uniform((dim,)))

    def __call__(
        self,
        x: Float[Array, "B T X"],
        layout: Layout,
        window: Float[Array, "B W X"] | None,
    ) -> tuple[Float[Array, "B T X"], Float[Array, "B W X"]]:
        kernel, bias = (p[...].astype(self.dtype) for p in (self.kernel, self.bias))
        options = dict(
            initial_state=window, segment_ids=layout.boundaries, activation="silu"
        )
        if layout.axis:
            return causal_conv1d_sharded(
                x, kernel, bias, axis_name=layout.axis, **options
            )
        return causal_conv1d(x, kernel, bias, lengths=layout.lengths, **options)


class Mamba2(nnx.Module):
    """Selective state space with scalar decay per head."""

    def __init__(self, cfg: Mamba2Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        options = dict(
            use_bias=False,
            kernel_init=nnx.initializers.normal(cfg.init_std),
            dtype=cfg.dtype,
            param_dtype=cfg.param_dtype,
            rngs=rngs,
        )
        D, inner, group = cfg.embed_dim, cfg.inner_dim, cfg.group_dim
        self.in_z = nnx.Linear(D, inner, **options)
        self.in_x = nnx.Linear(D, inner, **options)
        self.in_b = nnx.Linear(D, group, **options)
        self.in_c = nnx.Linear(D, group, **options)
        self.in_dt = nnx.Linear(D, cfg.num_heads, **options)
        self.conv_x = CausalConv(inner, cfg, rngs=rngs)
        self.conv_b = CausalConv(group, cfg, rngs=rngs)
        self.conv_c = CausalConv(group, cfg, rngs=rngs)
        self.dt_bias = nnx.Param(_dt_bias(rngs.params(), cfg))
        rates = jnp.arange(1, cfg.num_heads + 1, dtype=jnp.float32)
        self.a_log = nnx.Param(jnp.log(rates).astype(cfg.param_dtype))
        self.d = nnx.Param(jnp.ones((cfg.num_heads,), cfg.param_dtype))
        self.norm = GatedRMSNorm(
            inner,
            cfg.num_groups,
            eps=cfg.norm_eps,
            param_dtype=cfg.param_dtype,
            rngs=rngs,
        )
        options |= dict(kernel_init=nnx.initializers.normal(cfg.out_std))
        self.out = nnx.Linear(inner, D, **options)

    def __call__(
        self, x: Float[Array, "B T D"], layout: Layout, cache: MambaCache | None = None
    ) -> tuple[Float[Array, "B T D"], MambaCache | None]:
        """Mixes over time; a cache carries the tokens before this call."""
        z, dt = self.in_z(x), self.step_size(x, layout)
        conv_x, conv_b, conv_c = (
            (None, None, None)
            if cache is None
            else (cache.conv_x, cache.conv_b, cache.conv_c)
        )
        values, conv_x = self.conv_x(self.in_x(x), layout, conv_x)
        b, conv_b = self.conv_b(self.in_b(x), layout, conv_b)
        c, conv_c = self.conv_c(self.in_c(x), layout, conv_c)
        values = rearrange(values, "B T (N P) -> B T N P", P=self.cfg.head_dim)
        b, c = (
            rearrange(m, "B T (G S) -> B T G S", S=self.cfg.state_dim) for m in (b, c)
        )
        y, state = self.scan(values, dt, b, c, layout, cache)
        y = self.out(self.norm(rearrange(y, "B T N P -> B T (N P)"), z))
        if cache is None:
            return y, None
        return y, MambaCache(conv_x=conv_x, conv_b=conv_b, conv_c=conv_c, state=state)

    def step_size(
        self, x: Float[Array, "B T D"], layout: Layout
    ) -> Float[Array, "B T N"]:
        """dt in float32; zero at padding, which therefore leaves the state alone."""
        dt = self.in_dt(x).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)
        dt = jnp.clip(jax.nn.softplus(dt), *self.cfg.dt_limit)
        return jnp.where(layout.valid[..., None], dt, 0.0)

    def scan(
        self,
        x: Float[Array, "B T N P"],
        dt: Float[Array, "B T N"],
        b: Float[Array, "B T G S"],
        c: Float[Array, "B T G S"],
        layout: Layout,
        cache: MambaCache | None,
    ) -> tuple[Float[Array, "B T N P"], Float[Array, "B N P S"]]:
        """The state space over this call's tokens."""
        a = -jnp.exp(self.a_log[...].astype(jnp.float32))
        d = self.d[...].astype(jnp.float32)
        if cache is not None and x.shape[1] == 1:
            y, state = ssd_step(
                x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], cache.state, d=d
            )
            return y[:, None], state
        name = self.cfg.implementation
        run = functools.partial(ssd_sharded, axis_name=layout.axis)
        return (run if layout.axis else ssd)(
            x,
            dt,
            a,
            b,
            c,
            d=d,
            initial_state=None if cache is None else cache.state,
            segment_ids=layout.boundaries,
            chunk_size=self.cfg.chunk_size,
            implementation=None if name == "auto" else name,
        )


def _dt_bias(key: jax.Array, cfg: Mamba2Config) -> Float[Array, "N"]:
    """The inverse softplus of step sizes drawn log-uniformly from `dt_init`."""
    low, high = (math.log(limit) for limit in cfg.dt_init)
    dt = jnp.exp(jax.random.uniform(key, (cfg.num_heads,), minval=low, maxval=high))
    dt = jnp.maximum(dt, cfg.dt_floor)
    return (dt + jnp.log(-jnp.expm1(-dt))).astype(cfg.param_dtype)
