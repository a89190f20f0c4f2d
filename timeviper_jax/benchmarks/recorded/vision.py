"""Encoders, token merging, projectors and preprocessing from recorded inputs."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from timeviper_jax.benchmarks.recorded.case import Arrays, Case, Tally, compile_once
from timeviper_jax.conversion.load import load_params, save_params
from timeviper_jax.conversion.vision import (
    PROJECTOR_RULES,
    encoder_rules,
    encoder_unused,
    pair_projector_rules,
)
from timeviper_jax.data.images import Fit, normalise
from timeviper_jax.vision.dinov2 import DinoV2Config
from timeviper_jax.vision.encoder import Single, make_encoder
from timeviper_jax.vision.internvideo2 import InternVideo2, InternVideo2Config
from timeviper_jax.vision.pair import (
    PairProjector,
    PairProjectorConfig,
    side_by_side,
)
from timeviper_jax.vision.positions import resize_grid, resize_time
from timeviper_jax.vision.projector import Projector, ProjectorConfig
from timeviper_jax.vision.tome import merge
from timeviper_jax.vision.vit import VitConfig

_HEADS = 4  # Of the recordings' tiny encoders, where nothing is said.


# Encoders.


def encoder_config(
    params: Arrays, about: Mapping[str, Any], image_size: int
) -> VitConfig:
    """The sizes of an encoder, by its tensors and what is said of it."""
    patch = params["patch_embed.proj.weight"].shape
    blocks = {int(n.split(".")[1]) for n in params if n.startswith("blocks.")}
    clips = len(patch) == 5
    sizes = dict(
        image_size=image_size,
        patch_size=patch[-1],
        embed_dim=patch[0],
        # The features end before the last block, which InternVideo2 does not build.
        depth=about.get("depth_config", about.get("depth", max(blocks) + 1 + clips)),
        num_heads=about.get("heads", about.get("tiny", {}).get("num_heads", _HEADS)),
        mlp_dim=params["blocks.0.mlp.fc1.weight"].shape[0],
    )
    if clips:
        return InternVideo2Config(**sizes)
    if "reg_token" in params:
        registers = params["reg_token"].shape[1]
        return DinoV2Config(**sizes, num_registers=registers)
    return VitConfig(**sizes)


def build_encoder(params: Arrays, cfg: VitConfig) -> Single:
    """An encoder that holds published tensors."""
    encoder = nnx.eval_shape(lambda: make_encoder(cfg, rngs=nnx.Rngs(0)))
    load_params(encoder, params, encoder_rules(cfg), ignore=encoder_unused(cfg))
    return encoder


def channels_last(pixels: Float[np.ndarray, "*B C H W"]) -> Float[Array, "*B H W C"]:
    return jnp.asarray(np.moveaxis(pixels, -3, -1))


def compare_timm(case: Case, tally: Tally) -> None:
    """Features of normalised pixels."""
    cfg = encoder_config(case.params, case.about, case.about["img_size"])
    encoder = build_encoder(case.params, cfg)
    pixels = channels_last(case.arrays["in.pixel_values"])
    features = compile_once(lambda encoder, x: encoder(x))(encoder, pixels)
    tally.value("out.features", features)


def compare_internvideo2(case: Case, tally: Tally) -> None:
    """Features of images and of a clip; the positions it starts with."""
    cfg = encoder_config(case.params, case.about, case.about["image_size"])
    encoder = build_encoder(case.params, cfg)
    run = compile_once(lambda encoder, x: encoder(x))
    images = channels_last(case.arrays["in.images"])
    tally.value("out.images", run(encoder, images))
    clip = jnp.moveaxis(channels_last(case.arrays[f"in.video{cfg.frames}"]), 0, 1)
    tally.value(f"out.video{cfg.frames}", run(encoder, clip))
    fresh = jax.jit(lambda: nnx.state(InternVideo2(cfg, rngs=nnx.Rngs(0))))()
    tally.value("out.init_sincos.pos_embed", fresh["positions"][...][None])
    name = "out.init_sincos.img_pos_embed"
    tally.value(name, fresh["image_positions"][...][None])


def compare_positions(case: Case, tally: Tally) -> None:
    """Position embeddings, resized in time and over the grid."""
    about = case.about
    for name, frames in (("pos_embed", about["orig_t"]), ("img_pos_embed", 1)):
        first, patches = np.split(case.arrays[f"in.{name}"][0], [1])
        patches = patches.reshape(frames, -1, patches.shape[-1])
        if frames > 1:
            patches = resize_time(patches, about["new_t"])
        patches = resize_grid(patches, about["new_grid"], antialias=False)
        whole = np.concatenate([first, patches.reshape(-1, patches.shape[-1])])
        tally.value(f"out.{name}", whole[None])


# Merging and projecting.


def projector_config(params: Arrays, *, fused: bool = False) -> ProjectorConfig:
    """The sizes of a projector, by its tensors."""
    first, last = params["projector.0.weight"], params["projector.2.weight"]
    return ProjectorConfig(
        vision_dim=first.shape[1], llm_dim=last.shape[0], fused=fused
    )


def build_projector(params: Arrays, *, fused: bool = False) -> Projector:
    """A projector that holds the release's parameters."""
    cfg = projector_config(params, fused=fused)
    projector = nnx.eval_shape(lambda: Projector(cfg, rngs=nnx.Rngs(0)))
    load_params(projector, params, PROJECTOR_RULES)
    return projector


def compare_projectors(case: Case, tally: Tally) -> None:
    """One projector alone, and those of two encoders with their tokens in order."""
    a, b = (jnp.asarray(case.arrays[f"in.{name}"]) for name in "ab")
    run = compile_once(lambda projector, x: projector(x))
    if single := case.under("param.single."):
        tally.value("out.single_mlp", run(build_projector(single), a))
    for name, want in case.under("out.").items():
        form, _, how = name.partition("_")
        if form not in ("mlp", "tome"):
            continue
        pair, first, second = build_pair(case.under(f"param.{form}.")), a, b
        if form == "tome":
            first, second = (merge(z, want.shape[1] // 2)[0] for z in (a, b))
        elif how.startswith("interleave"):
            first, second = (z[:, : want.shape[1] // 2] for z in (a, b))
        tally.value(f"out.{name}", run(pair, side_by_side(first, second)))


def build_pair(params: Arrays) -> PairProjector:
    """The projectors of two encoders."""
    names = sorted({name.split(".")[1] for name in params})
    inputs = [params[f"projectors.{n}.projector.0.weight"].shape[1] for n in names]
    outputs = params[f"projectors.{names[0]}.projector.2.weight"].shape[0]
    first, second = (ProjectorConfig(vision_dim=E, llm_dim=outputs) for E in inputs)
    cfg = PairProjectorConfig(first=first, second=second)
    pair = nnx.eval_shape(lambda: PairProjector(cfg, rngs=nnx.Rngs(0)))
    load_params(pair, params, pair_projector_rules(names))
    return pair


def compare_tome(case: Case, tally: Tally) -> None:
    """Merged tokens, how many are in each, what is projected, and gradients."""
    about, arrays = case.about, case.arrays
    order = about["token_order"]
    keep = about["num_compressed_tokens"] * max(1, about.get("local_num_frames", 1))
    projector = build_projector(
        case.params, fused=about["mlp_type"].startswith("fused")
    )
    cotangent = jnp.asarray(arrays["in.cotangent"])

    def run(projector, x):
        graph, params = nnx.split(projector)

        def total(params, x):
            merged = merge(x, keep, order=order)[0]
            y = nnx.merge(graph, params)(merged).reshape(cotangent.shape)
            return jnp.sum(y * cotangent), (merged, y)

        grads, (merged, y) = jax.grad(total, (0, 1), has_aux=True)(params, x)
        return grads, merged, y, merge(x, keep)[1]

    (grads, of_x), merged, y, sizes = compile_once(run)(
        projector, jnp.asarray(arrays["in.x"])
    )
    tally.value("out.merged", merged)
    tally.value("out.sizes_before_reorder", sizes[..., None])
    tally.value("out.y", y)
    named = save_params(nnx.merge(nnx.graphdef(projector), grads), PROJECTOR_RULES)
    tally.gradients({**named, "in.x": of_x})


# Preprocessing.


def compare_preproc(case: Case, tally: Tally) -> None:
    """Every pixel of every image, resized and normalised."""
    text, size = case.about["transform"], case.about["img_size"]
    if "LetterboxPad" in text:
        fill = tuple(map(int, _numbers(text, "padding_fill_value=(", ")")))
        fit = Fit(size=size, resize="letterbox", fill=fill)
    else:
        naive = f"Resize(size=({size}, {size})" in text
        fit = Fit(size=size, resize="resize-naive" if naive else "resize-crop")
    mean, std = (_numbers(text, f"{z}=tensor([", "]") for z in ("mean", "std"))
    for name, image in case.under("in.image.").items():
        pixels = normalise(fit(image), mean, std)
        tally.value(f"out.pixel_values.{name}", np.moveaxis(pixels, -1, 0))


def _numbers(text: str, start: str, end: str) -> tuple[float, ...]:
    """The numbers that stand between two pieces of a printed transform."""
    return tuple(map(float, text.split(start)[1].split(end)[0].split(",")))
