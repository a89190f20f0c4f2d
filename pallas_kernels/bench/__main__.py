"""`python -m pallas_kernels.bench aot`: what the kernels compile to for real chips."""

import argparse

from pallas_kernels.bench import aot


def main() -> None:
    """Runs the measurement that is named."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench")
    commands = parser.add_subparsers(required=True, metavar="command")
    aot.add_command(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
