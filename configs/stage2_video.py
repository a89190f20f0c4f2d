r"""TimeViper, stage 2: instruction tuning on video, with TransV.

python train.py --config configs/stage2_video.py --workdir runs/stage2
python train.py --config configs/stage2_video.py:frames=512,transv=false ...
python train.py --config configs/stage2_video.py:model=nano_12b \
    --config.init_from=runs/s1_12b --workdir runs/s2_12b
python train.py --config configs/stage2_video.py:model=qwen2_7b,transv=false \
    --config.init_from=runs/s1_7b --workdir runs/s2_7b
python train.py --config configs/stage2_video.py:lora --workdir runs/s2_lora
python train.py --config configs/stage2_video.py:smoke --workdir runs/stage2_smoke
python train.py --config configs/stage2_video.py --sweep_index 2 --workdir runs/s2_2

Projector, language model and TransV learn, the encoder does not; lr 1e-5, TransV's
5e-5, as the paper says. Batch size and steps (one epoch of 1.3M samples) are not
published: these are ours. Without `model` it is the 9B; qwen2_7b is the paper's
transformer baseline (Qwen2.5). `lora` holds the language model's matrices and trains
pairs beside them, of the release's rank; projector and TransV still learn whole.
`smoke` trains four steps of a tiny model on films that it makes itself.
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from configs.common import GUARD, LIMITS, MEDIA, URLS, WORKERS, find_model, parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the whole experiment; nothing else decides how a run behaves."""
    arg = parse_arg(
        arg, model="nano_9b", frames=256, transv=True, lora=False, smoke=False
    )
    model = find_model(arg.model)
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init_from = "runs/stage1"  # Or a converted folder, or a published checkpoint.
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
        manifest="data/stage2/data.yaml",
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
    c.stage_order = ("instruct",)
    c.stages = dict()
    c.stages.instruct = dict(
        task=dict(
            kind="text",
            split="train",
            where=(),
            num_frames=arg.frames,  # At 1 fps, spread evenly when there are more.
            text_tokens=2_048,
            answer_tokens=1_024,
            num_segments=8,
            cached=False,
        ),
        steps=10_000,
        batch_size=128,
        accumulate=1,
        lr=1e-5,
        lr_multipliers=(),
        frozen=(r"^vision/",),
        transv=(),
    )
    if arg.transv:  # `keep` is a share of the vision tokens there were at first.
        shallow, deep = model.transv_layers
        c.stages.instruct.transv = (
            dict(layer=shallow, keep=0.5, select="uniform"),
            dict(layer=deep, keep=0.1, select="attention"),
        )
        c.stages.instruct.lr_multipliers = ((r"^llm/transv/", 5.0),)
    if arg.lora:
        c.lora.targets = (r"^llm/(attention|mamba|mlp)/mixer/(?!conv).*/kernel",)
        c.stages.instruct.frozen += (r"^llm/(?!transv/|.*/lora_)",)
    c.log_every = 20
    c.checkpoint_every = 500
    c.max_redone = 550  # Steps that a kill may cost; as checkpoint_every: strict.
    c.keep_checkpoints = 2
    c.keep_best = 0  # Beside those, as many of the lowest validation loss.
    c.validation = dict(split="heldout", every=0, batches=16)  # Every 0 steps: never.
    c.guard, c.limits = dict(GUARD), dict(LIMITS)

    if arg.smoke:
        c.init_from = ""
        c.model.update(preset="tiny", dtype="float32", rolled=False, remat=False)
        c.data.update(manifest="data/shapes/data.yaml", make="shapes", num_threads=2)
        c.data.update(tokenizer="bytes", lanes=1)
        c.stages.instruct.update(steps=4, batch_size=2)
        c.stages.instruct.task.update(
            split="videos",
            num_frames=6,
            text_tokens=120,
            answer_tokens=24,
            num_segments=1,
        )
        if arg.transv:  # The tiny model is eight layers deep.
            c.stages.instruct.transv = (
                dict(layer=1, keep=0.5, select="uniform"),
                dict(layer=6, keep=0.25, select="attention"),
            )
        c.log_every = 1
    return c


def sweep() -> Iterator[dict[str, Any]]:
    """Yields one run's overrides at a time; `--sweep_index` picks one."""
    rates = (5e-6, 1e-5, 2e-5)
    for lr in rates:
        yield {"stages.instruct.lr": lr}
    for lr in rates:  # With TransV as fast as all else.
        yield {
            "stages.instruct.lr": lr,
            "stages.instruct.lr_multipliers": ((r"^llm/transv/", 1.0),),
        }
