r"""Published checkpoints into folders to train from, and back.

python -m timeviper_jax.conversion load CHECKPOINT FOLDER --preset nano_9b
python -m timeviper_jax.conversion save FOLDER OUT --family nano
python -m timeviper_jax.conversion save RUN OUT --family timeviper --like FOLDER

`load` reads safetensors files (or, with --allow_pickle, `.bin` files) one tensor at a
time. A `config.json` beside them says the language model's sizes, `--preset` all else.
Another checkpoint converted into the same folder adds to it: an encoder, then a
language model. A run begins there by `init_from` and by `model.preset` =
"FOLDER/model.json". `save` writes a converted folder, or a run's latest checkpoint,
under a family's published names; with --like also as the files, dtypes and carried
tensors of a converted folder have it.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from timeviper_jax import checksums, presets, sharding
from timeviper_jax.conversion import folder as folders
from timeviper_jax.conversion.families import FAMILIES, names_of
from timeviper_jax.layers import lora
from timeviper_jax.layers.lora import LoraConfig
from timeviper_jax.llm.transv import Stage
from timeviper_jax.timeviper import TimeViperConfig
from timeviper_jax.vision.pair import replace_each


def load(arguments: argparse.Namespace, mesh: Mesh) -> None:
    """Converts a published checkpoint into a folder."""
    base = presets.find_config(arguments.preset)
    if arguments.encoder:
        vision = presets.encoder(arguments.encoder)
        base = presets.with_encoder(base, vision, arguments.arch)
    published = folders.open_published(
        arguments.source,
        base,
        family=arguments.family,
        allow_pickle=arguments.allow_pickle,
    )
    dtype = arguments.dtype or folders.natural_dtype(published.files)
    published = dataclasses.replace(published, cfg=with_dtype(published.cfg, dtype))
    params = folders.load_published(
        published, mesh, parts=arguments.parts, cast=arguments.cast
    )
    folders.write_converted(arguments.target, published, params)
    count = sum(param.size for param in params.values())
    print(
        f"{arguments.target}: {count:,} parameters of {published.family} in {dtype},"
        f" from {len(published.files.files)} files"
    )


def save(arguments: argparse.Namespace, mesh: Mesh) -> None:
    """Writes a converted folder, or a run, under published names."""
    source = pathlib.Path(arguments.source)
    like = arguments.like
    if folders.is_converted(source):
        cfg = presets.read_config(source / "model.json")
        params = folders.read_converted(source, mesh, parts=arguments.parts)
        like = like or source
    else:
        step = latest_step(source)
        record = json.loads((step / "run" / "metadata").read_text())
        cfg = config_of_run(record)
        params = folders.read_params(step / "params", mesh, arguments.parts)
        params = lora.merged(params, lora_of_run(record))
    family = arguments.family or only_family(like)
    rules = names_of(family, cfg).rules
    own = {path: a for path, a in params.items() if folders.reaches(rules, path)}
    if left := sorted({*params} - {*own}):
        print(f"Not of {family}, left out: {', '.join(left)}", file=sys.stderr)
    files = folders.save_published(
        arguments.target, own, cfg, family, like=like, dtype=arguments.dtype
    )
    for file in files:
        print(f"{file}: {file.stat().st_size:,} bytes")


def only_family(like: str | pathlib.Path) -> str:
    """The family of a folder that one checkpoint was converted into."""
    families = folders.converted_families(like) if like else []
    if len(families) != 1:
        raise ValueError(f"Say which --family to write; there are {families}.")
    return families[0]


def with_dtype(cfg: TimeViperConfig, dtype: str) -> TimeViperConfig:
    """The same sizes with parameters of this dtype."""
    return dataclasses.replace(
        cfg,
        vision=replace_each(cfg.vision, param_dtype=dtype),
        projector=replace_each(cfg.projector, param_dtype=dtype),
        llm=dataclasses.replace(cfg.llm, param_dtype=dtype),
    )


def latest_step(run: pathlib.Path) -> pathlib.Path:
    """The folder of a run's newest whole checkpoint."""
    folder, problems = checksums.newest(run / "checkpoints")
    for newer, problem in problems.items():
        print(f"{newer} is not read: {problem}.", file=sys.stderr)
    if folder is None:
        raise FileNotFoundError(
            f"{run} is neither a converted folder nor a run with a checkpoint."
        )
    return folder


def config_of_run(record: dict[str, Any]) -> TimeViperConfig:
    """The sizes of a run's model, with TransV as the stage it stands in has it."""
    config = record["config"]
    stages = config["stages"][record["stage"]]["transv"]
    model = dict(config["model"])
    cfg = presets.find_config(model["preset"])
    if encoder := model.get("encoder"):
        arch = model.get("arch", "tome_mlp-16")
        cfg = presets.with_encoder(cfg, presets.encoder(encoder), arch)
    own = {field.name for field in dataclasses.fields(TimeViperConfig)}
    changes = {name: value for name, value in model.items() if name in own}
    cfg = dataclasses.replace(cfg, **changes)
    return cfg.with_transv(tuple(Stage(**stage) for stage in stages))


def lora_of_run(record: dict[str, Any]) -> LoraConfig:
    """How a run's LoRA counts; what is written has it merged."""
    told = record["config"].get("lora", dict(rank=1, alpha=1.0))
    return LoraConfig(targets=(), rank=told["rank"], alpha=told["alpha"])


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m timeviper_jax.conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True)
    for command, help_ in ((load, "into a folder"), (save, "under published names")):
        sub = commands.add_parser(command.__name__, help=help_)
        sub.set_defaults(command=command)
        sub.add_argument("source", help="a file or folder to read")
        sub.add_argument("target", help="the folder to write")
        sub.add_argument("--family", default="", choices=("", *FAMILIES))
        sub.add_argument("--dtype", default="", help="of what is written")
        sub.add_argument("--parts", nargs="*", default=(), help="patterns of paths")
        if command is load:
            sub.add_argument("--preset", default="nano_9b", help="or a model.json")
            sub.add_argument("--encoder", default="", help="other than the preset's")
            sub.add_argument("--arch", default="tome_mlp-16", help="its projector")
            sub.add_argument("--cast", action="store_true", help="may lose digits")
            sub.add_argument("--allow_pickle", action="store_true")
        else:
            sub.add_argument("--like", default="", help="a converted folder")
    return top


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    arguments.command(arguments, sharding.make_mesh(fsdp=-1))


if __name__ == "__main__":
    main()
