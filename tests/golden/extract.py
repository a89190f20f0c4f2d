"""Copies the arrays that tests compare out of the folder of recorded behaviour.

    python tests/golden/extract.py SOURCE

The recordings are of the authors' PyTorch release on tiny random weights. CASES is
the whole of what the repository carries; to compare more, add a key pattern here and
run the script again where the recordings are.
"""

import fnmatch
import pathlib
import shutil
import sys

import safetensors.numpy

HERE = pathlib.Path(__file__).parent

_EVERYTHING = ("*",)
_FORWARD_AND_DECODE = ("param.*", "in.*", "out.[!m]*")  # Not out.mixer.
# Of the gradients those of what TransV changes, and of one block of each kind.
_SOME_GRADIENTS = (
    *("grad.in.*", "grad.*alpha", "grad.*merge_modules.*", "grad.*norm*"),
    "grad.*layers.[1237].*",
)
_TRANSV = (
    *("param.*", "in.*", "out.eval.*", "out.decode.*", *_SOME_GRADIENTS),
    *("out.train.l*", "out.train.trace.*.kept"),
)
# The encoder's last block, final norm and pool never reach the language model.
_FROM_PIXELS = (
    *("in.*", "out.*", "param.llm_backbone.*", "param.projector.*"),
    "param.vision_backbone.featurizer.p*",
    "param.vision_backbone.featurizer.blocks.[012].*",
)
_FROM_VISUAL_EMBEDDINGS = ("in.input_ids", "out.*", "param.llm_backbone.*")

# Case -> patterns of the keys to keep.
CASES: dict[str, tuple[str, ...]] = {
    "nano_plain_g2": (*_FORWARD_AND_DECODE, "grad.*"),
    "nano_plain_g1_chunk16": (*_FORWARD_AND_DECODE, *_SOME_GRADIENTS),
    "nano_plain_headdim24": (*_FORWARD_AND_DECODE, *_SOME_GRADIENTS),
    "nano_mixer_modules": _EVERYTHING,
    "nano_pdrop_uni_attn_ca": _TRANSV,
    "nano_pdrop_4stage_ca": _TRANSV,
    "nano_pdrop_uni_layer0_ca": _TRANSV,
    "nano_packed_nopdrop": ("param.*", "in.*", "out.*", *_SOME_GRADIENTS),
    "nano_packed_pdrop_ca": ("param.*", "in.*", "out.*", *_SOME_GRADIENTS),
    "qwen2_plain": (*_FORWARD_AND_DECODE, "grad.*"),
    "qwen2_pdrop_uni_uni_ca": _TRANSV,
    "tome_17_to16": _EVERYTHING,
    "tome_256x128_to16": _EVERYTHING,
    "tome_36x64_to4": _EVERYTHING,
    "tome_desc": _EVERYTHING,
    "tome_fused_mlp": _EVERYTHING,
    "projector_multi": _EVERYTHING,
    "vit_siglip_so400m_tiny": _EVERYTHING,
    "vit_dinov2_reg_tiny": ("param.*", "in.*", "out.features"),
    "vit_internvideo2_tiny": ("param.*", "*.images", "*.video4", "out.init_sincos.*"),
    "vit_internvideo2_posinterp": _EVERYTHING,
    "preproc_siglip-vit-so400m-384px_letterbox": _EVERYTHING,
    "preproc_siglip-vit-so400m-384px_resize-naive": _EVERYTHING,
    "vlm_nano_generate_plain": _FROM_VISUAL_EMBEDDINGS,
    "vlm_nano_generate_pdrop": _FROM_PIXELS,
    "vlm_nano_train_packed": (*_FROM_PIXELS, "grad.projector.*", *_SOME_GRADIENTS),
    "vlm_qwen2_generate_plain": _FROM_VISUAL_EMBEDDINGS,
}
TABLES = ("rounding_tables.json",)


def extract(source: pathlib.Path, case: str, patterns: tuple[str, ...]) -> int:
    """Copies one case and returns how many bytes its arrays take."""
    recorded = safetensors.numpy.load_file(source / f"{case}.safetensors")
    kept = {
        key: array
        for key, array in recorded.items()
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
    }
    safetensors.numpy.save_file(kept, HERE / f"{case}.safetensors")
    (HERE / f"{case}.safetensors").chmod(0o644)
    shutil.copyfile(source / f"{case}.json", HERE / f"{case}.json")
    return sum(array.nbytes for array in kept.values())


def main(source: pathlib.Path) -> None:
    total = 0
    for case, patterns in CASES.items():
        size = extract(source, case, patterns)
        total += size
        print(f"{size / 1e6:6.2f} MB  {case}")
    for table in TABLES:
        shutil.copyfile(source / table, HERE / table)
    print(f"{total / 1e6:6.2f} MB in all")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]))
