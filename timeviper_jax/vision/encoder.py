"""Any encoder, or two, by its config: frames to a few merged features each."""

import math

from flax import nnx
from jaxtyping import Array, Float, Num

from timeviper_jax.vision.dinov2 import DinoV2, DinoV2Config
from timeviper_jax.vision.internvideo2 import InternVideo2, InternVideo2Config
from timeviper_jax.vision.pair import PairConfig, side_by_side
from timeviper_jax.vision.tome import Order, merge
from timeviper_jax.vision.vit import Vit, VitConfig

EncoderConfig = VitConfig | PairConfig
Single = Vit | DinoV2 | InternVideo2

_OF_CONFIG = {VitConfig: Vit, DinoV2Config: DinoV2, InternVideo2Config: InternVideo2}


class Pair(nnx.Module):
    """Two encoders."""

    def __init__(self, cfg: PairConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.first = make_encoder(cfg.first, rngs=rngs)
        self.second = make_encoder(cfg.second, rngs=rngs)


def make_encoder(cfg: EncoderConfig, *, rngs: nnx.Rngs) -> Single | Pair:
    """The encoder that this config is of."""
    if isinstance(cfg, PairConfig):
        return Pair(cfg, rngs=rngs)
    return _OF_CONFIG[type(cfg)](cfg, rngs=rngs)


def encode(
    encoder: Single | Pair,
    frames: Num[Array, "*B H W C"],
    keep: int,
    *,
    order: Order = "raw",
) -> Float[Array, "*B {keep} E"]:
    """`keep` merged features of each frame.

    Each frame is encoded alone, but by an encoder of clips: then the last axis before
    H is time, and is cut into clips. The tokens of a clip are merged together, and the
    frames get equal parts of what is left. Fewer frames than a clip are images.
    """
    if isinstance(encoder, Pair):
        first, second = encoder.cfg.shares(keep)
        return side_by_side(
            encode(encoder.first, frames, first, order=order),
            encode(encoder.second, frames, second, order=order),
        )
    *lead, H, W, C = frames.shape
    clip = encoder.cfg.clip_frames
    if clip == 1:
        features = encoder(frames.reshape(-1, H, W, C))
    else:
        clip = _clip_length(math.prod(lead[-1:]), clip)
        features = encoder(frames.reshape(-1, clip, H, W, C))
    features, _ = merge(features, clip * keep, order=order)
    return features.reshape(*lead, keep, features.shape[-1])


def _clip_length(frames: int, clip: int) -> int:
    """How many of a video's frames go together: a clip, or one if they are images."""
    if frames < clip:
        return 1
    if frames % clip:
        raise ValueError(
            f"{frames} frames do not divide into clips of {clip}; use a multiple of"
            f" {clip}, or fewer than {clip} for images."
        )
    return clip
