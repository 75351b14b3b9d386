"""raddle.flashinfer as a module: signatures, `import flashinfer`, missing names, answers.

Needs: torch; a GPU for device cuda.
"""

import inspect
import subprocess
import sys
import textwrap

import pytest
from raddle import _core, errors

try:
    import torch
except ImportError:
    torch = None

pytestmark = pytest.mark.skipif(torch is None, reason="needs torch: it is not installed")

if torch is not None:
    from raddle import flashinfer
    from raddle.flashinfer import _plans, utils


@pytest.fixture(autouse=True)
def no_kept_plans():
    yield
    _plans.clear_single_plans()


# FlashInfer 0.7.2's. 0.6.18 lacks variant_owns_mask, uniform_q_len, lse_base and lse_layout, which
# come last or by keyword.
SIGNATURES = {
    "single_decode_with_kv_cache": """q, k, v, kv_layout='NHD', pos_encoding_mode='NONE',
        use_tensor_cores=False, q_scale=None, k_scale=None, v_scale=None, window_left=-1,
        logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None, return_lse=False""",
    "single_prefill_with_kv_cache": """q, k, v, scale_q=None, scale_k=None, scale_v=None,
        o_dtype=None, custom_mask=None, packed_custom_mask=None, causal=False, kv_layout='NHD',
        pos_encoding_mode='NONE', use_fp16_qk_reduction=False, sm_scale=None, window_left=-1,
        logits_soft_cap=None, rope_scale=None, rope_theta=None, backend='auto', return_lse=False,
        kv_cache_sf=None, k_scale=None, v_scale=None""",
    "BatchDecodeWithPagedKVCacheWrapper": """float_workspace_buffer, kv_layout='NHD',
        use_cuda_graph=False, use_tensor_cores=False, paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None, backend='auto',
        jit_args=None""",
    "BatchDecodeWithPagedKVCacheWrapper.workspace_size": """self, indptr, indices, last_page_len,
        num_qo_heads, num_kv_heads, head_dim, page_size, pos_encoding_mode='NONE', window_left=-1,
        logits_soft_cap=None, q_data_type='float16', kv_data_type=None, o_data_type=None,
        data_type=None, sm_scale=None, rope_scale=None, rope_theta=None, block_tables=None,
        seq_lens=None, fixed_split_size=None, disable_split_kv=False, q_len_per_req=1""",
    "BatchDecodeWithPagedKVCacheWrapper.run": """self, q, paged_kv_cache, *args, q_scale=None,
        k_scale=None, v_scale=None, out=None, lse=None, return_lse=False, enable_pdl=None,
        window_left=None, sinks=None, q_len_per_req=None,
        skip_softmax_threshold_scale_factor=None, kv_cache_sf=None""",
    "BatchDecodeWithPagedKVCacheWrapper.forward": """self, q, paged_kv_cache,
        pos_encoding_mode='NONE', q_scale=None, k_scale=None, v_scale=None, window_left=-1,
        logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None""",
    "BatchDecodeWithPagedKVCacheWrapper.reset_workspace_buffer": """self, float_workspace_buffer,
        int_workspace_buffer""",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": """workspace_buffer, indptr_buffer,
        indices_buffer, last_page_len_buffer, kv_layout='NHD', use_tensor_cores=False""",
    "fast_decode_plan": """self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads,
        head_dim, page_size, pos_encoding_mode='NONE', window_left=-1, logits_soft_cap=None,
        q_data_type=None, kv_data_type=None, data_type=None, sm_scale=None, rope_scale=None,
        rope_theta=None, non_blocking=True, fixed_split_size=None, disable_split_kv=False,
        q_len_per_req=1, global_override_indptr_cpu=None""",
    "BatchPrefillWithPagedKVCacheWrapper": """float_workspace_buffer, kv_layout='NHD',
        use_cuda_graph=False, qo_indptr_buf=None, paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None,
        mask_indptr_buf=None, backend='auto', jit_args=None, jit_kwargs=None,
        variant_owns_mask=False""",
    "BatchPrefillWithPagedKVCacheWrapper.plan": """self, qo_indptr, paged_kv_indptr,
        paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk,
        page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
        pos_encoding_mode='NONE', use_fp16_qk_reduction=False, sm_scale=None, window_left=-1,
        logits_soft_cap=None, rope_scale=None, rope_theta=None, q_data_type='float16',
        kv_data_type=None, o_data_type=None, non_blocking=True, prefix_len_ptr=None,
        token_pos_in_items_ptr=None, token_pos_in_items_len=0, max_item_len_ptr=None,
        seq_lens=None, seq_lens_q=None, block_tables=None, max_token_per_sequence=None,
        max_sequence_kv=None, fixed_split_size=None, disable_split_kv=False,
        uniform_q_len=None""",
    "BatchPrefillWithPagedKVCacheWrapper.run": """self, q, paged_kv_cache, *args, q_scale=None,
        k_scale=None, v_scale=None, out=None, lse=None, return_lse=False, lse_base='log2',
        lse_layout='NH', enable_pdl=None, window_left=None, sinks=None, kv_cache_sf=None,
        skip_softmax_threshold_scale_factor=None, use_fp16_softmax=None, uses_spcompress=None""",
    "BatchPrefillWithPagedKVCacheWrapper.forward": """self, q, paged_kv_cache, causal=False,
        pos_encoding_mode='NONE', use_fp16_qk_reduction=False, k_scale=None, v_scale=None,
        window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None,
        rope_theta=None""",
    "BatchPrefillWithRaggedKVCacheWrapper": """float_workspace_buffer, kv_layout='NHD',
        use_cuda_graph=False, qo_indptr_buf=None, kv_indptr_buf=None, custom_mask_buf=None,
        mask_indptr_buf=None, backend='auto', jit_args=None, jit_kwargs=None,
        variant_owns_mask=False""",
    "BatchPrefillWithRaggedKVCacheWrapper.plan": """self, qo_indptr, kv_indptr, num_qo_heads,
        num_kv_heads, head_dim_qk, head_dim_vo=None, custom_mask=None, packed_custom_mask=None,
        causal=False, pos_encoding_mode='NONE', use_fp16_qk_reduction=False, window_left=-1,
        logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None,
        q_data_type='float16', kv_data_type=None, o_data_type=None, non_blocking=True,
        prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0,
        max_item_len_ptr=None, fixed_split_size=None, disable_split_kv=False, seq_lens=None,
        seq_lens_q=None, max_token_per_sequence=None, max_sequence_kv=None, v_indptr=None,
        o_indptr=None, uniform_q_len=None""",
    "BatchPrefillWithRaggedKVCacheWrapper.run": """self, q, k, v, *args, q_scale=None,
        k_scale=None, v_scale=None, o_scale=None, out=None, lse=None, return_lse=False,
        lse_base='log2', lse_layout='NH', enable_pdl=None, kv_cache_sf=None""",
    "MultiLevelCascadeAttentionWrapper": """num_levels, float_workspace_buffer, kv_layout='NHD',
        use_cuda_graph=False, qo_indptr_buf_arr=None, paged_kv_indptr_buf_arr=None,
        paged_kv_indices_buf_arr=None, paged_kv_last_page_len_buf_arr=None""",
    "MultiLevelCascadeAttentionWrapper.plan": """self, qo_indptr_arr, paged_kv_indptr_arr,
        paged_kv_indices_arr, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim,
        page_size, causal=False, pos_encoding_mode='NONE', use_fp16_qk_reduction=False,
        sm_scale=None, window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None,
        q_data_type='float16', kv_data_type=None""",
    "MultiLevelCascadeAttentionWrapper.run": "self, q, paged_kv_cache",
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper.begin_forward": """self, unique_kv_indptr,
        unique_kv_indices, unique_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim,
        page_size, data_type='float16'""",
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper.forward": """self, q, k_shared, v_shared,
        unique_kv_cache""",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper.begin_forward": """self, qo_indptr,
        paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim, page_size""",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper.forward": """self, q, k_shared, v_shared,
        unique_kv_cache, causal=False, use_fp16_qk_reduction=False, sm_scale=None,
        rope_scale=None, rope_theta=None""",
    "merge_state": "v_a, s_a, v_b, s_b",
    "merge_state_in_place": "v, s, v_other, s_other, mask=None",
    "merge_states": "v, s",
    "append_paged_kv_cache": """append_key, append_value, batch_indices, positions,
        paged_kv_cache, kv_indices, kv_indptr, kv_last_page_len, kv_layout='NHD'""",
    "get_batch_indices_positions": """append_indptr, seq_lens, nnz, batch_indices=None,
        positions=None""",
    "get_seq_lens": "kv_indptr, kv_last_page_len, page_size",
    "packbits": "x, bitorder='big'",
    "segment_packbits": "x, indptr, bitorder='big'",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    """Names, order and defaults are FlashInfer's; what is added is by keyword."""
    found = flashinfer
    for part in name.split("."):
        found = getattr(found, part)
    parameters = list(inspect.signature(found).parameters.values())
    words = " ".join(SIGNATURES[name].split())
    expected = inspect.signature(eval(f"lambda {words}: None")).parameters.values()
    shared, added = parameters[: len(expected)], parameters[len(expected) :]
    assert [str(one) for one in shared] == [str(one) for one in expected]
    assert all(one.kind is one.KEYWORD_ONLY for one in added)


def test_aliases():
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper
    for wrapper in (decode, prefill, ragged):
        assert wrapper.begin_forward is wrapper.plan
        for name in ("run_return_lse", "forward_return_lse", "end_forward"):
            assert callable(getattr(wrapper, name))
    cascade = flashinfer.MultiLevelCascadeAttentionWrapper
    assert cascade.begin_forward is cascade.plan and cascade.forward is cascade.run
    assert issubclass(flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper, decode)


# -- import flashinfer --------------------------------------------------------------------------


def run_program(text):
    """Run text in a fresh interpreter; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_imports_no_torch():
    run_program(
        """
        import sys
        import raddle.flashinfer
        raddle.flashinfer.install()
        import flashinfer.decode, flashinfer.gemm
        assert "torch" not in sys.modules and "numpy" not in sys.modules
        """
    )


def test_a_program_written_for_flashinfer_runs(device):
    out = run_program(
        f"""
        import raddle.flashinfer
        raddle.flashinfer.install()

        import torch
        import flashinfer
        import flashinfer.page
        import flashinfer.quantization.fp4_quantization
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper, fused_moe, merge_state
        from flashinfer.cutile.cutile_common import is_cuda_tile_available
        from flashinfer.decode import trtllm_batch_decode_with_kv_cache
        from flashinfer.jit import build_jit_specs, env
        from flashinfer.jit.attention import gen_batch_decode_module
        from flashinfer.jit.core import gen_jit_spec
        from flashinfer.mla import BatchMLAPagedAttentionWrapper
        from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper
        from flashinfer.utils import PosEncodingMode

        build_jit_specs([gen_batch_decode_module(torch.float16, torch.float16, torch.float16,
                                                 torch.int32, 128, 128, 0, False, False)])
        assert PosEncodingMode["ROPE_LLAMA"].value == 1 and not is_cuda_tile_available()
        assert flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper is (
            BatchDecodeWithPagedKVCacheWrapper)
        device = torch.device("{device}")
        torch.manual_seed(0)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(1 << 20, dtype=torch.uint8, device=device), "NHD")
        indptr = torch.tensor([0, 3, 4], dtype=torch.int32, device=device)
        cache = torch.randn(4, 2, 16, 2, 64, device=device).half()
        wrapper.plan(indptr, torch.arange(4, dtype=torch.int32, device=device),
                     torch.tensor([5, 16], dtype=torch.int32, device=device), 8, 2, 64, 16)
        q = torch.randn(2, 8, 64, device=device).half()
        out = wrapper.run(q, cache)
        k, v = cache[:3].transpose(0, 1).flatten(1, 2)[:, :37]
        single = flashinfer.single_decode_with_kv_cache(q[0], k, v)
        torch.testing.assert_close(out[0], single, rtol=2e-3, atol=2e-3)
        try:
            BatchMLAPagedAttentionWrapper(cache)
        except NotImplementedError as error:
            print(error)
        raddle.flashinfer.uninstall()
        """
    )
    assert "mla.BatchMLAPagedAttentionWrapper: raddle does not have this" in out


def test_uninstall_gives_the_name_back(tmp_path):
    run_program(
        f"""
        import sys
        import raddle.flashinfer
        from pathlib import Path

        sys.path.insert(0, {str(tmp_path)!r})
        Path({str(tmp_path)!r}, "flashinfer.py").write_text("mark = 1")
        raddle.flashinfer.install()
        raddle.flashinfer.install()
        import flashinfer
        assert flashinfer is raddle.flashinfer
        raddle.flashinfer.uninstall()
        raddle.flashinfer.uninstall()
        import flashinfer
        assert flashinfer.mark == 1
        try:
            raddle.flashinfer.install()
        except raddle.errors.StateError as error:
            assert "imported already" in str(error)
        else:
            raise SystemExit("install() replaced a loaded module")
        """
    )


def test_modules_that_flashinfer_has_not_are_not_found():
    run_program(
        """
        import raddle.flashinfer
        raddle.flashinfer.install()
        for name in ("_plans", "no_such", "gemm.no_such"):
            try:
                __import__(f"flashinfer.{name}")
            except ModuleNotFoundError:
                continue
            raise SystemExit(f"flashinfer.{name} was imported")
        """
    )


def test_what_is_missing_raises_when_used():
    for name in ("BatchMLAPagedAttentionWrapper", "top_k", "fused_moe.cutlass_fused_moe"):
        found = flashinfer
        for part in name.split("."):
            found = getattr(found, part)
        with pytest.raises(errors.UnsupportedError, match=name.split(".")[-1]):
            found(1, x=2)
    assert not isinstance(1, flashinfer.SegmentGEMMWrapper)
    with pytest.raises(errors.UnsupportedError, match="SegmentGEMMWrapper.run"):
        flashinfer.SegmentGEMMWrapper.run()
    with pytest.raises(errors.UnsupportedError, match="env.FLASHINFER_CSRC_DIR"):
        _ = flashinfer.jit.env.FLASHINFER_CSRC_DIR / "norm.cu"
    with pytest.raises(AttributeError, match="no_such"):
        _ = flashinfer.no_such
    with pytest.raises(AttributeError, match="no_such"):
        _ = flashinfer.decode.no_such
    assert {"single_decode_with_kv_cache", "decode", "gemm", "top_k"} <= set(dir(flashinfer))


def test_jit_specs_are_names():
    from raddle.flashinfer import jit

    spec = jit.gen_batch_prefill_module("fa2", torch.float16, head_dim=64)
    assert isinstance(spec, jit.JitSpec) and spec.name.startswith("batch_prefill_fa2_float16")
    jit.build_jit_specs([spec], verbose=True)
    with pytest.raises(errors.UnsupportedError, match="no module to load"):
        spec.build_and_load()
    with pytest.raises(errors.UnsupportedError, match=r"raddle\.Variant"):
        jit.gen_customize_batch_decode_module("uri")
    with pytest.raises(TypeError, match="JitSpec"):
        jit.build_jit_specs(["attention"])


# -- supports, counts, utils --------------------------------------------------------------------


def test_supports_says_why(device):
    def ask(call, **config):
        return flashinfer.supports(call, device=device, **config)

    assert ask("single_decode_with_kv_cache", head_dim=64, logits_soft_cap=30.0)
    assert ask(flashinfer.BatchDecodeWithPagedKVCacheWrapper, sinks=True, page_size=1)
    assert ask("flashinfer.decode.CUDAGraphBatchDecodeWithPagedKVCacheWrapper")
    assert ask("BatchPrefillWithPagedKVCacheWrapper", causal=True, q_data_type="bfloat16")
    assert ask("prefill.BatchPrefillWithRaggedKVCacheWrapper", head_dim=192, head_dim_vo=128)
    refused = {
        "multiple of 8": ask("single_decode_with_kv_cache", head_dim=100),
        "trtllm-gen": ask("BatchDecodeWithPagedKVCacheWrapper", backend="trtllm-gen"),
        "custom_mask": ask("BatchPrefillWithPagedKVCacheWrapper", custom_mask=True),
        "no such argument": ask("BatchDecodeWithPagedKVCacheWrapper", colour="red"),
        "multiple of num_kv_heads": ask("single_decode_with_kv_cache", num_kv_heads=3),
        "does not have this": flashinfer.supports("BatchMLAPagedAttentionWrapper"),
        "no such name": flashinfer.supports("no_such"),
        "a module": flashinfer.supports("decode"),
    }
    for reason, answer in refused.items():
        assert not answer and reason in answer.reason, answer
        assert answer.reason in repr(answer)


def test_supports_looks_at_the_arguments_of_other_functions():
    assert flashinfer.supports("merge_state_in_place", mask=None)
    assert not flashinfer.supports("packbits", order="big")


def test_counts_need_to_be_asked_for():
    with pytest.raises(errors.StateError, match="count=True"):
        flashinfer.launch_counts()


@pytest.mark.gpu
def test_launches_are_counted_inside_graphs():
    if not hasattr(_core, "count_launches"):
        pytest.skip("needs launch counters: this build has none")
    run_program(
        """
        import raddle.flashinfer
        raddle.flashinfer.install(count=True)
        import flashinfer, torch

        q, k = torch.zeros(8, 64).half().cuda(), torch.zeros(50, 8, 64).half().cuda()
        before = sum(flashinfer.launch_counts().values())
        flashinfer.single_decode_with_kv_cache(q, k, k)
        per_call = sum(flashinfer.launch_counts().values()) - before
        assert per_call > 0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            flashinfer.single_decode_with_kv_cache(q, k, k)
        before = sum(flashinfer.launch_counts().values())
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        assert sum(flashinfer.launch_counts().values()) - before == 5 * per_call
        """
    )


def test_utils():
    assert [utils.next_positive_power_of_2(n) for n in (0, 1, 3, 8, 9)] == [1, 1, 4, 8, 16]
    assert [utils.last_positive_power_of_2(n) for n in (1, 3, 8)] == [1, 2, 8]
    assert utils.ceil_div(9, 4) == 3 and utils.round_up(9, 4) == 12
    assert utils.get_indptr(torch.tensor([3, 0, 4])).tolist() == [0, 3, 3, 7]
    assert utils.version_at_least("0.6.18", "0.6.9") and not utils.version_at_least("0.5", "0.6")
    assert utils.canonicalize_torch_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match="no_such"):
        utils.canonicalize_torch_dtype("no_such")
    with pytest.raises(TypeError, match="int"):
        utils.canonicalize_torch_dtype(3)
    assert not utils.is_sm90a_supported(torch.device("cpu"))
    x = torch.zeros(2, 3)
    utils.check_shape_dtype_device(x, (2, 3), torch.float32, "cpu", "x")
    with pytest.raises(ValueError, match="Invalid shape of x"):
        utils.check_shape_dtype_device(x, (3, 2), None, None, "x")
