"""Names of published encoders and projectors. Both ways, see rules.py."""

from timeviper_jax.conversion.rules import Cut, Rule

# What timm's SigLIP has and features of the second-to-last block do not need.
TIMM_VIT_UNUSED = (r"norm\..*", r"attn_pool\..*")


def timm_vit_unused(depth: int) -> tuple[str, ...]:
    """Patterns of tensors to ignore for a model published with `depth` blocks."""
    return (*TIMM_VIT_UNUSED, rf"blocks\.{depth - 1}\..*")


def timm_vit_rules(num_heads: int, patch_size: int) -> tuple[Rule, ...]:
    """timm's vision transformers <-> vision/vit.py; the fused qkv fills q, k and v."""
    attn, heads = r"blocks\.(\d+)\.attn", dict(N=num_heads)
    qkv = [
        rule
        for i, name in enumerate("qkv")
        for rule in (
            Rule(
                rf"{attn}\.qkv\.weight",
                rf"blocks/attn/{name}/kernel[\1]",
                "(N H) E -> E N H",
                heads,
                Cut(i, i + 1, 3),
            ),
            Rule(
                rf"{attn}\.qkv\.bias",
                rf"blocks/attn/{name}/bias[\1]",
                "(N H) -> N H",
                heads,
                Cut(i, i + 1, 3),
            ),
        )
    ]
    out = r"blocks/attn/out/kernel[\1]"
    return (
        Rule(
            r"patch_embed\.proj\.weight",
            "patch/kernel",
            "E C p q -> (p q C) E",
            dict(p=patch_size, q=patch_size),
        ),
        Rule(r"patch_embed\.proj\.bias", "patch/bias"),
        Rule(r"pos_embed", "positions", "1 V E -> V E"),
        *qkv,
        Rule(rf"{attn}\.proj\.weight", out, "E (N H) -> N H E", heads),
        Rule(rf"{attn}\.proj\.bias", r"blocks/attn/out/bias[\1]"),
        *_block_rules(r"blocks\.(\d+)"),
    )


def _block_rules(block: str) -> list[Rule]:
    """Norms and MLP of one block."""
    mlp = dict(fc1="up", fc2="down")
    return [
        Rule(rf"{block}\.norm([12])\.weight", r"blocks/norm\2/scale[\1]"),
        Rule(rf"{block}\.norm([12])\.bias", r"blocks/norm\2/bias[\1]"),
        *(
            rule
            for fc, path in mlp.items()
            for rule in (
                Rule(
                    rf"{block}\.mlp\.{fc}\.weight",
                    rf"blocks/mlp/{path}/kernel[\1]",
                    "O I -> I O",
                ),
                Rule(rf"{block}\.mlp\.{fc}\.bias", rf"blocks/mlp/{path}/bias[\1]"),
            )
        ),
    ]


# The release numbers a projector's linear layers 0, 2, 4: activations count there.
PROJECTOR_RULES: tuple[Rule, ...] = tuple(
    rule
    for layer in range(3)
    for rule in (
        Rule(
            rf"projector\.{2 * layer}\.weight",
            f"layers/{layer}/kernel",
            "O I -> I O",
        ),
        Rule(rf"projector\.{2 * layer}\.bias", f"layers/{layer}/bias"),
    )
)
