r"""The arms of the demo, trained further on long videos, and mapped to 10,240 frames.

python -m timeviper_jax.benchmarks.needle_long --workdir runs/demo --data data/needles
python -m timeviper_jax.benchmarks.needle_long --seeds 3

Goes on from `make demo`, whose base has seen few videos of 512 seconds: a long stage
for the base, the three arms from there, and the needle map of what they became, all in
WORKDIR/long. Steps that are done are not done again: repeat the command to go on.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

from timeviper_jax.benchmarks import needles
from timeviper_jax.benchmarks.needles import ARMS, CONFIG, Step, run_name


def steps(args: argparse.Namespace) -> Iterator[Step]:
    """Everything that is to be done, in order."""
    work, base = args.workdir / "long", args.workdir / "long" / "base"
    # The manifest of the dialogues, if the data are older than it.
    yield needles.make_data(args)
    yield needles.train(
        *("base", "a model that has seen long videos", f"{CONFIG}:long", base),
        *(args, args.seed, f"--config.init_from={args.workdir / 'base'}"),
    )
    for seed in range(args.seeds):
        for arm in ARMS:
            name = run_name(arm, seed)
            yield needles.train(
                *(f"train {name}", f"the arm {arm}", f"{CONFIG}:arm={arm},long"),
                *(work / name, args, args.seed + seed),
                f"--config.init_from={base}",
            )
    yield Step(
        name="map",
        says="needles found, by the length of the video and their depth",
        command=(
            *(sys.executable, "-m", "timeviper_jax.benchmarks.needle_map"),
            *("--workdir", str(work), "--data", str(args.data)),
            *("--seeds", str(args.seeds), "--frames", args.frames),
        ),
        makes=work / "needle_map" / "needle_map.json",
        again=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    needles.add_flags(parser, frames="32,128,512,2048,10240")
    args = parser.parse_args(argv)
    if not (args.workdir / "base" / "checkpoints").is_dir():
        raise SystemExit(
            f"error: {args.workdir}/base holds no checkpoint to go on from; run make"
            " demo first."
        )
    seconds = needles.perform_all(steps(args), args.workdir / "long")
    print(f"\n{seconds:.0f} seconds in all.")


if __name__ == "__main__":
    main()
