"""Names of published encoders and projectors. Tables for conversion/load.py."""

import numpy as np
from einops import rearrange

from timeviper_jax.conversion.load import Rule

# What timm's SigLIP has and features of the second-to-last block do not need.
TIMM_VIT_UNUSED = (r"norm\..*", r"attn_pool\..*")


def timm_vit_unused(depth: int) -> tuple[str, ...]:
    """Patterns of tensors to ignore for a model published with `depth` blocks."""
    return (*TIMM_VIT_UNUSED, rf"blocks\.{depth - 1}\..*")


def timm_vit_rules(num_heads: int) -> tuple[Rule, ...]:
    """timm's vision transformers -> vision/vit.py; the fused qkv fills q, k and v."""
    block = r"blocks\.(\d+)"
    qkv = [
        rule
        for i, name in enumerate("qkv")
        for rule in (
            (
                rf"{block}\.attn\.qkv\.weight",
                rf"blocks/attn/{name}/kernel[\1]",
                lambda w, i=i: rearrange(
                    w, "(part N H) E -> part E N H", part=3, N=num_heads
                )[i],
            ),
            (
                rf"{block}\.attn\.qkv\.bias",
                rf"blocks/attn/{name}/bias[\1]",
                lambda b, i=i: rearrange(
                    b, "(part N H) -> part N H", part=3, N=num_heads
                )[i],
            ),
        )
    ]
    return (
        (
            r"patch_embed\.proj\.weight",
            "patch/kernel",
            lambda w: rearrange(w, "E C p q -> (p q C) E"),
        ),
        (r"patch_embed\.proj\.bias", "patch/bias", np.asarray),
        (r"pos_embed", "positions", lambda p: p[0]),
        *qkv,
        (
            rf"{block}\.attn\.proj\.weight",
            r"blocks/attn/out/kernel[\1]",
            lambda w: rearrange(w, "E (N H) -> N H E", N=num_heads),
        ),
        (rf"{block}\.attn\.proj\.bias", r"blocks/attn/out/bias[\1]", np.asarray),
        (rf"{block}\.norm([12])\.weight", r"blocks/norm\2/scale[\1]", np.asarray),
        (rf"{block}\.norm([12])\.bias", r"blocks/norm\2/bias[\1]", np.asarray),
        (rf"{block}\.mlp\.fc1\.weight", r"blocks/mlp/up/kernel[\1]", np.transpose),
        (rf"{block}\.mlp\.fc1\.bias", r"blocks/mlp/up/bias[\1]", np.asarray),
        (rf"{block}\.mlp\.fc2\.weight", r"blocks/mlp/down/kernel[\1]", np.transpose),
        (rf"{block}\.mlp\.fc2\.bias", r"blocks/mlp/down/bias[\1]", np.asarray),
    )


# The release numbers a projector's linear layers 0, 2, 4: activations count there.
PROJECTOR_RULES: tuple[Rule, ...] = tuple(
    rule
    for layer in range(3)
    for rule in (
        (
            rf"projector\.{2 * layer}\.weight",
            f"layers/{layer}/kernel",
            np.transpose,
        ),
        (rf"projector\.{2 * layer}\.bias", f"layers/{layer}/bias", np.asarray),
    )
)
