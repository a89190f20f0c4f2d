r"""TimeViper, stage 1: teach the projector the language model's space.

python train.py --config configs/stage1_align.py --workdir runs/stage1
python train.py --config configs/stage1_align.py:model=nano_12b --workdir runs/s1_12b
python train.py --config configs/stage1_align.py:model=qwen2_7b --workdir runs/s1_7b
python train.py --config configs/stage1_align.py:smoke --workdir runs/stage1_smoke
python train.py --config configs/stage1_align.py --sweep_index 0 --workdir runs/s1_0

Image-text pairs, the projector alone, TransV off, lr 1e-5, as the paper says. Batch
size and steps (one epoch of 558k pairs) are not published: these are ours. Without
`model` it is the 9B; qwen2_7b is the paper's transformer baseline (Qwen2.5).
`smoke` trains four steps of a tiny model on pictures that it draws itself.
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from configs.common import GUARD, LIMITS, MEDIA, URLS, WORKERS, find_model, parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the whole experiment; nothing else decides how a run behaves."""
    arg = parse_arg(arg, model="nano_9b", smoke=False)
    model = find_model(arg.model)
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init_from = ""  # A run, or a checkpoint, to begin with its parameters.
    c.init_parts = ()  # Patterns of the paths that are taken from it; () is all.
    c.model = dict(
        preset=arg.model,
        dtype="bfloat16",
        param_dtype="float32",
        rolled=True,
        remat=True,
    )
    c.lora = dict(targets=(), rank=128, alpha=256.0)  # No targets: no LoRA.
    c.mesh = dict(data=1, fsdp=-1, tensor=1, context=1)  # -1: all devices left.

    c.data = dict(
        manifest="data/stage1/data.yaml",
        make="",  # Who makes the data if they are missing: nobody.
        prepared=False,
        features="",
        encode_batch=64,
        tokenizer=model.tokenizer,
        template=model.template,
        num_threads=16,
        lanes=16,  # Hosts share them evenly; results follow from it.
        root="",  # What the manifest names lies here, or where it lies itself.
        max_bad_share=0.05,  # Of the samples drawn; more unreadable media end the run.
        media=dict(MEDIA),
        workers=dict(WORKERS),
        urls=dict(URLS),
    )
    c.optimizer = dict(
        muon=False,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        clip_norm=1.0,
        warmup=0.03,
        final_lr=0.0,
    )
    c.stage_order = ("align",)
    c.stages = dict()
    c.stages.align = dict(
        task=dict(
            kind="text",
            split="train",
            where=(),
            num_frames=1,
            text_tokens=496,
            answer_tokens=256,
            num_segments=1,
            cached=False,
        ),
        steps=2_180,
        batch_size=256,
        accumulate=1,
        lr=1e-5,
        lr_multipliers=(),
        frozen=(r"^vision/", r"^llm/"),
        transv=(),
    )
    c.log_every = 20
    c.checkpoint_every = 500
    c.max_redone = 550  # Steps that a kill may cost; as checkpoint_every: strict.
    c.keep_checkpoints = 2
    c.keep_best = 0  # Beside those, as many of the lowest validation loss.
    c.validation = dict(split="heldout", every=0, batches=16)  # Every 0 steps: never.
    c.guard, c.limits = dict(GUARD), dict(LIMITS)

    if arg.smoke:
        c.model.update(preset="tiny", dtype="float32", rolled=False, remat=False)
        c.data.update(manifest="data/shapes/data.yaml", make="shapes", num_threads=2)
        c.data.update(tokenizer="bytes", lanes=1)
        c.stages.align.update(steps=4, batch_size=2)
        c.stages.align.task.update(split="images", text_tokens=120, answer_tokens=24)
        c.log_every = 1
    return c


def sweep() -> Iterator[dict[str, Any]]:
    """Yields one run's overrides at a time; `--sweep_index` picks one."""
    for lr in (5e-6, 1e-5, 1e-4, 1e-3):
        yield {"stages.align.lr": lr}
