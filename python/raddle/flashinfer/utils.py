"""flashinfer.utils: enums, constants, exceptions and the helpers that callers and tests import.

Names and values are FlashInfer's; questions about the machine are answered for the device that is
asked about. torch is imported by the functions that need it.
"""

import functools
import math
from enum import Enum

from ._refuse import refuser


class PosEncodingMode(Enum):
    NONE = 0
    ROPE_LLAMA = 1
    ALIBI = 2


class MaskMode(Enum):
    NON_CAUSAL = 0
    CAUSAL = 1
    CUSTOM = 2
    MULTIITEMSCORING = 3


class TensorLayout(Enum):
    NHD = 0
    HND = 1


log2e = math.log2(math.e)
ln2 = math.log(2)

LSE_BASES = ("log2", "ln")
LSE_LAYOUTS = ("NH", "HN")


class GPUArchitectureError(Exception):
    """The GPU is of a kind that a function does not run on."""


class LibraryError(Exception):
    """A library that a function needs is missing or unfit."""


class BackendSupportedError(Exception):
    """The named back end cannot do what was asked."""


# -- checks -------------------------------------------------------------------------------------


def _check_kv_layout(kv_layout):
    if kv_layout not in TensorLayout.__members__:
        raise KeyError(f"Invalid kv_layout {kv_layout!r}: expected 'NHD' or 'HND'")


def _check_pos_encoding_mode(pos_encoding_mode):
    if pos_encoding_mode not in PosEncodingMode.__members__:
        raise KeyError(
            f"Invalid pos_encoding_mode {pos_encoding_mode!r}: expected 'NONE', 'ROPE_LLAMA' or "
            "'ALIBI'"
        )


def check_lse_base(lse_base):
    if lse_base not in LSE_BASES:
        raise ValueError(f"Invalid lse_base {lse_base!r}: expected one of {LSE_BASES}")


def check_lse_layout(lse_layout):
    if lse_layout not in LSE_LAYOUTS:
        raise ValueError(f"Invalid lse_layout {lse_layout!r}: expected one of {LSE_LAYOUTS}")


def check_shape_dtype_device(x, expected_shape, expected_dtype, expected_device, name):
    """Raise ValueError for a tensor that differs from what is expected; None: anything goes."""
    import torch

    if expected_shape is not None and tuple(x.shape) != tuple(expected_shape):
        raise ValueError(
            f"Invalid shape of {name}: expected {tuple(expected_shape)}, got {tuple(x.shape)}"
        )
    if expected_dtype is not None and x.dtype != expected_dtype:
        raise ValueError(f"Invalid dtype of {name}: expected {expected_dtype}, got {x.dtype}")
    if expected_device is not None and x.device != torch.device(expected_device):
        raise ValueError(f"Invalid device of {name}: expected {expected_device}, got {x.device}")


def _check_cached_qkv_data_type(q, k, dtype_q, dtype_kv):
    if q.dtype != dtype_q:
        raise ValueError(f"q is {q.dtype}, plan() was told q_data_type {dtype_q}")
    if k.dtype != dtype_kv:
        raise ValueError(f"k is {k.dtype}, plan() was told kv_data_type {dtype_kv}")


def _check_workspace_buffer_alignment(x, name, alignment=16):
    if x.numel() > 0 and x.data_ptr() % alignment != 0:
        raise ValueError(
            f"{name}: expected memory aligned to {alignment} bytes, its address is "
            f"{x.data_ptr() % alignment} past that"
        )


# -- tensors ------------------------------------------------------------------------------------


def canonicalize_torch_dtype(dtype):
    """A torch.dtype, from itself or from its name."""
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str):
        raise TypeError(f"dtype: expected a torch.dtype or its name, got {type(dtype).__name__}")
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: torch has no dtype {dtype!r}")
    return found


def is_float8(x):
    import torch

    return x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def get_indptr(x):
    """Offsets [n + 1] of n lengths, int64."""
    import torch

    return torch.nn.functional.pad(x.to(torch.int64).cumsum(0), (1, 0))


def _expand(x, kv_layout, full):
    """x with the page dimension that a cache of one-token pages may leave out."""
    if x.ndim == full:
        return x
    if x.ndim != full - 1:
        raise ValueError(
            f"paged_kv_cache: expected {full} dimensions, or {full - 1} when pages hold one "
            f"token; got {x.ndim}"
        )
    _check_kv_layout(kv_layout)
    return x.unsqueeze(-3 if kv_layout == "NHD" else -2)


def _expand_5d(x, kv_layout):
    return _expand(x, kv_layout, 5)


def _expand_4d(x, kv_layout):
    return _expand(x, kv_layout, 4)


def _unpack_paged_kv_cache(paged_kv_cache, kv_layout):
    """(k, v), four dimensions each, of a cache given as a tuple or as one tensor."""
    import torch

    if isinstance(paged_kv_cache, tuple):
        k, v = paged_kv_cache
        return _expand_4d(k, kv_layout), _expand_4d(v, kv_layout)
    if not torch.is_tensor(paged_kv_cache):
        raise KeyError(
            f"Unrecognized paged_kv_cache type {type(paged_kv_cache).__name__}: expected one "
            "tensor, or a tuple (k, v)"
        )
    return _expand_5d(paged_kv_cache, kv_layout).unbind(dim=1)


def get_alibi_slopes(n_heads, device=None):
    """float32 [n_heads]: a geometric series from 2^(-8/n), n the largest power of two of heads; the
    heads beyond it take every second term of the series of 2 n (arXiv 2108.12409)."""
    import torch

    n = 1 << (n_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / n) for i in range(n_heads - n)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


# -- numbers ------------------------------------------------------------------------------------


def ceil_div(x, y):
    return -(-x // y)


def round_up(x, y):
    return ceil_div(x, y) * y


def next_positive_power_of_2(x):
    return 1 if x < 1 else 1 << (x - 1).bit_length()


def last_positive_power_of_2(x):
    if x < 1:
        raise ValueError(f"x: expected at least 1, got {x}")
    return 1 << (x.bit_length() - 1)


def version_at_least(version, base_version):
    """Whether version is base_version or later; what follows the numbers is not looked at."""

    def numbers(text):
        parts = []
        for part in text.split("+")[0].split("."):
            digits = part[: len(part) - len(part.lstrip("0123456789"))]
            if not digits:
                break
            parts.append(int(digits))
        return parts

    return numbers(version) >= numbers(base_version)


# -- the machine --------------------------------------------------------------------------------


@functools.cache
def get_compute_capability(device):
    """(major, minor) of a CUDA device. Raises ValueError for any other."""
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device: expected a CUDA device, got {device}")
    return torch.cuda.get_device_capability(device)


def _is_capability(device, *wanted):
    import torch

    return torch.device(device).type == "cuda" and get_compute_capability(device) in wanted


def is_sm90a_supported(device):
    return _is_capability(device, (9, 0))


def is_sm100a_supported(device):
    return _is_capability(device, (10, 0), (10, 3))


def is_sm100f_supported(device):
    return _is_capability(device, (10, 0), (10, 3))


def is_sm110a_supported(device):
    return _is_capability(device, (11, 0))


def is_sm120a_supported(device):
    return _is_capability(device, (12, 0))


def is_sm120f_supported(device):
    return _is_capability(device, (12, 0), (12, 1))


def is_sm121a_supported(device):
    return _is_capability(device, (12, 1))


def is_sm12x_supported(device):
    return _is_capability(device, (12, 0), (12, 1))


def device_support_pdl(device):
    """Whether programmatic dependent launch exists there (9.0 and later)."""
    import torch

    return torch.device(device).type == "cuda" and get_compute_capability(device)[0] >= 9


@functools.cache
def get_device_sm_count(device):
    import torch

    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def get_device_properties(device):
    import torch

    return torch.cuda.get_device_properties(device)


def has_flashinfer_jit_cache():
    """False: that package is FlashInfer's; raddle compiles in seconds and has its own cache."""
    return False


def determine_attention_backend(
    device,
    pos_encoding_mode,
    use_fp16_qk_reductions,
    use_custom_mask,
    dtype_q,
    dtype_kv,
    *,
    head_dim_qk=None,
    head_dim_vo=None,
):
    """ "fa2", the name that raddle goes by: one set of kernels does everything."""
    return "fa2"


def is_fa3_backend_supported(
    pos_encoding_mode, use_fp16_qk_reductions, use_custom_mask, dtype_q, dtype_kv
):
    """False: that kernel is FlashInfer's. backend="fa3" is accepted and runs raddle's."""
    return False


def is_fa3_prefill_head_dim_supported(head_dim_qk, head_dim_vo):
    return (head_dim_qk, head_dim_vo) in ((64, 64), (128, 128), (256, 256), (192, 128))


def register_custom_op(name, fn=None, /, *, mutates_args=(), device_types=None, schema=None):
    """A decorator that leaves its function as it is, as FlashInfer's does."""
    return lambda function: function


def register_fake_op(name, fn=None):
    """A decorator that leaves its function as it is, as FlashInfer's does."""
    return lambda function: function


__getattr__ = refuser(
    "utils", "FP4Tensor", "get_shuffle_matrix_a_row_indices", "get_shuffle_matrix_sf_a_row_indices"
)
