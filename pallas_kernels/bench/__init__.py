"""What the ops cost, measured by commands: `python -m pallas_kernels.bench`."""
