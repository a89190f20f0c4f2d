"""The language model: Mamba-2, attention and MLP blocks by a pattern string.

A plain transformer is the pattern `*-` as often as it has layers.

Parameters are stacked by kind of mixer, so that the layers can run rolled (in few
loops, which is what lets the 9B compile) or unrolled (small models, inspection) from
the same tree. TransV cuts the stack into segments; a forward pass is: segment, thin,
segment, thin, …, norm, head.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from timeviper_jax import sharding
from timeviper_jax.layers.attention import Attention, AttentionConfig
from timeviper_jax.layers.cache import Cache, KVCache, MambaCache, Slots
from timeviper_jax.layers.layout import Layout
from timeviper_jax.layers.mamba2 import Mamba2, Mamba2Config
from timeviper_jax.layers.mlp import MLP, GatedMLP, MLPConfig
from timeviper_jax.layers.norm import RMSNorm
from timeviper_jax.llm import ranking, repeats, rolled, transv
from timeviper_jax.llm.stream import Stream, take
from timeviper_jax.llm.transv import Dropped, Stage

# What a layer that is recomputed may keep of its forward pass.
REMAT_KEEPS = {
    "inputs": jax.checkpoint_policies.nothing_saveable,
    "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
KINDS = {"M": "mamba", "*": "attention", "-": "mlp"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """The whole language model in numbers; defaults are the hybrid family's.

    `pattern` has one character a block: M Mamba-2, * attention, - MLP. `log_base` and
    `rope_theta` are `AttentionConfig`'s, `qkv_bias` its `bias`. `gated_mlp` is SwiGLU
    instead of squared ReLU. With `tied` the head is the embedding. `match_init` starts
    attention as a search for like tokens (see `init_matching`), for small models
    without pretraining. `rolled` runs the stack as one scan; `remat` recomputes each
    layer in the backward pass from what `remat_keeps`: its "inputs" alone, or the
    results of its "matmuls" too.
    """

    pattern: str
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ssm_heads: int = 0
    ssm_head_dim: int = 0
    ssm_groups: int = 1
    ssm_state: int = 0
    conv_kernel: int = 4
    chunk_size: int = 128
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    log_base: float = 0.0
    rope_theta: float = 0.0
    qkv_bias: bool = False
    gated_mlp: bool = False
    tied: bool = False
    transv: tuple[Stage, ...] = ()
    init_std: float = 0.02
    embed_std: float = 0.02
    match_init: bool = False
    ssd: str = "auto"
    rolled: bool = False
    remat: bool = False
    remat_keeps: str = "inputs"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        unknown = set(self.pattern) - set(KINDS)
        if unknown or not self.pattern:
            raise ValueError(
                f"pattern={self.pattern!r} must be made of {' '.join(KINDS)}."
            )
        sizes = dict(
            ssm_heads=self.ssm_heads,
            ssm_head_dim=self.ssm_head_dim,
            ssm_state=self.ssm_state,
        )
        if "M" in self.pattern and not all(sizes.values()):
            raise ValueError(f"A pattern with M needs sizes above 0: {sizes}.")
        if self.remat_keeps not in REMAT_KEEPS:
            raise ValueError(
                f"remat_keeps={self.remat_keeps!r} is not one of {list(REMAT_KEEPS)}."
            )
        if self.tied and self.match_init:
            raise ValueError("match_init starts a head of its own; set tied=False.")
        transv.check_stages(self.transv, self.pattern)

    @property
    def layers(self) -> tuple[tuple[str, int], ...]:
        """(kind, index in its stack) of every layer: the one place that maps them."""
        seen = dict.fromkeys(KINDS, 0)
        layers = []
        for symbol in self.pattern:
            layers.append((KINDS[symbol], seen[symbol]))
            seen[symbol] += 1
        return tuple(layers)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """The layers [start, stop) between TransV's stages."""
        cuts = [0, *(stage.layer for stage in self.transv), len(self.pattern)]
        return tuple(zip(cuts, cuts[1:], strict=False))

    @property
    def attention(self) -> AttentionConfig:
        return AttentionConfig(
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            log_base=self.log_base,
            rope_theta=self.rope_theta,
            bias=self.qkv_bias,
            **self._common,
        )

    @property
    def mamba(self) -> Mamba2Config:
        return Mamba2Config(
            embed_dim=self.embed_dim,
            num_heads=self.ssm_heads,
            head_dim=self.ssm_head_dim,
            num_groups=self.ssm_groups,
            state_dim=self.ssm_state,
            conv_kernel=self.conv_kernel,
            chunk_size=self.chunk_size,
            norm_eps=self.norm_eps,
            dt_limit=self.dt_limit,
            implementation=self.ssd,
            **self._common,
        )

    @property
    def mlp(self) -> MLPConfig:
        return MLPConfig(embed_dim=self.embed_dim, mlp_dim=self.mlp_dim, **self._common)

    @property
    def _common(self) -> dict[str, str | float]:
        return dict(
            init_std=self.init_std,
            # The deeper the stack, the less each block adds at first.
            out_std=self.init_std / math.sqrt(len(self.pattern)),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )


class Block(nnx.Module):
    """A pre-norm residual block; the caller adds what it returns."""

    def __init__(
        self, mixer: type, mixer_cfg: object, cfg: HybridConfig, *, rngs: nnx.Rngs
    ):
        self.norm = RMSNorm(
            cfg.embed_dim, eps=cfg.norm_eps, param_dtype=cfg.param_dtype, rngs=rngs
        )
        self.mixer = mixer(mixer_cfg, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], *args: object
    ) -> Float[Array, "B T D"] | tuple:
        return self.mixer(self.norm(x), *args)

    def mix(self, x: Float[Array, "B T D"], layout: Layout) -> Float[Array, "B T D"]:
        """What the block adds to whole rows."""
        if isinstance(self.mixer, MLP | GatedMLP):
            return self(x)
        return self(x, layout)[0]


def stack(count: int, create: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs):
    """`count` modules as one whose parameters have a leading axis."""
    split = nnx.split_rngs(splits=count)
    return split(nnx.vmap(create, in_axes=0, out_axes=0))(rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What a forward pass leaves: the stream after the last layer, normed.

    `kept[i]` holds the positions that survive stage i, `scores[i]` its ranking by
    attention. `layers[i]` is (input, mixer output) of block i, if recorded. `caches`
    has one for each stretch of layers between stages, if there were any to fill.
    """

    stream: Stream
    kept: tuple[Int[Array, "B _"], ...] = ()
    scores: tuple[Float[Array, "B _"] | None, ...] = ()
    layers: tuple[tuple[Float[Array, "B _ D"], Float[Array, "B _ D"]], ...] = ()
    caches: tuple[Cache, ...] = ()

    @property
    def hidden(self) -> Float[Array, "B T D"]:
        return self.stream.x

    @property
    def positions(self) -> Int[Array, "B T"]:
        return self.stream.positions


class HybridLM(nnx.Module):
    """Embeddings, stacked blocks, TransV transfers, final norm and head."""

    def __init__(self, cfg: HybridConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = nnx.Embed(
            cfg.vocab_size,
            cfg.embed_dim,
            embedding_init=nnx.initializers.normal(cfg.embed_std),
            dtype=cfg.dtype,
            param_dtype=cfg.param_dtype,
            rngs=rngs,
        )
        mixers = dict(
            mamba=(Mamba2, cfg.mamba),
            attention=(Attention, cfg.attention),
            mlp=(GatedMLP if cfg.gated_mlp else MLP, cfg.mlp),
        )
        kinds = [kind for kind, _ in cfg.layers]
        for kind, (mixer, mixer_cfg) in mixers.items():
            if kind in kinds:
                create = functools.partial(_create_block, mixer, mixer_cfg, cfg)
                setattr(self, kind, stack(kinds.count(kind), create, rngs))
        self.transv = nnx.List(
            transv.Transfer(cfg.attention, rngs=rngs)
            for stage in cfg.transv
            if stage.transfer
        )
        self.norm = RMSNorm(
            cfg.embed_dim, eps=cfg.norm_eps, param_dtype=cfg.param_dtype, rngs=rngs
        )
        if not cfg.tied:
            self.head = nnx.Linear(
                cfg.embed_dim,
                cfg.vocab_size,
                use_bias=False,
                kernel_init=nnx.initializers.normal(cfg.init_std),
                dtype=cfg.dtype,
                param_dtype=cfg.param_dtype,
                rngs=rngs,
            )
        if cfg.match_init:
            self.init_matching()

    def __call__(
        self,
        stream: Stream,
        *,
        caches: tuple[Cache, ...] = (),
        choices: Sequence[Bool[Array, "B _"] | None] = (),
        record: bool = False,
    ) -> Output:
        """One pass over whole rows.

        Args:
          stream: Embedded tokens.
          caches: Those of `init_caches`, to be filled for `extend`.
          choices: For each stage, which of the original positions to keep instead of
            those it would select, as many as it would; None leaves it the choice.
          record: Keeps every block's input and output.
        """
        if caches and stream.num_segments > 1:
            raise ValueError(
                f"A row of {stream.num_segments} samples cannot be cached, only one a"
                " row; put the samples in rows of their own."
            )
        kept, scores, layers, filled = [], [], [], []
        choices = choices or (None,) * len(self.cfg.transv)
        caches = caches or (None,) * len(self.cfg.segments)
        for i, (span, cache) in enumerate(zip(self.cfg.segments, caches, strict=True)):
            if i:
                stream, _, score = self.thin(i - 1, stream, choices[i - 1])
                kept.append(stream.positions)
                scores.append(score)
            x, cache, seen = self.run(
                stream.x, stream.layout, span, cache, record=record
            )
            stream = dataclasses.replace(stream, x=x)
            layers.extend(seen)
            filled.append(cache)
        return Output(
            stream=dataclasses.replace(stream, x=self.norm(stream.x)),
            kept=tuple(kept),
            scores=tuple(scores),
            layers=tuple(layers),
            caches=tuple(cache for cache in filled if cache is not None),
        )

    def extend(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        caches: tuple[Cache, ...],
        *,
        original_positions: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[Cache, ...]]:
        """Normed hidden states of text that goes on from `caches`: one token or many.

        Nothing is thinned or transferred: what a pass selected stays selected. In
        `segment_ids` 1 is a token and 0 the padding at the end of a row.

        Rotary positions count what each layer has kept, so that this equals one pass.
        With `original_positions` they count what came in before any stage: so does the
        PyTorch release when it decodes, though not when it trains or prefills.
        """
        before = caches[0].slots.lengths if original_positions else None
        layout, after = Layout(segment_ids=segment_ids, before=before), []
        for span, cache in zip(self.cfg.segments, caches, strict=True):
            x, cache, _ = self.run(x, layout, span, cache)
            after.append(cache)
        return self.norm(x), tuple(after)

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings of whole rows of tokens."""
        if sharding.active_mesh() is None:
            return self.embed(tokens)
        return sharding.on_shards(
            _embed_shard,
            {"llm/embed": self.embed},
            tokens,
            in_specs=(sharding.TOKENS,),
            out_specs=sharding.TOKENS,
            dtype=self.cfg.dtype,
            gathered=("context",),
        )

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """Next-token logits of normed hidden states, in float32."""
        head = self.embed.attend if self.cfg.tied else self.head
        return head(hidden).astype(jnp.float32)

    @property
    def head_kernel(self) -> Float[Array, "D vocab"]:
        """The matrix of `logits`, which is the embedding's where that is tied."""
        return self.embed.embedding[...].T if self.cfg.tied else self.head.kernel[...]

    # Layers.

    def run(
        self,
        x: Float[Array, "B T D"],
        layout: Layout,
        layers: tuple[int, int],
        cache: Cache | None = None,
        *,
        record: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache | None, list]:
        """Runs the blocks [start, stop), from and to a cache if there is one."""
        todo = self.cfg.layers[slice(*layers)]
        seen = []
        if cache is not None:
            cache.check_room(x.shape[1])
        if todo and self.cfg.rolled and not record:
            x, cache = self._run_rolled(x, layout, todo, cache)
        else:
            first = dict(reversed(todo))
            for kind, i in todo:
                before = x
                mixed, cache = self._mix(kind, i, i - first[kind], x, layout, cache)
                x = x + mixed
                if record:
                    seen.append((before, mixed))
        if cache is not None:
            cache = dataclasses.replace(cache, slots=cache.slots.write(layout.valid))
        return x, cache, seen

    def _run_rolled(
        self,
        x: Float[Array, "B T D"],
        layout: Layout,
        todo: tuple[tuple[str, int], ...],
        cache: Cache | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        kinds = sorted({kind for kind, _ in todo})
        first = dict(reversed(todo))
        if cache is None and self.cfg.remat and self.cfg.remat_keeps == "inputs":
            mixers, stacks = {}, {}
            for kind in kinds:
                graph, params = nnx.split(getattr(self, kind))
                flat = nnx.to_flat_state(params)
                mixers[kind] = self._mixer(kind, graph)
                stacks[kind] = {path: param[...] for path, param in flat}
            return rolled.run(mixers, todo, stacks, x, layout), None

        for start, unit, times in repeats.find([kind for kind, _ in todo]):
            unit = todo[start : start + len(unit)]
            x, cache = self._run_repeats(unit, times, first, x, layout, cache)
        return x, cache

    def _run_repeats(
        self,
        unit: tuple[tuple[str, int], ...],
        times: int,
        first: dict[str, int],
        x: Float[Array, "B T D"],
        layout: Layout,
        cache: Cache | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Layers that begin with `unit` and go on like it, as a loop over units.

        A loop over layers that switches on their kind has fewer bodies, but a switch
        copies the caches that a branch only passes on, for every layer and token.
        """
        strides = collections.Counter(kind for kind, _ in unit)

        def step(carry, number):
            x, cache = carry
            for kind, i in unit:
                i += number * strides[kind]
                mixed, cache = self._mix(kind, i, i - first[kind], x, layout, cache)
                x = x + mixed
            return (x, cache), None

        return jax.lax.scan(step, (x, cache), jnp.arange(times))[0]

    def _mix(
        self,
        kind: str,
        index: int | Int[Array, ""],
        cache_index: int | Int[Array, ""],
        x: Float[Array, "B T D"],
        layout: Layout,
        cache: Cache | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """One block's mixer output; `cache_index` counts within the cache's layers."""
        checkpointed = functools.partial(
            jax.checkpoint, policy=REMAT_KEEPS[self.cfg.remat_keeps]
        )
        if not self.cfg.remat:
            checkpointed = lambda f: f
        if cache is None or kind == "mlp":
            mix = lambda x, layout: self._mix_whole(
                kind, self.block(kind, index), x, layout
            )
            return checkpointed(mix)(x, layout), cache
        mix = checkpointed(lambda *args: self.block(kind, index)(*args))
        if kind == "attention":
            own = cache.attention, cache.slots, cache_index
            mixed, own = mix(x, layout, *own)
            return mixed, dataclasses.replace(cache, attention=own)
        here = jax.tree.map(lambda z: z[cache_index], cache.mamba)
        mixed, here = mix(x, layout, here)
        own = jax.tree.map(lambda z, new: z.at[cache_index].set(new), cache.mamba, here)
        return mixed, dataclasses.replace(cache, mamba=own)

    def _mixer(self, kind: str, graph: nnx.GraphDef) -> rolled.Mixer:
        """One block of a kind as a function of its parameters."""
        return lambda params, x, layout: self._mix_whole(
            kind, nnx.merge(graph, nnx.from_flat_state(params)), x, layout
        )

    def _mix_whole(
        self, kind: str, block: Block, x: Float[Array, "B T D"], layout: Layout
    ) -> Float[Array, "B T D"]:
        """The mixer output of a block that sees whole rows, on each device's shards."""
        with jax.named_scope(kind):
            if sharding.active_mesh() is None:
                return block.mix(x, layout)
            return sharding.on_shards(
                lambda block, *args: sharding.sum_shards(block.mix(*args), "tensor"),
                {f"llm/{kind}": block},
                x,
                layout.cut(sharding.context_axis()),
                in_specs=(sharding.TOKENS, sharding.TOKENS),
                out_specs=sharding.TOKENS,
                dtype=self.cfg.dtype,
                stacked=True,
            )

    def block(self, kind: str, index: int | Int[Array, ""]) -> Block:
        """One block out of its stack."""
        graph, params = nnx.split(getattr(self, kind))
        return nnx.merge(graph, jax.tree.map(lambda p: p[index], params))

    # TransV.

    @jax.named_scope("transv")
    def thin(
        self,
        stage_index: int,
        stream: Stream,
        choice: Bool[Array, "B _"] | None = None,
    ) -> tuple[Stream, Dropped, Float[Array, "B T"] | None]:
        """Runs one TransV stage: select (or take `choice`), transfer, drop."""
        stage = self.cfg.transv[stage_index]
        scores = self.rank(stage, stream) if stage.select == "attention" else None
        if choice is None:
            kept = transv.select_tokens(
                stream.is_vision,
                stream.segment_ids,
                stream.vision_counts,
                scores,
                keep=stage.keep,
                capacity=stream.original_capacity,
                select=stage.select,
            )
        else:
            chosen = take(choice, jnp.maximum(stream.positions, 0))
            kept = (chosen | ~stream.is_vision) & (stream.segment_ids > 0)
        shorter, dropped = transv.split_stream(stream, kept, stage.keep)
        if stage.transfer:
            module = self.transfer_module(stage_index)
            shorter = transv.transfer(
                module,
                shorter,
                dropped,
                stage.transfer_to,
                path=f"llm/transv/{self.transfer_index(stage_index)}",
                dtype=self.cfg.dtype,
            )
        return shorter, dropped, scores

    def transfer_module(self, stage_index: int) -> transv.Transfer:
        """The transfer of a stage; stages that only drop have none."""
        return self.transv[self.transfer_index(stage_index)]

    def transfer_index(self, stage_index: int) -> int:
        """Which of the transfers a stage has."""
        return sum(stage.transfer for stage in self.cfg.transv[:stage_index])

    def rank(self, stage: Stage, stream: Stream) -> Float[Array, "B T"]:
        """How much the last instruction token attends to each token at this layer."""
        kind, index = self.cfg.layers[stage.layer]
        block, dtype = self.block(kind, index), self.cfg.dtype
        return ranking.rank(block, stream, path=f"llm/{kind}", dtype=dtype)

    def init_transfers(self) -> None:
        """Starts each transfer as the nearest self-attention at or after its layer."""
        transferring = [i for i, s in enumerate(self.cfg.transv) if s.transfer]
        for i in transferring:
            layer = self.cfg.transv[i].layer
            later = [j for kind, j in self.cfg.layers[layer:] if kind == "attention"]
            if not later:
                raise ValueError(
                    f"No attention layer at or after layer {layer} to start the"
                    f" transfer of stage {i} from."
                )
            source = self.block("attention", later[0]).mixer
            module = self.transfer_module(i)
            for name in ("q", "k", "v", "out"):
                nnx.update(getattr(module, name), nnx.state(getattr(source, name)))

    def init_matching(self) -> None:
        """Starts attention as looking for like tokens and copying them.

        Every other query head starts as its key, the output as the transposed value,
        and the head as the transposed embedding. Circuits that find what a question
        names, in video or text, then form in tens of steps instead of hundreds.
        """
        mixer, repeats = (
            self.attention.mixer,
            self.cfg.num_heads // self.cfg.num_kv_heads,
        )
        keys = jnp.repeat(mixer.k.kernel[...], repeats, axis=2)
        even = jnp.arange(self.cfg.num_heads)[:, None] % 2 == 0
        mixer.q.kernel[...] = jnp.where(even, keys, mixer.q.kernel[...])
        values = jnp.repeat(mixer.v.kernel[...], repeats, axis=2)
        mixer.out.kernel[...] = einops.rearrange(values, "A D N H -> A N H D")
        scale = self.cfg.init_std / self.cfg.embed_std
        self.head.kernel[...] = scale * self.embed.embedding[...].T

    # Caches.

    def init_caches(self, batch: int, capacity: int) -> tuple[Cache, ...]:
        """Empty caches of `capacity` tokens, one for each stretch between stages."""
        return tuple(
            self.init_cache(span, batch, capacity) for span in self.cfg.segments
        )

    def init_cache(self, layers: tuple[int, int], batch: int, capacity: int) -> Cache:
        """An empty memory for the blocks [start, stop)."""
        kinds = [kind for kind, _ in self.cfg.layers[slice(*layers)]]
        m, a, cfg = kinds.count("mamba"), kinds.count("attention"), self.cfg
        window = lambda dim: jnp.zeros(  # noqa: E731
            (m, batch, cfg.conv_kernel - 1, dim), cfg.dtype
        )
        slots = (a, batch, cfg.num_kv_heads, capacity, cfg.head_dim)
        state = (m, batch, cfg.ssm_heads, cfg.ssm_head_dim, cfg.ssm_state)
        return Cache(
            mamba=MambaCache(
                conv_x=window(cfg.mamba.inner_dim),
                conv_b=window(cfg.mamba.group_dim),
                conv_c=window(cfg.mamba.group_dim),
                state=jnp.zeros(state, jnp.float32),
            ),
            attention=KVCache(
                k=jnp.zeros(slots, cfg.dtype), v=jnp.zeros(slots, cfg.dtype)
            ),
            slots=Slots(
                valid=jnp.zeros((batch, capacity), bool), used=jnp.zeros((), jnp.int32)
            ),
        )


def _create_block(
    mixer: type, mixer_cfg: object, cfg: HybridConfig, rngs: nnx.Rngs
) -> Block:
    return Block(mixer, mixer_cfg, cfg, rngs=rngs)


def _embed_shard(embed: nnx.Embed, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Each device looks up its part of words and channels, for rows of all of fsdp."""
    tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
    words = embed.embedding.shape[0]
    own = tokens - jax.lax.axis_index("tensor") * words
    here = (own >= 0) & (own < words)
    x = jnp.where(here[..., None], embed(jnp.where(here, own, 0)), 0)
    x = jax.lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=2, tiled=True)
    return sharding.sum_shards(x, "tensor")
