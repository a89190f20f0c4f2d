r"""The demo: a small TimeViper learns to find photographs in long videos.

python -m timeviper_jax.data.needles --out data/needles
python train.py --config configs/needles.py --workdir runs/needles
python train.py --config configs/needles.py:arm=transv \
    --config.init_from=runs/needles --workdir runs/needles_transv
python train.py --config configs/needles.py:long --config.init_from=runs/needles \
    --workdir runs/needles_long
python train.py --config configs/needles.py:smoke --workdir runs/needles_smoke
python train.py --config configs/needles.py --sweep_index 1 --workdir runs/needles_1

An encoder that has seen nothing is warmed up on single frames and then frozen; from its
stored features the language model learns to answer: first about glimpses, a few moments
far apart, then about scenes of 32 seconds, then of 32 to 512 packed into the same rows.
An `arm` goes on from there: with nothing dropped, with nine vision tokens in ten
dropped, or with TransV at that rate. `long` goes on from there too, with all questions
about a scene at once, so that long ones are worth their price; an arm can go on from
that at longer lengths (`arm=drop,long`).
`smoke` trains four steps of each stage on a few videos that it makes first.
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from configs.common import GUARD, LIMITS, MEDIA, URLS, WORKERS, parse_arg

WORDS = (
    *("nothing", "astronaut", "camera", "cat", "coffee", "coin"),
    *("eye", "moon", "page", "rocket", "sky"),
)

# Before the first attention layer, so that no text has read what is dropped. A stage
# that keeps everything lets all arms run the same programs.
ARMS = {
    "none": dict(layer=1, keep=1.0, select="uniform", transfer=False),
    "drop": dict(layer=1, keep=0.1, select="uniform", transfer=False),
    "transv": dict(layer=1, keep=0.1, select="uniform", transfer=True),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the whole experiment; nothing else decides how a run behaves."""
    arg = parse_arg(arg, smoke=False, arm="", long=False)
    if arg.arm and arg.arm not in ARMS:
        raise ValueError(f"arm={arg.arm!r} is not one of {sorted(ARMS)}.")
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init_from = ""  # A run, or a checkpoint, to begin with its parameters.
    c.init_parts = ()  # Patterns of the paths that are taken from it; () is all.
    c.model = dict(
        preset="small",
        dtype="float32",
        param_dtype="float32",
        rolled=False,
        remat=False,
    )
    c.lora = dict(targets=(), rank=128, alpha=256.0)  # No targets: no LoRA.
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
        lanes=1,  # Hosts share them evenly; results follow from it.
        root="",  # What the manifest names lies here, or where it lies itself.
        max_bad_share=0.05,  # Of the samples drawn; more unreadable media end the run.
        media=dict(MEDIA),
        workers=dict(WORKERS),
        urls=dict(URLS),
    )
    c.optimizer = dict(
        muon=True,
        b1=0.9,
        b2=0.98,
        eps=1e-8,
        weight_decay=0.01,
        clip_norm=1.0,
        warmup=0.05,
        final_lr=0.02,
    )
    c.stages = dict()
    c.stages.warmup = dict(
        task=dict(kind="frames", words=WORDS, per_record=8, share=0.375),
        steps=800,
        batch_size=64,
        lr=4e-3,
        frozen=(),
    )
    c.stages.glimpses = answer(8, steps=400, batch_size=32, lr=4e-3)
    c.stages.scenes = answer(32, steps=250, batch_size=32, lr=3e-3)
    c.stages.mixed = answer(32, 128, 512, steps=130, batch_size=2, lr=1.5e-3)
    c.stages.arm = answer(32, steps=100, batch_size=32, lr=1.2e-3)
    if arg.long:  # One long scene and a question, or four short ones, fill a row.
        c.stages.long = dialogues(32, 128, 512, steps=600, batch_size=2, lr=1.5e-3)
        c.stages.arm = answer(128, 512, steps=150, batch_size=4, lr=1.2e-3)
        c.stages.arm.task.update(text_tokens=144, answer_tokens=64, num_segments=4)
    for stage in c.stages.values():
        stage.accumulate, stage.transv, stage.lr_multipliers = 1, (), ()
    if arg.arm:
        c.stages.arm.transv = (ARMS[arg.arm],)
    if arg.arm == "transv":
        # The paper's ratio of learning rates; a closed gate hardly opens without it.
        c.stages.arm.lr_multipliers = ((r"^llm/transv/", 5.0),)
    c.stage_order = ("arm",) if arg.arm else ("warmup", "glimpses", "scenes", "mixed")
    if arg.long and not arg.arm:
        c.stage_order = ("long",)
    c.log_every = 20
    c.checkpoint_every = 100
    c.max_redone = 110  # Steps that a kill may cost; as checkpoint_every: strict.
    c.keep_checkpoints = 2
    c.keep_best = 0  # Beside those, as many of the lowest validation loss.
    c.validation = dict(split="heldout", every=0, batches=16)  # Every 0 steps: never.
    c.guard, c.limits = dict(GUARD), dict(LIMITS)

    if arg.smoke:
        c.model.update(preset="tiny")
        c.data.update(
            manifest="data/tiny_needles/data.yaml",
            make="tiny_needles",
            features="data/tiny_needles/features",
            tokenizer="bytes",
            encode_batch=32,
        )
        # To a tokenizer of bytes, words must differ in their last one.
        c.stages.warmup.task.words = tuple("0123456789x")
        c.stages.warmup.update(steps=4, batch_size=8)
        c.stages.scenes.update(steps=4, batch_size=2)
        c.stages.scenes.task.text_tokens = 256
        c.stage_order = ("warmup", "scenes")
        c.log_every = 1
    return c


def answer(*seconds: int, steps: int, batch_size: int, lr: float) -> dict[str, Any]:
    """A stage that learns to answer about videos of these lengths, packed into rows."""
    shortest, longest = min(seconds), max(seconds)
    share = longest // shortest  # As many examples may share a row.
    return dict(
        task=dict(
            kind="text",
            split="train",
            where=(("frames", seconds),),
            num_frames=longest,
            text_tokens=36 * share,
            answer_tokens=16 * share,
            num_segments=share,
            cached=True,
        ),
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        frozen=(r"^vision/",),
    )


def dialogues(*seconds: int, steps: int, batch_size: int, lr: float) -> dict[str, Any]:
    """A stage that learns from all questions about a scene, watched once."""
    stage = answer(max(seconds), steps=steps, batch_size=batch_size, lr=lr)
    stage["task"] |= dict(
        where=(("dialogue", seconds),),
        text_tokens=672,
        answer_tokens=336,
        num_segments=4,
    )
    return stage


def sweep() -> Iterator[dict[str, Any]]:
    """Yields one run's overrides at a time; `--sweep_index` picks one."""
    for seed in range(3):
        yield {"seed": seed}
