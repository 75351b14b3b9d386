"""flashinfer.jit: what programs call to build kernels ahead of time.

raddle compiles a kernel when a plan is made, in about a second, and keeps it on disk
(`python -m raddle warmup` fills that cache). So the specs of the families that raddle covers are
names, and building them does nothing; those of other families, and of variants written as
FlashInfer's C++ structs, raise UnsupportedError when called.
"""

import sys

from ..errors import UnsupportedError
from ._refuse import refuser


class MissingJITCacheError(RuntimeError):
    """A kernel is not in FlashInfer's ahead-of-time cache. raddle never raises it."""

    def __init__(self, message, spec=None):
        super().__init__(message)
        self.spec = spec


class JitSpec:
    """A kernel family with its arguments: a name, and nothing to build."""

    def __init__(self, name):
        self.name = name
        self.sources = []
        self.needs_device_linking = False
        self.aot_path = None

    def build(self, *args, **kwargs):
        """Nothing to do."""

    def build_and_load(self, *args, **kwargs):
        raise UnsupportedError(
            f"{self.name}: raddle has no module to load; call the functions and wrappers"
        )

    def __repr__(self):
        return f"JitSpec({self.name!r})"


def build_jit_specs(specs, verbose=False, skip_prebuilt=True):
    """Nothing to do for JitSpecs: see the module."""
    for spec in specs:
        if not isinstance(spec, JitSpec):
            raise TypeError(f"specs: expected JitSpecs, got {type(spec).__name__}")


def _spec_maker(family):
    def gen_module(*args, **kwargs):
        words = [str(one) for one in args] + [f"{k}_{v}" for k, v in kwargs.items()]
        return JitSpec("_".join([family, *words]).replace("torch.", ""))

    gen_module.__name__ = gen_module.__qualname__ = f"gen_{family}_module"
    gen_module.__doc__ = f"A JitSpec that names a kernel of the {family} family."
    return gen_module


gen_act_and_mul_module = _spec_maker("act_and_mul")
gen_batch_decode_module = _spec_maker("batch_decode")
gen_batch_prefill_module = _spec_maker("batch_prefill")
gen_cascade_module = _spec_maker("cascade")
gen_norm_module = _spec_maker("norm")
gen_page_module = _spec_maker("page")
gen_quantization_module = _spec_maker("quantization")
gen_rope_module = _spec_maker("rope")
gen_sampling_module = _spec_maker("sampling")
gen_single_decode_module = _spec_maker("single_decode")
gen_single_prefill_module = _spec_maker("single_prefill")


def _refuse_customize(name):
    def gen_customize(*args, **kwargs):
        raise UnsupportedError(
            f"{name}: variants written as FlashInfer's C++ structs are not supported; write a "
            "raddle.Variant and use raddle.attention"
        )

    gen_customize.__name__ = gen_customize.__qualname__ = name
    return gen_customize


gen_customize_batch_decode_module = _refuse_customize("gen_customize_batch_decode_module")
gen_customize_batch_prefill_module = _refuse_customize("gen_customize_batch_prefill_module")
gen_customize_single_decode_module = _refuse_customize("gen_customize_single_decode_module")
gen_customize_single_prefill_module = _refuse_customize("gen_customize_single_prefill_module")

__getattr__ = refuser(
    "jit",
    "env",
    "gen_batch_attention_module",
    "gen_batch_mla_module",
    "gen_batch_pod_module",
    "gen_fmha_cutlass_sm100a_module",
    "gen_fmha_v2_module",
    "gen_jit_spec",
    "gen_pod_module",
    "gen_topk_module",
    "gen_trtllm_gen_fmha_module",
    "gen_xqa_module",
)

attention = core = sys.modules[__name__]  # flashinfer.jit.attention and .core are this module too
