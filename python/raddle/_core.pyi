"""Types of the C module. Use raddle's own classes and functions: these names may change."""

import sys
from collections.abc import Sequence
from typing import Any, Self, final

__version__: str
_C_API: Any  # a capsule: the function table of raddle.h

# -- tensors ------------------------------------------------------------------------------------

# What raddle reads: torch.Tensor, numpy.ndarray, Tensor, or any object with __dlpack__.
_AnyTensor = Any
# A name such as "bfloat16", or a dtype object of NumPy or torch.
_DType = Any
# "cpu", "cuda:1", a torch.device, or DLPack's (type, index).
_Device = Any
# A CUstream handle, or an object with .cuda_stream, .ptr or __cuda_stream__; None: the producer's.
_Stream = Any

@final
class Tensor:
    __dlpack_c_exchange_api__: Any
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def itemsize(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def data_ptr(self) -> int: ...
    @property
    def is_contiguous(self) -> bool: ...
    @property
    def read_only(self) -> bool: ...
    def copy_(self, src: _AnyTensor, stream: _Stream = None, /) -> Self: ...
    def zero_(self, stream: _Stream = None, /) -> Self: ...
    def to(self, device: _Device, stream: _Stream = None, /) -> Tensor: ...
    def item(self) -> int | float | bool: ...
    def numpy(self) -> Any: ...
    def reshape(self, *shape: int) -> Tensor: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Tensor: ...
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any: ...
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def empty(shape: int | tuple[int, ...], dtype: _DType, device: _Device, /) -> Tensor: ...
def empty_like(
    like: _AnyTensor, shape: int | tuple[int, ...], dtype: _DType, device: _Device, /
) -> Any: ...
def from_dlpack(obj: _AnyTensor, dtype: _DType, /) -> Tensor: ...
def tensor_info(
    tensor: _AnyTensor, dtype: _DType = None, write: bool = False, /
) -> tuple[str, str, tuple[int, ...], tuple[int, ...], bool, str]: ...
def alloc_live() -> int: ...

# -- attention ----------------------------------------------------------------------------------

@final
class AttentionVariant:
    def __new__(
        cls,
        name: str,
        source: str,
        filename: str | None,
        no_softmax: bool,
        tensors: tuple[tuple[str, Any, bool], ...],
        scalars: tuple[tuple[str, Any, bool], ...],
    ) -> Self: ...
    @property
    def text(self) -> str: ...

class AttentionPlan:
    def __new__(cls, **spec: Any) -> Self: ...
    @property
    def workspace_size(self) -> int: ...
    @property
    def generation(self) -> int: ...
    def bind(self, workspace: Workspace | _AnyTensor, /) -> None: ...
    def update(
        self,
        qo_indptr: _AnyTensor | None,
        indptr: _AnyTensor | None,
        indices: _AnyTensor | None,
        last_page_len: _AnyTensor | None,
        block_table: _AnyTensor | None,
        seq_lens: _AnyTensor | None,
        stream: _Stream,
        on_device: bool,
        /,
    ) -> None: ...
    def run(
        self,
        q: _AnyTensor,
        k_or_kv: _AnyTensor,
        v: _AnyTensor | None,
        out: _AnyTensor | None,
        lse: _AnyTensor | None,
        return_lse: bool,
        stream: _Stream,
        sinks: _AnyTensor | None,
        k_scale: float | _AnyTensor | None,
        v_scale: float | _AnyTensor | None,
        variant_args: dict[str, Any] | None,
        /,
    ) -> Any: ...
    def schedule(self) -> tuple[Any, ...]: ...

def attention_merge_state(
    v_a: _AnyTensor,
    s_a: _AnyTensor,
    v_b: _AnyTensor,
    s_b: _AnyTensor,
    mask: _AnyTensor | None,
    v_out: _AnyTensor | None,
    s_out: _AnyTensor | None,
    lse_base: Any,
    stream: _Stream,
    /,
) -> tuple[Any, Any]: ...
def attention_merge_states(
    v: _AnyTensor,
    s: _AnyTensor,
    v_out: _AnyTensor | None,
    s_out: _AnyTensor | None,
    lse_base: Any,
    stream: _Stream,
    /,
) -> tuple[Any, Any]: ...
def attention_append(
    k: _AnyTensor,
    v: _AnyTensor,
    k_or_kv_cache: _AnyTensor,
    v_cache: _AnyTensor | None,
    batch_indices: _AnyTensor,
    positions: _AnyTensor,
    indptr: _AnyTensor,
    indices: _AnyTensor,
    kv_layout: Any,
    dtype: _DType,
    stream: _Stream,
    /,
) -> None: ...
def attention_append_slots(
    k: _AnyTensor,
    v: _AnyTensor,
    k_or_kv_cache: _AnyTensor,
    v_cache: _AnyTensor | None,
    slot_mapping: _AnyTensor,
    kv_layout: Any,
    dtype: _DType,
    stream: _Stream,
    /,
) -> None: ...
def attention_seq_lens(
    indptr: _AnyTensor,
    last_page_len: _AnyTensor,
    page_size: int,
    out: _AnyTensor | None,
    stream: _Stream,
    /,
) -> Any: ...
def attention_positions(
    append_indptr: _AnyTensor,
    seq_lens: _AnyTensor,
    nnz: int,
    batch_indices: _AnyTensor | None,
    positions: _AnyTensor | None,
    stream: _Stream,
    /,
) -> tuple[Any, Any]: ...

# -- ops ----------------------------------------------------------------------------------------

@final
class Linear:
    def __new__(
        cls,
        weight: _AnyTensor,
        bias: _AnyTensor | None = None,
        device: _Device | None = None,
        dtype: _DType = None,
        stream: _Stream = None,
    ) -> Self: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    def run(
        self, x: _AnyTensor, out: _AnyTensor | None, stream: _Stream, max_sms: int, /
    ) -> Any: ...

def ops_norm(
    x: _AnyTensor,
    residual: _AnyTensor | None,
    weight: _AnyTensor,
    bias: _AnyTensor | None,
    eps: float,
    weight_offset: float,
    scale: Any,
    out: _AnyTensor | None,
    dtype: _DType,
    stream: _Stream,
    /,
) -> Any: ...
def ops_act_and_mul(
    activation: int, x: _AnyTensor, out: _AnyTensor | None, dtype: _DType, stream: _Stream, /
) -> Any: ...
def ops_embedding(
    ids: _AnyTensor, table: _AnyTensor, out: _AnyTensor | None, dtype: _DType, stream: _Stream, /
) -> Any: ...
def ops_cos_sin(
    inv_freq: _AnyTensor, factor: float, max_position: int, device: _Device, /
) -> Tensor: ...
def ops_rope(
    q: _AnyTensor,
    k: _AnyTensor | None,
    positions: _AnyTensor | None,
    indptr: _AnyTensor | None,
    offsets: _AnyTensor | None,
    cos_sin_cache: _AnyTensor | None,
    q_out: _AnyTensor | None,
    k_out: _AnyTensor | None,
    turns: bytes | None,
    attention_factor: float,
    interleave: bool,
    dtype: _DType,
    stream: _Stream,
    /,
) -> None: ...
def ops_rope_fp8(
    q_rope: _AnyTensor,
    k_rope: _AnyTensor,
    q_nope: _AnyTensor | None,
    k_nope: _AnyTensor | None,
    v: _AnyTensor | None,
    q_rope_out: _AnyTensor,
    k_rope_out: _AnyTensor,
    q_nope_out: _AnyTensor | None,
    k_nope_out: _AnyTensor | None,
    v_out: _AnyTensor | None,
    cos_sin_cache: _AnyTensor,
    positions: _AnyTensor,
    batch_indices: _AnyTensor | None,
    token_positions: _AnyTensor | None,
    kv_indptr: _AnyTensor | None,
    kv_indices: _AnyTensor | None,
    q_scale: float,
    kv_scale: float,
    interleave: bool,
    dtype: _DType,
    stream: _Stream,
    /,
) -> None: ...
def ops_softmax(
    logits: _AnyTensor,
    temperature: Any,
    out: _AnyTensor | None,
    dtype: _DType,
    stream: _Stream,
    /,
) -> Any: ...
def ops_sample(
    x: _AnyTensor,
    is_probs: bool,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    seed: Any,
    offset: Any,
    indices: _AnyTensor | None,
    is_joint: bool,
    is_row_stream: bool,
    valid: _AnyTensor | None,
    out: _AnyTensor | None,
    dtype: _DType,
    stream: _Stream,
    /,
) -> Any: ...
def ops_filter(
    x: _AnyTensor,
    is_probs: bool,
    top_k: Any,
    top_p: Any,
    out: _AnyTensor | None,
    dtype: _DType,
    stream: _Stream,
    /,
) -> Any: ...
def ops_verify(
    draft_probs: _AnyTensor,
    draft_token_ids: _AnyTensor,
    target_probs: _AnyTensor,
    accepted: _AnyTensor | None,
    emitted: _AnyTensor | None,
    seed: Any,
    offset: Any,
    is_row_stream: bool,
    out: _AnyTensor | None,
    dtype: _DType,
    stream: _Stream,
    /,
) -> Any: ...
def ops_token_logprobs(
    logits: _AnyTensor, ids: _AnyTensor, top: int, dtype: _DType, stream: _Stream, /
) -> tuple[Any, Any, Any]: ...

# -- workspaces, streams and graphs -------------------------------------------------------------

@final
class Workspace:
    def __new__(
        cls, tensor: _AnyTensor | None = None, *, size: int | None = None, device: _Device = "cpu"
    ) -> Self: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> str: ...

@final
class Stream:
    def __new__(cls, device: _Device = "cuda", *, high_priority: bool = False) -> Self: ...
    @property
    def cuda_stream(self) -> int: ...
    @property
    def device(self) -> str: ...
    def synchronize(self) -> None: ...

@final
class Graph:
    def __new__(cls, device: _Device, stream: _Stream) -> Self: ...
    @property
    def stream(self) -> int: ...
    @property
    def state(self) -> str: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def abort(self) -> None: ...
    def launch(self, stream: _Stream, /) -> None: ...

@final
class Upload:
    def __new__(cls, count: int, device: _Device) -> Self: ...
    @property
    def tensor(self) -> Tensor: ...
    def slot(self) -> Tensor: ...
    def send(self, begin: int, end: int, stream: _Stream = None, /) -> None: ...

@final
class Readback:
    def __new__(cls, count: int, device: _Device) -> Self: ...
    def start(self, tensor: _AnyTensor, stream: _Stream = None, /) -> None: ...
    def wait(self) -> Tensor: ...

# -- machine and caches -------------------------------------------------------------------------

def settings() -> dict[str, Any]: ...
def driver_info() -> tuple[int, str]: ...
def gpu_count() -> int: ...
def gpu_info(index: int, /) -> dict[str, Any]: ...
def nvrtc_info() -> tuple[str, int, tuple[int, ...]]: ...
def blas_info() -> tuple[str, int]: ...
def nvrtc_cure() -> str: ...
def notices() -> list[str]: ...
def kernel_configs() -> list[tuple[str, str, bool]]: ...
def compile_kernel(name: str, config: str, arch: str, /) -> tuple[bytes, str]: ...
def parse_compile_log(log: str, /) -> dict[str, int]: ...
def warm_kernel(name: str, config: str, arch: str, /) -> str: ...
def write_bundle(path: str, kernels: tuple[tuple[str, str, str], ...], /) -> None: ...
def load_bundle(path: str, to_disk: bool, /) -> int: ...
def cache_measure() -> dict[str, int]: ...
def cache_verify(remove_damaged: bool, /) -> dict[str, int]: ...
def cache_clear() -> int: ...

# Each launch puts a second one behind it that adds to a counter in device memory; replays of graphs
# count too. Starting and reading wait for the GPUs: not while a stream is captured.
def count_launches(on: bool, /) -> None: ...
def launch_counts() -> dict[str, int]: ...

# -- measuring ----------------------------------------------------------------------------------

def tensor_open(tensor: _AnyTensor, count: int, /) -> None: ...
def memory_read(tensor: _AnyTensor, /) -> None: ...

# -- offline scheduling -------------------------------------------------------------------------

# cost: the fields of CostModel by name. seen: [num_requests] int32, -1 where a length was not seen;
# None: lengths are what the requests say.
@final
class BlendRequests:
    def __new__(
        cls,
        block_size: int,
        input_lengths: _AnyTensor | None,
        output_lengths: _AnyTensor | None,
        max_tokens: _AnyTensor | None,
        sources: _AnyTensor | None,
        weights: _AnyTensor | None,
        hash_ids: _AnyTensor | None,
        indptr: _AnyTensor | None,
        tokens: _AnyTensor | None,
    ) -> Self: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_requests(self) -> int: ...
    @property
    def num_sources(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def distinct_blocks(self) -> int: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def has_unknown(self) -> bool: ...
    @property
    def build_seconds(self) -> float: ...
    def output_lengths(self) -> Tensor: ...
    def sample(self, rate: float, quota: int, seed: int, /) -> Tensor: ...
    def order(
        self,
        policy: str,
        cost: dict[str, Any],
        pool_tokens: int,
        step_tokens: int,
        seed: int,
        seen: _AnyTensor | None,
        merged: bool,
        /,
    ) -> Tensor: ...
    def simulate(
        self,
        policy: str,
        cost: dict[str, Any],
        pool_tokens: int,
        step_tokens: int,
        seed: int,
        seen: _AnyTensor | None,
        /,
    ) -> dict[str, Any]: ...

@final
class BlendScheduler:
    def __new__(
        cls,
        requests: BlendRequests,
        policy: str,
        cost: dict[str, Any],
        pool_tokens: int,
        step_tokens: int,
        seed: int,
        seen: _AnyTensor | None,
    ) -> Self: ...
    @property
    def num_done(self) -> int: ...
    # preempted; of chunks: request, begin, count, is_first, is_last; num_decoding; tokens, scores,
    # reads; prompt_tokens, hit_tokens; seconds.
    def step(self, free_tokens: int | None, /) -> tuple[Any, ...]: ...
    def retire(self, ended: _AnyTensor | Sequence[int], /) -> None: ...
    def generated(self, request: int, /) -> int: ...
    def counts(self) -> dict[str, int]: ...

def blend_guess(
    requests: BlendRequests, seen: _AnyTensor | None, so_far: _AnyTensor, /
) -> Tensor: ...
def blend_partition(
    requests: BlendRequests,
    cost: dict[str, Any],
    replicas: int,
    tail: float,
    seen: _AnyTensor | None,
    /,
) -> tuple[Tensor, dict[str, float]]: ...
def blend_policy_names() -> tuple[str, ...]: ...
def blend_check_cost(cost: dict[str, Any], /) -> None: ...
def blend_step_seconds(
    cost: dict[str, Any], tokens: float, scores: float, reads: float, /
) -> tuple[float, float, float]: ...
