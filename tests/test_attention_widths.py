"""Attention whatever the width of the planner's items: many query rows per K/V head, and heads that
are taken together."""

import numpy as np
import pytest

from tests.attention_cases import Batch
from tests.test_attention import check


@pytest.fixture
def rng(request):
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(sum(request.node.name.encode()))


ROWS = [(20, 1), (32, 1), (11, 3), (8, 4), (40, 1), (16, 4), (64, 1)]


@pytest.mark.parametrize("group_size, qo_len", ROWS)
@pytest.mark.parametrize("fixed_chunk, window_left", [(0, -1), (0, 99), (64, -1)])
@pytest.mark.parametrize("head_dim, max_batch", [(64, 4), (64, 80), (96, 80), (128, 80)])
def test_many_rows_of_a_head(
    rng, device, head_dim, max_batch, group_size, qo_len, fixed_chunk, window_left
):
    """More than a warp holds, or all that it does where requests may be many; with cuts."""
    heads = dict(num_qo_heads=2 * group_size, num_kv_heads=2, head_dim=head_dim)
    limits = dict(max_batch=max_batch)
    dtype = "float32" if device == "cpu" else "float16"
    lens = [2000, 3, 0, 70]
    qo_lens = [qo_len, 1, qo_len, qo_len]
    batch = Batch(rng, lens, qo_lens=None if qo_len == 1 else qo_lens, dtype=dtype, **heads)
    options = dict(fixed_chunk=fixed_chunk, window_left=window_left, **heads)
    if qo_len == 1:
        check(batch, device, decode=True, limits=limits, **options)
    else:
        check(batch, device, causal=True, limits=dict(limits, max_qo_len=qo_len), **options)


WIDTHS = [
    (0, [3000, 10]),
    (8, [500, 500]),
    (8, [1000] * 5),
    (8, [5000] + [64] * 10),
    (13, [3000, 10]),
    (16, [300] * 8),
    (16, [3000, 0, 10]),
]


@pytest.mark.parametrize("group_size", [1, 4])
def test_any_number_of_heads_per_item(rng, device, group_size):
    """Which of 1, 2, 4 and 8 the planner takes follows from the batch and the workers."""
    heads = dict(num_qo_heads=8 * group_size, num_kv_heads=8, head_dim=64)
    dtype = "float32" if device == "cpu" else "float16"
    seen = set()
    for workers, lens in WIDTHS:
        batch = Batch(rng, lens, dtype=dtype, **heads)
        plan = check(batch, device, decode=True, limits=dict(max_ctas=workers), **heads)
        seen.add(plan.schedule().config["heads_per_item"])
    assert device == "cpu" or len(seen) >= 3
