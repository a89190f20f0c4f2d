"""From media files to batches; numpy in, numpy out, no JAX."""
