r"""Will it fit? Compiles a training step for chips that are not there.

python -m timeviper_jax.benchmarks.fit --config configs/stage2_video.py:frames=144 \
    --topology v5p:4x4x4 --mesh fsdp=64 --rows 64 --json

Needs the TPU compiler (pip install libtpu), and no chip. docs/pods.md says what the
lines mean. What cannot fit is said at once, before anything is compiled;
--arithmetic says only what a chip must hold and take in, in seconds. --prefill
compiles inference of one video instead, with the config's TransV: it runs on one chip,
as no cache of a language model is split over a mesh yet.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

from pallas_kernels.bench import compiled

# The compiler reads its options once. It writes down what it made as it goes: asked
# afterwards, it cannot tell of steps that it gave to sparse cores.
_OPTIONS = (
    "--xla_jf_dump_hlo_text=true",
    "--xla_jf_dump_llo_text=false",
    "--xla_jf_dump_llo_pass_label_regex=none",
)


def axes(text: str) -> dict[str, int]:
    """`fsdp=4,context=16` as a dict."""
    try:
        return {
            name: int(size) for name, size in (x.split("=") for x in text.split(","))
        }
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not like fsdp=4,context=16."
        ) from None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:ARG")
    parser.add_argument("--topology", required=True, help="such as v5p:4x4x4")
    parser.add_argument("--mesh", type=axes, default={}, help="fsdp=4,context=16")
    parser.add_argument("--rows", type=int, default=0, help="instead of batch_size")
    parser.add_argument(
        "--arithmetic", action="store_true", help="only what needs no compiler"
    )
    parser.add_argument(
        "--prefill", action="store_true", help="inference of one video, on one chip"
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args(arguments)
    if options.prefill and (options.mesh or options.rows):
        parser.error(
            "inference runs on one chip, one video at a time: leave out --mesh and"
            " --rows with --prefill."
        )
    if not options.prefill and not options.mesh:
        parser.error("a training step needs --mesh, such as --mesh fsdp=64.")
    return options


def find(options: argparse.Namespace, texts: pathlib.Path) -> dict[str, Any]:
    """The report; the compiler writes its programs into `texts`."""
    # Later than the environment, which JAX reads when it is imported.
    from timeviper_jax.benchmarks.fit import prefill, program, report

    config = program.read_config(options.config)
    if options.prefill:
        return prefill.fit(config, options.topology)
    asked = config, options.topology, options.mesh
    if options.arithmetic:
        return report.reckon(*asked, rows=options.rows)
    return report.fit(*asked, rows=options.rows, texts=texts)


def main() -> None:
    options = parse()
    if not options.arithmetic and not compiled.available():
        sys.exit("The TPU compiler is not installed: pip install libtpu.")
    with tempfile.TemporaryDirectory() as folder:
        arguments = " ".join([*_OPTIONS, f"--xla_jf_dump_to={folder}"])
        os.environ.update(compiled.ENVIRONMENT, LIBTPU_INIT_ARGS=arguments)
        try:
            found = find(options, pathlib.Path(folder))
        except ValueError as error:
            sys.exit(str(error))
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:22} {value}")


if __name__ == "__main__":
    main()
