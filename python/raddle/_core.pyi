"""Types of the C module. Use raddle's own classes and functions: these names may change."""

from typing import Any, Self

__version__: str

# -- tensors ------------------------------------------------------------------------------------

# What raddle reads: torch.Tensor, numpy.ndarray, Tensor, or any object with __dlpack__.
AnyTensor = Any
# A name such as "bfloat16", or a dtype object of NumPy or torch.
DType = Any
# "cpu", "cuda:1", a torch.device, or DLPack's (type, index).
Device = Any
# A CUstream handle, or an object with .cuda_stream, .ptr or __cuda_stream__; None: the producer's.
Stream = Any

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
    def copy_(self, src: AnyTensor, stream: Stream = None, /) -> Self: ...
    def zero_(self, stream: Stream = None, /) -> Self: ...
    def to(self, device: Device, stream: Stream = None, /) -> Tensor: ...
    def item(self) -> int | float | bool: ...
    def numpy(self) -> Any: ...
    def reshape(self, *shape: int) -> Tensor: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Tensor: ...
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any: ...
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

def empty(shape: int | tuple[int, ...], dtype: DType, device: Device, /) -> Tensor: ...
def empty_like(
    like: AnyTensor, shape: int | tuple[int, ...], dtype: DType, device: Device, /
) -> Any: ...
def from_dlpack(obj: AnyTensor, dtype: DType, /) -> Tensor: ...
def tensor_info(
    tensor: AnyTensor, dtype: DType = None, write: bool = False, /
) -> tuple[str, str, tuple[int, ...], tuple[int, ...], bool, str]: ...
def alloc_live() -> int: ...

# -- attention ----------------------------------------------------------------------------------

class AttentionPlan:
    def __init__(self, **spec: Any) -> None: ...
    @property
    def workspace_size(self) -> int: ...
    @property
    def generation(self) -> int: ...
    def bind(self, workspace: Workspace | AnyTensor, /) -> None: ...
    def update(
        self,
        qo_indptr: AnyTensor | None,
        indptr: AnyTensor | None,
        indices: AnyTensor | None,
        last_page_len: AnyTensor | None,
        block_table: AnyTensor | None,
        seq_lens: AnyTensor | None,
        stream: Stream,
        /,
    ) -> None: ...
    def run(
        self,
        q: AnyTensor,
        k_or_kv: AnyTensor,
        v: AnyTensor | None,
        out: AnyTensor | None,
        lse: AnyTensor | None,
        return_lse: bool,
        stream: Stream,
        /,
    ) -> Any: ...
    def schedule(self) -> tuple[Any, ...]: ...

def attention_merge_state(
    v_a: AnyTensor,
    s_a: AnyTensor,
    v_b: AnyTensor,
    s_b: AnyTensor,
    mask: AnyTensor | None,
    v_out: AnyTensor | None,
    s_out: AnyTensor | None,
    lse_base: Any,
    stream: Stream,
    /,
) -> tuple[Any, Any]: ...
def attention_merge_states(
    v: AnyTensor,
    s: AnyTensor,
    v_out: AnyTensor | None,
    s_out: AnyTensor | None,
    lse_base: Any,
    stream: Stream,
    /,
) -> tuple[Any, Any]: ...
def attention_append(
    k: AnyTensor,
    v: AnyTensor,
    k_or_kv_cache: AnyTensor,
    v_cache: AnyTensor | None,
    batch_indices: AnyTensor,
    positions: AnyTensor,
    indptr: AnyTensor,
    indices: AnyTensor,
    kv_layout: Any,
    dtype: DType,
    stream: Stream,
    /,
) -> None: ...
def attention_append_slots(
    k: AnyTensor,
    v: AnyTensor,
    k_or_kv_cache: AnyTensor,
    v_cache: AnyTensor | None,
    slot_mapping: AnyTensor,
    kv_layout: Any,
    dtype: DType,
    stream: Stream,
    /,
) -> None: ...
def attention_seq_lens(
    indptr: AnyTensor,
    last_page_len: AnyTensor,
    page_size: int,
    out: AnyTensor | None,
    stream: Stream,
    /,
) -> Any: ...
def attention_positions(
    append_indptr: AnyTensor,
    seq_lens: AnyTensor,
    nnz: int,
    batch_indices: AnyTensor | None,
    positions: AnyTensor | None,
    stream: Stream,
    /,
) -> tuple[Any, Any]: ...

# -- ops ----------------------------------------------------------------------------------------

class Linear:
    def __init__(
        self,
        weight: AnyTensor,
        bias: AnyTensor | None = None,
        device: Device | None = None,
        dtype: DType = None,
        stream: Stream = None,
    ) -> None: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    def run(self, x: AnyTensor, out: AnyTensor | None, stream: Stream, /) -> Any: ...

def ops_rmsnorm(
    x: AnyTensor,
    weight: AnyTensor,
    eps: float,
    out: AnyTensor | None,
    dtype: DType,
    stream: Stream,
    /,
) -> Any: ...
def ops_fused_add_rmsnorm(
    x: AnyTensor,
    residual: AnyTensor,
    weight: AnyTensor,
    eps: float,
    dtype: DType,
    stream: Stream,
    /,
) -> Any: ...
def ops_act_and_mul(
    activation: int, x: AnyTensor, out: AnyTensor | None, dtype: DType, stream: Stream, /
) -> Any: ...
def ops_embedding(
    ids: AnyTensor, table: AnyTensor, out: AnyTensor | None, dtype: DType, stream: Stream, /
) -> Any: ...
def ops_cos_sin(
    inv_freq: AnyTensor, factor: float, max_position: int, device: Device, /
) -> Tensor: ...
def ops_apply_rope(
    q: AnyTensor,
    k: AnyTensor | None,
    positions: AnyTensor,
    cos_sin_cache: AnyTensor,
    interleave: bool,
    dtype: DType,
    stream: Stream,
    /,
) -> Any: ...
def ops_softmax(
    logits: AnyTensor,
    temperature: Any,
    out: AnyTensor | None,
    dtype: DType,
    stream: Stream,
    /,
) -> Any: ...
def ops_sample(
    logits: AnyTensor,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    seed: Any,
    offset: Any,
    out: AnyTensor | None,
    dtype: DType,
    stream: Stream,
    /,
) -> Any: ...
def ops_token_logprobs(
    logits: AnyTensor, ids: AnyTensor, top: int, dtype: DType, stream: Stream, /
) -> tuple[Any, Any, Any]: ...

# -- workspaces and graphs ----------------------------------------------------------------------

class Workspace:
    def __init__(
        self, tensor: AnyTensor | None = None, *, size: int | None = None, device: Device = "cpu"
    ) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> str: ...

class Graph:
    def __init__(self, device: Device, stream: Stream) -> None: ...
    @property
    def stream(self) -> int: ...
    @property
    def state(self) -> str: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def abort(self) -> None: ...
    def launch(self, stream: Stream, /) -> None: ...

# -- machine and caches -------------------------------------------------------------------------

def settings() -> dict[str, Any]: ...
def driver_info() -> tuple[Any, ...]: ...
def gpu_count() -> int: ...
def gpu_info(index: int, /) -> dict[str, Any]: ...
def nvrtc_info() -> tuple[Any, ...]: ...
def nvrtc_cure() -> str: ...
def notices() -> Any: ...
def kernel_configs() -> list[tuple[str, str, bool]]: ...
def compile_kernel(name: str, config: str, arch: Any, /) -> tuple[bytes, str]: ...
def parse_compile_log(log: str, /) -> Any: ...
def warm_kernel(name: str, config: str, arch: Any, /) -> str: ...
def write_bundle(path: str, kernels: tuple[tuple[str, str, Any], ...], /) -> Any: ...
def load_bundle(path: str, to_disk: bool, /) -> int: ...
def cache_measure() -> tuple[int, int]: ...
def cache_verify(remove_damaged: bool, /) -> Any: ...
def cache_clear() -> int: ...
