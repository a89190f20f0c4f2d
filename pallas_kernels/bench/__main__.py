"""What the ops cost: `python -m pallas_kernels.bench`, and one of

aot       what the ops compile to for real chips, with no chip
blocks    what attention's tiles cost: writes the table that they are chosen from
accuracy  how far the SSD's TPU kernels in bfloat16 are from float64
gpu       the SSD on a GPU, or what it compiles to for one that is not there
ssd       the SSD on CPU, against mamba2-jax's and against length
"""

import argparse

from pallas_kernels.bench import accuracy, aot, blocks, gpu, ssd


def main() -> None:
    """Runs the measurement that is named."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (aot, blocks, accuracy, gpu, ssd):
        command.add_command(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
