"""flashinfer.page: writing into a paged cache, and the positions that go with it."""

from .. import kv_cache as _native
from . import utils
from ._refuse import placeholder, refuser
from .jit import gen_page_module

__all__ = [
    "append_paged_kv_cache",
    "gen_page_module",
    "get_batch_indices_positions",
    "get_page_module",
    "get_seq_lens",
]


def append_paged_kv_cache(
    append_key,
    append_value,
    batch_indices,
    positions,
    paged_kv_cache,
    kv_indices,
    kv_indptr,
    kv_last_page_len,
    kv_layout="NHD",
):
    """Write rows into a paged cache, in place.

    append_key, append_value: [n, num_kv_heads, head_dim]; row i becomes token positions[i] of
    request batch_indices[i]; rows of a negative batch index are skipped. The page table is the one
    after the append; kv_last_page_len follows from it and is not read. Raises UnsupportedError when
    rows and cache differ in dtype."""
    utils._check_kv_layout(kv_layout)
    _native.append_paged_kv_cache(
        append_key,
        append_value,
        batch_indices,
        positions,
        utils._unpack_paged_kv_cache(paged_kv_cache, kv_layout),
        kv_indices,
        kv_indptr,
        kv_layout=kv_layout,
    )


def get_batch_indices_positions(append_indptr, seq_lens, nnz, batch_indices=None, positions=None):
    """Request and position of each of nnz appended rows, int32 [nnz] each.

    append_indptr [batch + 1]: each request's rows, its last tokens; seq_lens [batch]: lengths after
    the append. Rows past append_indptr[-1] get -1 and 0, which append_paged_kv_cache skips."""
    import torch

    for name, given in (("batch_indices", batch_indices), ("positions", positions)):
        if given is not None:
            utils.check_shape_dtype_device(given, (nnz,), torch.int32, append_indptr.device, name)
    return _native.get_batch_indices_positions(
        append_indptr,
        seq_lens.to(append_indptr.device),
        nnz,
        batch_indices=batch_indices,
        positions=positions,
    )


def get_seq_lens(kv_indptr, kv_last_page_len, page_size):
    """Tokens of each request of a page table: [batch], of the dtype of kv_indptr.

    A request without pages has what kv_last_page_len says, 0 in a proper table."""
    pages = (kv_indptr[1:] - kv_indptr[:-1] - 1).clamp_(min=0)
    return pages * page_size + kv_last_page_len


class _PageModule:
    """What FlashInfer's compiled module offers to those who call it themselves."""

    @staticmethod
    def get_batch_indices_positions(append_indptr, seq_lens, batch_indices, positions):
        """get_batch_indices_positions into given int32 tensors; int32 inputs only."""
        import torch

        for name, given in (
            ("append_indptr", append_indptr),
            ("seq_lens", seq_lens),
            ("batch_indices", batch_indices),
            ("positions", positions),
        ):
            utils.check_shape_dtype_device(given, None, torch.int32, append_indptr.device, name)
        get_batch_indices_positions(
            append_indptr, seq_lens, batch_indices.shape[0], batch_indices, positions
        )

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return placeholder(f"page.get_page_module().{name}")


def get_page_module():
    """The functions below this module's, of which raddle has get_batch_indices_positions."""
    return _PageModule()


__getattr__ = refuser(
    "page",
    "append_paged_mla_kv_cache",
    "nvfp4_quantize_append_paged_kv_cache",
    "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping",
    "nvfp4_quantize_append_paged_mla_kv_cache",
)
