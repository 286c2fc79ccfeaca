"""How far two computations of the same numbers may lie apart.

Knows dtypes, not operations: a tolerance is a claim about arithmetic, and changing one needs a
reason.
"""

from collections.abc import Mapping

import numpy as np
from jax.typing import ArrayLike

TOLERANCE: Mapping[str, float] = {"float32": 1e-5, "bfloat16": 2e-2}


def assert_close(actual: ArrayLike, expected: ArrayLike, dtype: str | None = None) -> None:
    """Compares in float32, relative to the largest expected magnitude.

    Args:
      dtype: the precision of the computation, where the result's own dtype hides it.
    """
    tolerance = TOLERANCE[dtype or str(np.asarray(actual).dtype)]
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    finite = np.isfinite(expected)
    largest = np.abs(expected[finite]).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * largest)
