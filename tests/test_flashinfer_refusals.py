"""What raddle.flashinfer refuses, and with which exception.

Needs: torch; a GPU for device cuda.
"""

import pytest
from raddle import errors

try:
    import torch
except ImportError:
    torch = None

pytestmark = pytest.mark.skipif(torch is None, reason="needs torch: it is not installed")

if torch is not None:
    from raddle import flashinfer
    from raddle.flashinfer import _plans


@pytest.fixture(autouse=True)
def no_kept_plans():
    yield
    _plans.clear_single_plans()


# -- refusals -----------------------------------------------------------------------------------


def make_decode(**options):
    return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(1 << 16, dtype=torch.uint8), **options
    )


def plan_decode(wrapper, **options):
    tables = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [0], [4])]
    wrapper.plan(*tables, 4, 2, 64, 16, **options)
    return torch.zeros(1, 4, 64).half(), torch.zeros(1, 2, 16, 2, 64).half()


def test_bad_names_are_key_errors():
    with pytest.raises(KeyError, match="kv_layout"):
        make_decode(kv_layout="HDN")
    with pytest.raises(KeyError, match="pos_encoding_mode"):
        plan_decode(make_decode(), pos_encoding_mode="ROPE")
    q = torch.zeros(4, 64).half()
    with pytest.raises(KeyError, match="pos_encoding_mode"):
        flashinfer.single_decode_with_kv_cache(q, q[None], q[None], pos_encoding_mode="rope")
    wrapper = make_decode()
    q, cache = plan_decode(wrapper)
    with pytest.raises(KeyError, match="list"):
        wrapper.run(q, list(cache.unbind(1)))


def test_backends():
    for backend in ("auto", "fa2", "fa3"):
        wrapper = make_decode(backend=backend)
        wrapper.run(*plan_decode(wrapper))
    with pytest.raises(errors.UnsupportedError, match="trtllm-gen"):
        make_decode(backend="trtllm-gen")
    with pytest.raises(ValueError, match="backend: expected"):
        make_decode(backend="fa4")


def test_graph_mode_needs_its_buffers():
    with pytest.raises(ValueError, match="paged_kv_indptr_buffer: expected a torch.Tensor"):
        make_decode(use_cuda_graph=True)
    buffers = [torch.zeros(n, dtype=torch.int32) for n in (4, 9, 2)]
    names = ("indptr", "indices", "last_page_len")
    with pytest.raises(ValueError, match="expected 3 entries"):
        make_decode(
            use_cuda_graph=True,
            **{f"paged_kv_{n}_buffer": b for n, b in zip(names, buffers, strict=True)},
        )


def test_a_workspace_must_be_aligned():
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(64, dtype=torch.uint8)[1:])


def test_run_before_plan():
    with pytest.raises(errors.StateError, match=r"plan\(\) first"):
        make_decode().run(torch.zeros(1, 4, 64).half(), torch.zeros(1, 2, 16, 2, 64).half())


def test_run_is_held_to_the_plan():
    wrapper = make_decode()
    q, cache = plan_decode(wrapper, window_left=7)
    wrapper.run(q, cache, window_left=7, enable_pdl=True)
    with pytest.raises(ValueError, match="window_left"):
        wrapper.run(q, cache, window_left=8)
    with pytest.raises(ValueError, match="q is torch.float32"):
        wrapper.run(q.float(), cache)
    with pytest.raises(ValueError, match="k is torch.bfloat16"):
        wrapper.run(q, cache.bfloat16())
    with pytest.raises(ValueError, match="kv_cache_sf"):
        wrapper.run(q, cache.to(torch.uint8))
    with pytest.raises(ValueError, match="kv_cache"):
        plan_decode(wrapper)
        wrapper.run(q, cache[..., :32])
    with pytest.warns(DeprecationWarning, match="q_len_per_req"):
        wrapper.run(q, cache, q_len_per_req=1)


UNSUPPORTED = {
    "window_right": lambda w: plan_decode(w, window_right=2),
    "is_causal": lambda w: plan_decode(w, is_causal=True),
    "kv_data_type": lambda w: plan_decode(w, kv_data_type=torch.uint8),
    "jit_args": lambda w: make_decode(jit_args=["uri"]),
    "skip_softmax_threshold_scale_factor": lambda w: w.run(
        *plan_decode(w), skip_softmax_threshold_scale_factor=1.0
    ),
    "args": lambda w: w.run(*plan_decode(w), torch.zeros(4)),
    "custom_mask": lambda w: flashinfer.single_prefill_with_kv_cache(
        *[torch.zeros(2, 4, 64).half()] * 3, custom_mask=torch.ones(2, 2, dtype=torch.bool)
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_would_change_results_is_refused(name):
    with pytest.raises(errors.UnsupportedError, match=name):
        UNSUPPORTED[name](make_decode())


def test_tensor_core_arguments_are_refused_without():
    with pytest.raises(ValueError, match="use_tensor_cores"):
        plan_decode(make_decode(), q_len_per_req=2)
    with pytest.raises(ValueError, match="use_tensor_cores"):
        plan_decode(make_decode(), fixed_split_size=2)
    with pytest.raises(ValueError, match="has 4 tokens"):
        plan_decode(make_decode(use_tensor_cores=True), q_len_per_req=5)
