"""Where packed sequences begin."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.segments import segment_starts


def test_a_segment_starts_where_the_id_changes_to_anything_but_padding():
    ids = jnp.array([[1, 1, 2, 2, 0, 0], [0, 0, 5, 3, 3, 5]])
    want = [[0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1]]
    np.testing.assert_array_equal(segment_starts(ids), np.array(want, bool))
