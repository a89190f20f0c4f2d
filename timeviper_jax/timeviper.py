"""The model: frames and tokens in, next-token logits out.

frames → vision encoder → token merging → projector → [TransV inside] hybrid language
model → logits. A frame (or clip) is encoded once and alone, so its merged features can
be kept and take its place in a batch.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from timeviper_jax import sharding
from timeviper_jax.data.examples import Batch, Role
from timeviper_jax.data.images import Fit, Resize, fill_of
from timeviper_jax.layers.norm import rms_normalise
from timeviper_jax.llm.hybrid import HybridConfig, HybridLM, Output
from timeviper_jax.llm.rows import move_tokens
from timeviper_jax.llm.stream import Stream, make_stream
from timeviper_jax.llm.transv import Stage
from timeviper_jax.vision import encoder
from timeviper_jax.vision.encoder import EncoderConfig, make_encoder
from timeviper_jax.vision.pair import PairConfig, PairProjector, PairProjectorConfig
from timeviper_jax.vision.projector import Projector, ProjectorConfig
from timeviper_jax.vision.tome import Order

jax.tree_util.register_dataclass(
    Batch,
    data_fields=[f.name for f in dataclasses.fields(Batch) if f.name != "num_segments"],
    meta_fields=["num_segments"],
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeViperConfig:
    """Encoder, merging, projector and language model, and what joins them.

    A frame becomes `tokens_per_frame` vision tokens, in the order `token_order` (see
    vision/tome.py), after `resize` has made it a square (see data/images.py).
    `time_digits` > 0 tells the language model when each frame is shown: that many
    decimal digits of its whole seconds, embedded and added to the frame's tokens
    (beyond the paper). `normalise_vision` gives vision tokens the size of text
    embeddings, which an encoder without pretraining needs.
    """

    vision: EncoderConfig
    projector: ProjectorConfig | PairProjectorConfig
    llm: HybridConfig
    tokens_per_frame: int = 16
    token_order: Order = "raw"
    resize: Resize = "resize-naive"
    time_digits: int = 0
    normalise_vision: bool = False

    def __post_init__(self):
        widths = self.projector.vision_dim, self.projector.llm_dim
        if widths != (self.vision.embed_dim, self.llm.embed_dim):
            raise ValueError(
                f"The projector leads from width {widths[0]} to {widths[1]}, but the"
                f" encoder is {self.vision.embed_dim} wide and the language model"
                f" {self.llm.embed_dim}."
            )
        if self.resize == "letterbox" and isinstance(self.vision, PairConfig):
            first, second = (fill_of(one.mean) for one in self.vision.encoders)
            if first != second:
                raise ValueError(
                    f"The encoders letterbox with {first} and {second}, and share their"
                    " frames; use resize-naive or resize-crop."
                )
        if not 1 <= self.tokens_per_frame <= self.vision.num_tokens:
            raise ValueError(
                f"tokens_per_frame={self.tokens_per_frame} is outside"
                f" 1..{self.vision.num_tokens}, the tokens of a frame."
            )

    @property
    def fit(self) -> Fit:
        """How an image is made to fit the encoder."""
        return Fit(
            size=self.vision.image_size,
            resize=self.resize,
            fill=fill_of(self.vision.mean),
        )

    def with_transv(self, stages: tuple[Stage, ...]) -> "TimeViperConfig":
        """The same model with other TransV stages."""
        llm = dataclasses.replace(self.llm, transv=tuple(stages))
        return dataclasses.replace(self, llm=llm)


def with_stages(model: "TimeViper", stages: tuple[Stage, ...]) -> "TimeViper":
    """The same parameters in a model that thins its vision tokens otherwise.

    A stage may drop without a transfer in any model, trained for it or not. One that
    transfers takes the transfer that the model has at its layer.

    Raises:
      ValueError: The model has no transfer at a layer where a stage asks for one.
    """
    old = [stage.layer for stage in model.cfg.llm.transv if stage.transfer]
    new = [stage.layer for stage in stages if stage.transfer]
    if missing := sorted(set(new) - set(old)):
        raise ValueError(
            f"The model has no transfer at layers {missing}, only at {old}; drop there"
            " with transfer=False, or train one."
        )
    cfg = model.cfg.with_transv(stages)
    other = nnx.eval_shape(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))
    params = []
    for path, param in nnx.to_flat_state(nnx.state(model)):
        if path[:2] == ("llm", "transv"):
            if old[path[2]] not in new:
                continue
            path = (*path[:2], new.index(old[path[2]]), *path[3:])
        params.append((path, param))
    nnx.update(other, nnx.from_flat_state(params))
    return other


class TimeDigits(nnx.Module):
    """Embeds a time by the decimal digits of its whole seconds, one table a digit.

    Digits make times of any length from parts that short videos already train.
    """

    def __init__(self, num_digits: int, dim: int, cfg: HybridConfig, *, rngs: nnx.Rngs):
        self.dtype = cfg.dtype
        # Their sum is as large as a text embedding.
        init = nnx.initializers.normal(cfg.embed_std / math.sqrt(num_digits))
        self.embedding = nnx.Param(
            init(rngs.params(), (num_digits, 10, dim), cfg.param_dtype)
        )

    def __call__(self, seconds: Float[Array, "B F"]) -> Float[Array, "B F D"]:
        table = self.embedding[...].astype(self.dtype)
        places = jnp.arange(table.shape[0])
        whole = jnp.floor(seconds).astype(jnp.int32)[..., None]
        digits = whole // 10**places % 10  # B F digits
        return jnp.sum(table[places, digits], axis=-2)


class TimeViper(nnx.Module):
    """A vision-language model for video of any length."""

    def __init__(self, cfg: TimeViperConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.vision = make_encoder(cfg.vision, rngs=rngs)
        pair = isinstance(cfg.projector, PairProjectorConfig)
        self.projector = (PairProjector if pair else Projector)(
            cfg.projector, rngs=rngs
        )
        self.llm = HybridLM(cfg.llm, rngs=rngs)
        if cfg.time_digits:
            self.time = TimeDigits(
                cfg.time_digits, cfg.llm.embed_dim, cfg.llm, rngs=rngs
            )

    def __call__(self, batch: Batch) -> Float[Array, "B T vocab"]:
        """Logits of the tokens that survive TransV; `forward` says which those are."""
        return self.llm.logits(self.forward(batch).hidden)

    def forward(self, batch: Batch, *, record: bool = False) -> Output:
        """Everything up to the head, for rows that fit in one pass."""
        return self.llm(self.embed(batch), record=record)

    def encode(self, frames: Num[Array, "*B H W C"]) -> Float[Array, "*B V E"]:
        """Merged features of frames: what is worth keeping of them.

        Each frame is encoded alone, or in clips: see vision/encoder.py.
        """
        return _encode(self.vision, frames, cfg=self.cfg)

    def project(
        self, features: Float[Array, "B F V E"], times: Float[Array, "B F"]
    ) -> Float[Array, "B F V D"]:
        """Vision tokens as the language model reads them."""
        return _project(*self._projection.values(), features, times, cfg=self.cfg)

    @property
    def _projection(self) -> dict[str, nnx.Module]:
        digits = {"time": self.time} if self.cfg.time_digits else {}
        return {"projector": self.projector, **digits}

    def embed(self, batch: Batch) -> Stream:
        """Puts text embeddings and vision tokens in their places."""
        x = self.embed_text(batch.tokens, batch.roles)
        media = batch.frames if batch.features is None else batch.features
        capacity = 0
        if media is not None:
            capacity = media.shape[1] * self.cfg.tokens_per_frame
            vision = self.vision_tokens(batch)
            x = _splice(x, rearrange(vision, "B F V D -> B (F V) D"), batch.roles)
        return make_stream(
            x,
            batch.roles,
            batch.segment_ids,
            num_segments=batch.num_segments,
            vision_capacity=capacity,
        )

    def vision_tokens(self, batch: Batch) -> Float[Array, "B F V D"]:
        """Encoded and projected frames of a batch, or projected features.

        Under a mesh each device has some frames of each row, and all parameters; empty
        frames behind the last one make their number divide.
        """
        features, times = batch.features, batch.frame_times
        if sharding.active_mesh() is None:
            features = self.encode(batch.frames) if features is None else features
            return self.project(features, times)
        run = functools.partial(
            sharding.on_shards,
            out_specs=sharding.FRAMES,
            gathered=("fsdp", "tensor"),
        )
        if features is None:
            clip = self.cfg.vision.clip_frames
            frames = _fill_shards(batch.frames, clip if clip <= times.shape[1] else 1)
            features = run(
                functools.partial(_encode_in_turn, cfg=self.cfg),
                {"vision": self.vision},
                frames,
                in_specs=(sharding.FRAMES,),
                dtype=self.cfg.vision.dtype,
            )
        features = _fill_shards(features, 1)
        times = jnp.pad(times, ((0, 0), (0, features.shape[1] - times.shape[1])))
        return run(
            functools.partial(_project, cfg=self.cfg),
            self._projection,
            features,
            times,
            in_specs=(sharding.FRAMES, sharding.FRAMES),
            dtype=self.cfg.llm.dtype,
        )

    def embed_text(
        self, tokens: Int[Array, "B T"], roles: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Text embeddings; zeros where a vision token will stand."""
        vision = roles == Role.VISION
        x = self.llm.embed_tokens(jnp.where(vision, 0, tokens))
        return jnp.where(vision[..., None], 0, x)

    def match_words(
        self, frames: Num[Array, "B H W C"], words: Int[Array, " words"]
    ) -> Float[Array, "B words"]:
        """How well each frame matches each word (a token id), as logits.

        The mean of a frame's vision tokens against the words' embeddings: with it an
        encoder without pretraining is taught to see in the language model's terms.
        """
        tokens = self.projector(self.encode(frames[:, None])[:, 0])
        mean = jnp.mean(rms_normalise(tokens, self.cfg.llm.norm_eps), axis=1)
        embeddings = self.llm.embed(words).astype(jnp.float32)
        sharpness = _WORD_SHARPNESS / (mean.shape[-1] * self.cfg.llm.embed_std)
        return sharpness * mean @ embeddings.T


# So many frames go through an encoder at once, where each device has its own.
_FRAMES_AT_ONCE = 32
# A frame that looks just like a word in its initial size gets this logit.
_WORD_SHARPNESS = 10.0


@jax.named_scope("vision")
def _encode(
    vision: nnx.Module, frames: Num[Array, "*B H W C"], *, cfg: TimeViperConfig
) -> Float[Array, "*B V E"]:
    return encoder.encode(vision, frames, cfg.tokens_per_frame, order=cfg.token_order)


def _encode_in_turn(
    vision: nnx.Module, frames: Num[Array, "B F H W C"], *, cfg: TimeViperConfig
) -> Float[Array, "B F V E"]:
    """Some frames after the other: within the encoder one takes many megabytes."""
    B, F = frames.shape[:2]
    if B * F <= _FRAMES_AT_ONCE:
        return _encode(vision, frames, cfg=cfg)
    clip = cfg.vision.clip_frames if cfg.vision.clip_frames <= F else 1
    sizes = range(clip, max(clip, _FRAMES_AT_ONCE) + 1, clip)
    some = max(size for size in sizes if F % size == 0)
    parts = frames.reshape(B * F // some, some, *frames.shape[2:])
    features = jax.lax.map(lambda part: _encode(vision, part, cfg=cfg), parts)
    return features.reshape(B, F, *features.shape[2:])


@jax.named_scope("projector")
def _project(
    projector: nnx.Module,
    *args: Any,
    cfg: TimeViperConfig,
) -> Float[Array, "B F V D"]:
    """`TimeViper.project`; before its own arguments, what embeds times, if anything."""
    *time, features, times = args
    tokens = projector(features.astype(cfg.llm.dtype))
    if cfg.normalise_vision:
        tokens = rms_normalise(tokens, cfg.llm.norm_eps).astype(tokens.dtype)
        tokens = tokens * cfg.llm.embed_std
    for digits in time:
        tokens = tokens + digits(times)[:, :, None]
    return tokens


def _fill_shards(
    frames: Num[Array, "B F *rest"], clip: int
) -> Num[Array, "B F2 *rest"]:
    """Empty frames behind the others, so that every device has as many whole clips."""
    shards = sharding.axis_size("context") * sharding.axis_size("tensor")
    behind = -frames.shape[1] % (shards * clip)
    return jnp.pad(frames, [(0, 0), (0, behind)] + [(0, 0)] * (frames.ndim - 2))


def _splice(
    x: Float[Array, "B T D"], vision: Float[Array, "B V D"], roles: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Puts the j-th vision token of a row where its j-th VISION role stands."""
    is_vision = roles == Role.VISION
    index = jnp.maximum(jnp.cumsum(is_vision, axis=1) - 1, 0)
    tokens = move_tokens(vision, index)
    return jnp.where(is_vision[..., None], tokens.astype(x.dtype), x)
