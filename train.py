r"""Trains a TimeViper as a config says, and goes on where it was stopped.

python train.py --config configs/needles.py --workdir runs/needles
python train.py --config configs/needles.py:smoke --workdir runs/smoke
python train.py --config configs/stage2_video.py --config.seed=1 --workdir runs/video
python train.py --config configs/stage2_video.py --sweep_index 3 --workdir runs/sweep3
python train.py --config configs/stage2_video.py --profile 10:12 --workdir runs/video

The working directory holds `metrics.jsonl`, TensorBoard's `events/` and `checkpoints/`,
and XProf's `profile/` where some steps are traced.
The same command run again continues from the latest checkpoint, bit for bit. SIGTERM or
SIGINT (control-C) finishes the step, saves and exits with status 75: run it again to
continue; a second signal ends it at once. docs/training.md lists the other statuses.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from timeviper_jax import sharding
from timeviper_jax.conversion import folder as converted
from timeviper_jax.data import (
    frames,
    needle_builder,
    needles,
    pipeline,
    shapes,
)
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.data.media import VideoError
from timeviper_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from timeviper_jax.data.workers import decoder
from timeviper_jax.inference import encode
from timeviper_jax.layers.lora import LoraConfig, adapted, is_lora, merged
from timeviper_jax.layers.lora import init as init_lora
from timeviper_jax.timeviper import TimeViper, TimeViperConfig
from timeviper_jax.training import (
    checkpoint,
    experiment,
    guard,
    loop,
    processes,
    sweep,
)
from timeviper_jax.training.arithmetic import step_flops
from timeviper_jax.training.experiment import FrameTask, StageConfig
from timeviper_jax.training.loss import check_answers
from timeviper_jax.training.metrics import MetricsWriter
from timeviper_jax.training.optimizer import (
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)
from timeviper_jax.training.parameters import Params, matching, merge
from timeviper_jax.training.phases import Phases
from timeviper_jax.training.signals import STOPPED, StopRequest
from timeviper_jax.training.step import create_state, make_train_step
from timeviper_jax.training.validation import Validation
from timeviper_jax.training.xprof import Trace, read_steps

# Statuses by the names of sysexits.h; signals.STOPPED and phases.HUNG are others.
NOT_WRITTEN = 74  # An error of input or output.
BAD_DATA = 65

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)

# How a run is watched and where it is computed may change when it resumes; what it
# computes may not.
MAY_CHANGE = {
    *("log_every", "checkpoint_every", "max_redone", "keep_checkpoints", "keep_best"),
    *("validation", "limits", "mesh", "data.num_threads", "data.workers"),
    "data.urls",
}


def make_tiny_needles(folder: pathlib.Path) -> None:
    """A few needle videos, made in seconds."""
    counts = {
        field.name: 1 if field.name.endswith("_32") else 0
        for field in dataclasses.fields(needles.NeedlesConfig)
        if field.name.startswith(needles.SPLITS)
    }
    cfg = needles.NeedlesConfig(**{**counts, "train_32": 8, "reel": 64})
    needles.make(folder, cfg, workers=1)


# Data so small that a smoke run makes its own.
MAKERS = {"shapes": shapes.make, "tiny_needles": make_tiny_needles}


def apply_sweep(c: ml_collections.ConfigDict, index: int, config: str) -> None:
    """Applies the index-th overrides of the `sweep()` of FILE.py or FILE.py:ARG."""
    overrides = sweep.overrides(config)
    if not 0 <= index < len(overrides):
        raise ValueError(f"sweep_index={index} is outside 0..{len(overrides) - 1}.")
    c.update_from_flattened_dict(overrides[index])
    logging.info("Sweep %d: %s", index, overrides[index])


def check_same_run(config: dict, record: checkpoint.RunRecord, workdir: str) -> None:
    """Refuses to continue a run whose config was another."""
    now, then = experiment.flat(config), experiment.flat(record.config)
    differing = [
        name
        for name in sorted({*now, *then})
        if now.get(name) != then.get(name)
        and not any(f"{name}.".startswith(f"{part}.") for part in MAY_CHANGE)
    ]
    if differing:
        raise ValueError(
            f"{workdir} holds a run whose config differs in {differing}; give the run"
            " another --workdir, or the config it began with."
        )
    if record.versions and record.versions != checkpoint.versions():
        logging.warning(
            "This run began with %s: it goes on, but no longer bit for bit.",
            dict(record.versions),
        )


def make_tokenizer(name: str, vocab_size: int) -> Tokenizer:
    """The tokenizer of this name or file, if the model can embed its ids."""
    tokenizer = ByteTokenizer() if name == "bytes" else JsonTokenizer(name)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer={name} has {tokenizer.vocab_size} ids, the model only"
            f" {vocab_size}; choose a preset with a larger vocabulary."
        )
    return tokenizer


def first_params(
    path: str, parts: Sequence[str], cfg: TimeViperConfig, mesh: jax.sharding.Mesh
) -> Params:
    """What a run begins with: a run's, a converted folder's, or a published checkpoint.

    `parts` are patterns found in the paths that are taken; none is all. What they leave
    out starts fresh, transfers of TransV from the self-attention they stand before.
    """
    if converted.is_converted(path):
        return converted.read_converted(path, mesh, parts=parts)
    if pathlib.Path(path).exists() and not pathlib.Path(path, "checkpoints").is_dir():
        published = converted.open_published(path, cfg)
        return converted.load_published(published, mesh, parts=parts)
    params = checkpoint.load_params(path, mesh)
    taken = matching(params, parts) if parts else params
    return {name: params[name] for name in taken}


def add_lora(
    params: Params, pairs: Params, cfg: LoraConfig, seed: int, mesh: jax.sharding.Mesh
) -> Params:
    """LoRA's pairs for these parameters: those there are already, new ones else."""
    wanted = {f"{path}/lora_{x}" for path in adapted(params, cfg) for x in "ab"}
    if pairs.keys() == wanted:
        return pairs
    if pairs:
        raise ValueError(
            f"The checkpoint has LoRA for {len(pairs) // 2} matrices, the config for"
            f" {len(wanted) // 2}; merge it first (python -m timeviper_jax.conversion)."
        )
    shardings = sharding.shard_params(wanted, mesh)
    return jax.jit(lambda: init_lora(params, cfg, seed), out_shardings=shardings)()


def prepared_records(c: ml_collections.ConfigDict, split: str):
    """The decoded frames of the manifest's data set, as random-access records."""
    folder = pathlib.Path(c.data.manifest).parent
    return needle_builder.prepare(folder, split).as_data_source(split)


def encode_missing(
    c: ml_collections.ConfigDict,
    model: TimeViper,
    store: FeatureStore,
    data: pipeline.DataConfig,
    mesh: jax.sharding.Mesh,
    stop: StopRequest,
) -> None:
    """Encodes the videos that the store lacks; stopped, it keeps what is done.

    A video that cannot be read is noted there, and its samples are replaced.
    """
    items = pipeline.load_items(data)
    paths = {path for item in items for path in item.media}
    missing = {path for path in paths if store.lacks(path)}
    if not missing:
        return

    def refuse(path: str, error: VideoError) -> None:
        logging.warning("Left out a video: %s", error)
        store.refuse(path, error)

    if c.data.prepared:
        folder = pathlib.Path(c.data.manifest).parent
        recorded = frames.recorded_videos(prepared_records(c, data.split))
        videos = (
            (str(folder / file), pixels)
            for file, pixels in recorded
            if str(folder / file) in missing
        )
    else:
        videos = frames.decoded_videos(
            sorted(missing),
            model.cfg.fit,
            num_threads=data.num_threads,
            media=decoder(data.media, data.workers),
            on_error=refuse,
        )
    run = encode.make_encoder(model, mesh, batch_size=c.data.encode_batch)
    done = encode.encode_videos(
        videos,
        run,
        store,
        at_once=8 * c.data.encode_batch,
        clip_frames=model.cfg.vision.clip_frames,
    )
    for _ in tqdm(done, total=len(missing), desc="encode", unit="video"):
        if stop:
            sys.exit(STOPPED)


def run(c: ml_collections.ConfigDict, workdir: str, traced: range = range(0)) -> None:
    """Runs every stage of the config, from wherever the last run got to.

    The steps in `traced`, counted from 1 over all stages, are traced for XProf.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(contextlib.closing(StopRequest()))
        phases = stack.enter_context(contextlib.closing(Phases(c.limits.to_dict())))
        total = sum(c.stages[name].steps for name in c.stage_order)
        trace = Trace(traced, total=total, folder=pathlib.Path(workdir) / "profile")
        stack.enter_context(contextlib.closing(trace))
        run_stages(c, workdir, stop, phases, trace)


def run_stages(
    c: ml_collections.ConfigDict,
    workdir: str,
    stop: StopRequest,
    phases: Phases,
    trace: Trace,
) -> None:
    """The same, for as long as nobody asks to stop."""
    # What there is already.
    config = json.loads(json.dumps(c.to_dict()))
    mesh = sharding.make_mesh(**c.mesh)
    keep = checkpoint.Keep(last=c.keep_checkpoints, best=c.keep_best)
    checkpoints = checkpoint.Checkpoints(workdir, keep=keep)
    resumed = checkpoints.latest()
    if resumed:
        check_same_run(config, resumed, workdir)
    writer = MetricsWriter(workdir, step=resumed.step if resumed else 0)
    phases.resume(resumed.seconds if resumed else {}, writer.taken_back)
    if c.data.make and not pathlib.Path(c.data.manifest).exists():
        MAKERS[c.data.make](pathlib.Path(c.data.manifest).parent)

    # The model, from this run's own checkpoint, other parameters, or chance.
    base = experiment.model_config(**c.model)
    stages = {
        name: StageConfig.from_dict(config["stages"][name]) for name in c.stage_order
    }
    tokenizer = make_tokenizer(c.data.tokenizer, base.llm.vocab_size)
    optimizer_config = OptimizerConfig(**c.optimizer)
    guard_config = guard.GuardConfig(**c.guard)
    lora = experiment.lora_config(config)
    adapt = functools.partial(merged, cfg=lora)
    params = {}
    if resumed:
        params = checkpoints.restore_params(mesh)
    elif c.init_from:
        params = first_params(c.init_from, c.init_parts, base, mesh)

    watch = loop.Watch(
        config=config,
        mesh=mesh,
        checkpoints=checkpoints,
        resumed=resumed,
        writer=writer,
        phases=phases,
        stop=stop,
        trace=trace,
    )
    before = 0  # Steps of the stages before this one.
    for number, (name, stage) in enumerate(stages.items()):
        first = min(max(resumed.step - before, 0), stage.steps) if resumed else 0
        if first == stage.steps:
            logging.info("Stage %s is done: %d steps.", name, stage.steps)
            before += stage.steps
            continue

        # What moves, and what stands still.
        phases.enter("setup")
        cfg = base.with_transv(stage.transv)
        experiment.check_mesh(cfg, stage, mesh)
        graph, _ = experiment.describe(cfg)
        pairs = {path: array for path, array in params.items() if is_lora(path)}
        params = experiment.fill(cfg, params, c.seed, mesh)
        params |= add_lora(params, pairs, lora, c.seed, mesh)
        moving = stage.moving(params)
        frozen = {path: array for path, array in params.items() if path not in moving}
        params = {path: array for path, array in params.items() if path in moving}
        schedule = make_schedule(stage.lr, stage.steps, optimizer_config)
        optimizer = make_optimizer(
            params, schedule, optimizer_config, stage.lr_multipliers
        )
        state, places = create_state(params, optimizer, mesh, guard_config)
        objective = stage.task.objective(tokenizer)

        # The batches; each stage has its own order.
        part, parts = sharding.feed(mesh)
        hosts = dict(
            seed=c.seed + 1000 * number, process_index=part, process_count=parts
        )
        validation = None
        if isinstance(stage.task, FrameTask):
            batches = frames.make_frame_batches(
                prepared_records(c, "train"),
                batch_size=stage.batch_size,
                per_record=stage.task.per_record,
                share=stage.task.share,
                lanes=c.data.lanes,
                **hosts,
            )
            place = lambda batch: sharding.put(batch, mesh)
        else:
            data, store = experiment.text_data(config["data"], stage, cfg), None
            held_out = dataclasses.replace(data, split=c.validation.split)
            if stage.task.cached:
                model = merge(graph, adapt({**frozen, **state.params}))
                store = FeatureStore(c.data.features, encode.fingerprint(model))
                for some in (data, held_out) if c.validation.every else (data,):
                    encode_missing(c, model, store, some, mesh, stop)
            begin = functools.partial(
                pipeline.make_batches, tokenizer=tokenizer, features=store, **hosts
            )
            batches = begin(data)
            answer_tokens = stage.task.answer_tokens
            place = lambda batch, tokens=answer_tokens: sharding.put(
                check_answers(batch, answer_tokens=tokens), mesh
            )
            if c.validation.every:
                validation = Validation(
                    *(graph, objective, adapt, mesh),
                    begin=functools.partial(begin, held_out),
                    put=place,
                    count=c.validation.batches,
                )
        if first:
            state = checkpoints.restore_state(state, batches)

        train_step = make_train_step(
            *(graph, objective, optimizer),
            accumulate=stage.accumulate,
            adapt=adapt,
            guard_config=guard_config,
        )
        logging.info("Stage %s, from step %d of %d.", name, first, stage.steps)
        plan = loop.Plan(
            name=name,
            before=before,
            first=first,
            steps=stage.steps,
            train_step=train_step,
            flops=step_flops(cfg, stage, moving),
            count=functools.partial(stage.task.count, cfg=cfg),
            places=places,
            frozen=frozen,
            batches=batches,
            place=place,
            schedule=schedule,
            guard=guard_config,
            validation=validation,
        )
        state = loop.Loop(watch, plan, state).run()
        params = {**frozen, **state.params}
        before += stage.steps
    phases.enter("save")
    checkpoints.close()
    writer.close()
    logging.info("Done: %d steps, kept in %s.", before, workdir)


def define_flags(values: flags.FlagValues) -> None:
    """The command line; whatever decides results is in the config instead."""
    config_flags.DEFINE_config_file(
        "config", None, "The experiment: FILE.py or FILE.py:ARG.", flag_values=values
    )
    flags.DEFINE_string(
        "workdir", None, "Where the run is kept, and resumed from.", flag_values=values
    )
    flags.DEFINE_integer(
        "sweep_index", None, "Which of the config's sweep() to run.", flag_values=values
    )
    flags.DEFINE_string(
        "compilation_cache",
        "",
        "A folder to keep compiled programs in.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "multihost",
        False,
        "Join the other hosts, which a cluster knows: TPU pod, Slurm, MPI, Kubernetes.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "Elsewhere: HOST:PORT of process 0; also JAX_COORDINATOR_ADDRESS.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "How many there are; also JAX_NUM_PROCESSES.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "process_id",
        None,
        "Which one this is, from 0; also JAX_PROCESS_ID.",
        flag_values=values,
    )
    flags.DEFINE(
        StepsParser(),
        "profile",
        range(0),
        "Trace the steps FIRST:LAST of the run for XProf, into WORKDIR/profile.",
        flag_values=values,
    )
    flags.mark_flags_as_required(["config", "workdir"], values)


class StepsParser(flags.ArgumentParser):
    """Reads FIRST:LAST as the steps from one to the other."""

    def parse(self, argument: str | range) -> range:
        return argument if isinstance(argument, range) else read_steps(argument)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1:]} are no flags; flags begin with --.")
    # orbax tells every file it touches.
    handler = logging.get_absl_handler()
    handler.addFilter(lambda record: "orbax" not in record.pathname)
    values = flags.FLAGS
    given = processes.Place(values.coordinator, values.num_processes, values.process_id)
    try:
        processes.join(processes.find(given), cluster=values.multihost)
    except ValueError as error:
        sys.exit(str(error))
    if values.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", values.compilation_cache)
    c = values.config
    if values.sweep_index is not None:
        config = config_flags.get_config_filename(values["config"])
        apply_sweep(c, values.sweep_index, config)
    try:
        run(c, values.workdir, values.profile)
    except (guard.TooManySkipped, pipeline.TooManyBad) as error:
        logging.error("%s", error)
        sys.exit(BAD_DATA)
    except OSError as error:
        if not isinstance(error, checkpoint.SaveError) and not is_of_disk(error):
            raise
        logging.error("%s", error)
        sys.exit(NOT_WRITTEN)


def is_of_disk(error: OSError) -> bool:
    """Whether a file could not be written for want of room or of permission."""
    return error.errno in (*_NO_ROOM, *_NOT_OURS)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
