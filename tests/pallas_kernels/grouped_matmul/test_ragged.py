"""Group sizes that nobody chose by hand."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pallas_kernels.grouped_matmul.cases import check, implementations


@implementations
@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 60), min_size=5, max_size=5), seed=st.integers(0, 9))
def test_ragged_groups(implementation, cuts, seed):
    sizes = np.diff([0, *sorted(cuts)])
    check(tuple(int(n) for n in sizes), 60 - int(sizes.sum()), "float32", implementation, seed)
