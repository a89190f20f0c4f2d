"""The GPU kernels of the SSD, one file for each step of the algorithm."""
