"""Mamba-2's SSD as Pallas kernels for TPU: plan, pieces, forward, backward."""
