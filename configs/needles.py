r"""The demo: a small TimeViper learns to find photographs in long videos.

python -m timeviper_jax.data.needles --out data/needles
python train.py --config configs/needles.py --workdir runs/needles
python train.py --config configs/needles.py:smoke --workdir runs/needles_smoke
python train.py --config configs/needles.py --sweep_index 1 --workdir runs/needles_1

An encoder that has seen nothing is warmed up on single frames and then frozen; from its
stored features the language model learns to answer, on short videos, then on long ones.
`smoke` trains four steps of each stage on a few videos that it makes first.
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from configs.common import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the whole experiment; nothing else decides how a run behaves."""
    arg = parse_arg(arg, smoke=False)
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init_from = ""  # The directory of a run, to begin with its parameters.
    c.model = dict(
        preset="small",
        dtype="float32",
        param_dtype="float32",
        rolled=False,
        remat=False,
        num_labels=11,  # Ten objects, or none of them.
    )
    c.mesh = dict(data=1, fsdp=-1, tensor=1, context=1)  # -1: all devices left.

    c.data = dict(
        manifest="data/needles/data.yaml",
        make="",  # Who makes the data if they are missing: the first command above.
        prepared=True,  # Decoded once, to records.
        features="data/needles/features",
        encode_batch=256,
        tokenizer="data/needles/tokenizer.json",
        template="nano",
        num_threads=2,
    )
    c.optimizer = dict(
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.01,
        clip_norm=1.0,
        warmup=0.05,
        final_lr=0.05,
    )
    c.stage_order = ("warmup", "short", "long")
    c.stages = dict()
    c.stages.warmup = dict(
        task=dict(kind="frames", per_record=8),
        steps=450,
        batch_size=128,
        accumulate=1,
        lr=2e-3,
        lr_multipliers=(),
        frozen=(),
        transv=(),
    )
    c.stages.short = dict(
        task=dict(
            kind="text",
            split="train",
            where=(("frames", (32,)),),
            num_frames=32,
            text_tokens=128,
            answer_tokens=24,
            num_segments=1,
            cached=True,
        ),
        steps=400,
        batch_size=32,
        accumulate=1,
        lr=1.5e-3,
        lr_multipliers=(),
        frozen=(r"^vision/",),
        transv=(),
    )
    c.stages.long = dict(
        task=dict(
            kind="text",
            split="train",
            where=(("frames", (512,)),),
            num_frames=512,
            text_tokens=128,
            answer_tokens=24,
            num_segments=1,
            cached=True,
        ),
        steps=60,
        batch_size=8,
        accumulate=1,
        lr=5e-4,
        lr_multipliers=(),
        frozen=(r"^vision/",),
        transv=(),
    )
    c.log_every = 20
    c.checkpoint_every = 100
    c.keep_checkpoints = 2

    if arg.smoke:
        c.model.update(preset="tiny")
        c.data.update(
            manifest="data/tiny_needles/data.yaml",
            make="tiny_needles",
            features="data/tiny_needles/features",
            tokenizer="bytes",
            encode_batch=32,
        )
        c.stages.warmup.update(steps=4, batch_size=8)
        c.stages.short.update(steps=4, batch_size=2)
        c.stages.short.task.text_tokens = 256
        c.stage_order = ("warmup", "short")
        c.log_every = 1
    return c


def sweep() -> Iterator[dict[str, Any]]:
    """Yields one run's overrides at a time; `--sweep_index` picks one."""
    for seed in range(3):
        yield {"seed": seed}
