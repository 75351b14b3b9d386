"""User-written attention variants: C text, compiled when a plan is made."""

from . import _core


class Variant:
    """Hooks that change what attention computes, as C functions; each is optional.

    name: an identifier. source: definitions of (in the order in which they act)

        raddle_pair raddle_variant_query(const raddle_variant *v, const raddle_row *row,
                                         int32_t dim, raddle_pair x)
        raddle_pair raddle_variant_key(const raddle_variant *v, const raddle_key *key,
                                       int32_t dim, raddle_pair x)
        float raddle_variant_logit(const raddle_variant *v, const raddle_row *row,
                                   int32_t kv_index, float logit)
        bool raddle_variant_mask(const raddle_variant *v, const raddle_row *row, int32_t kv_index)
        void raddle_variant_state(const raddle_variant *v, const raddle_row *row,
                                  float *max, float *sum)
        float raddle_variant_output(const raddle_variant *v, const raddle_row *row,
                                    int32_t dim, float x)

    query and key see two elements of a row, x.low at dim < head_dim / 2 and x.high head_dim / 2
    behind. logit gets sm_scale * q . k in natural units, after the plan's soft cap and ALiBi. mask
    says whether the row sees the key (on a GPU, V of hidden keys must still be numbers, not NaN or
    infinity); causality and the window are asked before. state is called when all keys of a row
    are in: sum = sum of e^(logit - max); on a GPU by several threads, each with its own copies.
    output gets the finished result, before it is rounded. raddle_row has request, qo_index, qo_len,
    kv_len, qo_head, kv_head, token (row of q); raddle_key has request, kv_index, kv_len, kv_head.
    The text must be C11 and C++ at once; the functions of <math.h> are there, and the built-ins of
    kernels/attention/attention_variant.h (raddle_soft_cap, raddle_alibi, raddle_rotate,
    raddle_sink, raddle_sigmoid, raddle_row_position).

    tensors: names of tensors that run() is given as variant_args, or tuples (name, dtype) or
    (name, dtype, "w") when a hook writes into it; dtype float32 (default), int32, int64, uint8 or
    bool. At most 8, of up to 4 dimensions; v->name.data, v->name.stride[i] (elements) and
    v->name.shape[i]. scalars: names, or (name, "int32"); at most 16; v->name. softmax=False: what
    logit returns is the weight, nothing is divided, there is no lse; on a GPU weights are rounded
    to 16 bits, float16 with float16 or float8 K/V. filename: how compilers call the text in their
    messages; the name when not given.

    Raises ArgumentError for a source without hooks or with an unknown one, and for bad
    declarations. Plans that use it raise CompileError, with the compiler's message and the line of
    the source.
    """

    def __init__(self, name, source, *, tensors=(), scalars=(), softmax=True, filename=None):
        self.name = name
        self.source = source
        self.tensors = tuple(_declaration(one) for one in tensors)  # (name, dtype, is_written)
        self.scalars = tuple(_declaration(one) for one in scalars)
        self.core = _core.AttentionVariant(
            name, source, filename, not softmax, self.tensors, self.scalars
        )


def _declaration(one):
    """(name, dtype, is_written) of a name or a tuple."""
    if isinstance(one, str):
        one = (one,)
    name, dtype, access = (*one, "float32", "r")[:3] if len(one) == 1 else (*one, "r")[:3]
    if access not in ("r", "w"):
        from .errors import ArgumentError

        raise ArgumentError(f"tensors: {name} has access {access!r}, expected 'r' or 'w'")
    return name, dtype, access == "w"
