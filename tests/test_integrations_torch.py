"""torch.ops.raddle: schemas, shapes, torch.compile and torch.cuda.graph.

Every operator passes torch.library.opcheck, gives what raddle's own function gives (which has tests
of its own), and compiles with fullgraph=True. Needs: torch, a C compiler; a GPU for device cuda.
"""

import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")

from raddle import Variant, attention, ops  # noqa: E402
from raddle.attention import BatchDecode, BatchPrefill, BatchRaggedPrefill  # noqa: E402
from raddle.errors import ArgumentError, DTypeError, StateError, UnsupportedError  # noqa: E402
from raddle.integrations.torch import AttentionOp  # noqa: E402

from tests.hook_cases import CASES  # noqa: E402

HEADS = dict(num_qo_heads=8, num_kv_heads=2, head_dim=64)
raddle_ops = torch.ops.raddle
needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="needs cc: no C compiler on the PATH")


def make(device, *shape, seed=0, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype or getattr(torch, spec_of(device)["dtype"])
    return torch.randn(*shape, generator=generator).to(device, dtype)


def spec_of(device, **more):
    return dict(HEADS, dtype="float32" if device == "cpu" else "bfloat16", device=device, **more)


def make_decode(device, lengths=(40, 7, 300, 1), max_pages=64, **spec):
    pages = [-(-n // 16) for n in lengths]
    plan = BatchDecode(
        page_size=16, max_batch=len(lengths), max_pages=max_pages, **spec_of(device, **spec)
    )
    plan_decode(plan, lengths)
    return plan, make(device, len(lengths), 8, 64), make(device, sum(pages), 2, 16, 2, 64, seed=1)


def plan_decode(plan, lengths):
    pages = [-(-n // 16) for n in lengths]
    indptr = np.concatenate([[0], np.cumsum(pages)])
    last = [n - (p - 1) * 16 for n, p in zip(lengths, pages)]
    order = np.random.default_rng(0).permutation(sum(pages))
    plan.plan(*(torch.tensor(np.asarray(x)) for x in (indptr, order, last)))


def plan_with(kind, device, **spec):
    """(plan, its q, its K and V): causal, 20 query rows of two requests."""
    common = spec_of(device, max_batch=2, max_qo_tokens=32, causal=True, **spec)
    qo = torch.tensor([0, 5, 20])
    q = make(device, 20, 8, 64)
    if kind == "ragged":
        plan = BatchRaggedPrefill(max_kv_tokens=64, **common)
        plan.plan(qo, torch.tensor([0, 30, 50]))
        return plan, q, (make(device, 50, 2, 64, seed=1), make(device, 50, 2, 64, seed=2))
    plan = BatchPrefill(page_size=16, max_pages=8, **common)
    plan.plan(qo, *(torch.tensor(x) for x in ([0, 2, 4], [3, 0, 2, 1], [14, 4])))
    return plan, q, make(device, 4, 2, 16, 2, 64, seed=1)


def cases(device):
    """name -> (arguments, keyword arguments, what raddle's own function makes of them)."""
    x, gate = make(device, 6, 64), make(device, 6, 128)
    weight, bias = make(device, 64, seed=3), make(device, 64, seed=4)
    q, k = make(device, 5, 8, 64), make(device, 5, 2, 64, seed=1)
    positions = torch.arange(3, 8, device=device)
    table = torch.from_dlpack(ops.rope_cos_sin_cache(16, 64, device=device))
    v, s = make(device, 5, 3, 8, 64), make(device, 5, 3, 8, dtype=torch.float32)
    states = (v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    logits = make(device, 4, 50)
    ids = torch.tensor([3, 0, 49, 7], device=device)
    seeds = torch.arange(4, device=device)
    hot = torch.full((4,), 1.5, device=device)
    return {
        "rmsnorm": ((x, weight), dict(eps=1e-5), lambda: ops.rmsnorm(x, weight, 1e-5)),
        "layernorm": ((x, weight, bias), {}, lambda: ops.layernorm(x, weight, bias)),
        "silu_and_mul": ((gate,), {}, lambda: ops.silu_and_mul(gate)),
        "gelu_and_mul": ((gate,), {}, lambda: ops.gelu_and_mul(gate)),
        "gelu_tanh_and_mul": ((gate,), {}, lambda: ops.gelu_tanh_and_mul(gate)),
        "rope": ((q, k, positions, table), {}, lambda: rotated(q, k, positions, table)),
        "merge_state": (states, {}, lambda: attention.merge_state(*states)),
        "merge_states": ((v, s), {}, lambda: attention.merge_states(v, s)),
        "embedding": ((ids, weight[:50, None].repeat(1, 8)), {},
                      lambda: ops.embedding(ids, weight[:50, None].repeat(1, 8))),
        "softmax": ((logits, 0.7), {}, lambda: ops.softmax(logits, temperature=0.7)),
        "sample": ((logits,), dict(temperature=hot, seed=seeds),
                   lambda: ops.sample(logits, temperature=hot, seed=seeds)),
        "token_logprobs": ((logits, ids), dict(top=3),
                           lambda: ops.token_logprobs(logits, ids, top=3)),
    }  # fmt: skip


def rotated(q, k, *rest):
    q, k = q.clone(), k.clone()
    ops.apply_rope(q, k, *rest)
    return q, k


NAMES = ("rmsnorm", "layernorm", "silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "rope",
         "merge_state", "merge_states", "embedding", "softmax", "sample",
         "token_logprobs")  # fmt: skip


def writers(device):
    """name -> (arguments, which of them the operator writes, raddle's own call on them)."""
    q, k = make(device, 5, 8, 64), make(device, 5, 2, 64, seed=1)
    positions = torch.arange(3, 8, device=device)
    table = torch.from_dlpack(ops.rope_cos_sin_cache(16, 64, device=device))
    x, residual = make(device, 6, 64), make(device, 6, 64, seed=1)
    weight = make(device, 64, seed=3)
    k_cache, v_cache = make(device, 4, 16, 2, 64, seed=5), make(device, 4, 16, 2, 64, seed=6)
    slots = torch.tensor([0, 63, -1, 17, 5], device=device)
    batch = torch.tensor([0, 0, 1, 1, -1], device=device)
    places = torch.tensor([3, 4, 20, 21, 0], device=device)
    indices, indptr = torch.tensor([2, 1, 3], device=device), torch.tensor([0, 1, 3], device=device)
    joined = make(device, 4, 2, 16, 2, 64, seed=5)
    return {
        "apply_rope": ((q, k, positions, table), (0, 1), ops.apply_rope),
        "apply_rope, no k": ((q, None, positions, table), (0,), ops.apply_rope),
        "fused_add_rmsnorm": ((x, residual, weight), (0, 1), ops.fused_add_rmsnorm),
        "append_slots": ((k, k + 1, slots, k_cache, v_cache), (3, 4),
                         lambda k, v, slots, a, b: attention.append_slots(k, v, slots, (a, b))),
        "append_slots, joined": ((k, k + 1, slots, joined), (3,), attention.append_slots),
        "append_paged_kv_cache": (
            (k, k + 1, batch, places, k_cache, v_cache, indices, indptr), (4, 5),
            lambda k, v, b, p, ck, cv, i, ptr: attention.append_paged_kv_cache(
                k, v, b, p, (ck, cv), i, ptr)),
    }  # fmt: skip


WRITERS = ("apply_rope", "apply_rope, no k", "fused_add_rmsnorm", "append_slots",
           "append_slots, joined", "append_paged_kv_cache")  # fmt: skip


def operator(name):
    return getattr(raddle_ops, name.partition(",")[0])


def copies(args):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in args]


def assert_equal(got, want):
    if isinstance(want, tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want):
            assert_equal(one, other)
    else:
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_every_operator_has_a_case():
    defined = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
               if name.startswith("raddle::")}  # fmt: skip
    tested = {*NAMES, *(name.partition(",")[0] for name in WRITERS)}
    assert defined == tested | {f"attention{x}" for x in ("", "_lse", "_writing", "_lse_writing")}


@pytest.mark.parametrize("name", NAMES)
def test_functions(device, name):
    args, kwargs, native = cases(device)[name]
    assert_equal(operator(name)(*args, **kwargs), native())
    torch.library.opcheck(operator(name).default, args, kwargs)


@pytest.mark.parametrize("name", WRITERS)
def test_writers(device, name):
    args, written, native = writers(device)[name]
    mine, theirs = copies(args), copies(args)
    assert operator(name)(*mine) is None
    native(*theirs)
    for i, (one, other) in enumerate(zip(mine, theirs)):
        if one is not None:
            assert torch.equal(one, other)
            assert torch.equal(one, args[i]) == (i not in written)
    torch.library.opcheck(operator(name).default, tuple(copies(args)))


@pytest.mark.parametrize("kind", ["decode", "paged", "ragged"])
def test_attention(device, kind):
    plan, q, kv = make_decode(device) if kind == "decode" else plan_with(kind, device)
    op = AttentionOp(plan)
    want = plan.run(q, *(kv if kind == "ragged" else [kv]), return_lse=True)
    assert_equal(op(q, kv), want[0])
    assert_equal(op(q, kv, return_lse=True), want)
    k, v = kv if isinstance(kv, tuple) else (kv, None)
    for operator in (raddle_ops.attention, raddle_ops.attention_lse):
        torch.library.opcheck(operator.default, (q, k, v, op.handle))


def test_attention_with_sinks_and_scales(device):
    plan, q, kv = make_decode(device, sinks=True)
    op = AttentionOp(plan)
    sinks = torch.randn(8, device=device)
    heads = torch.tensor([0.5, 2.0], device=device)
    for scales in (dict(k_scale=0.5, v_scale=2.0), dict(k_scale=heads, v_scale=heads)):
        assert_equal(op(q, kv, sinks=sinks, **scales), plan.run(q, kv, sinks=sinks, **scales))


@needs_cc
@pytest.mark.keeps_blocks
@pytest.mark.parametrize("suffix", ["", "_writing"])
def test_variant(device, suffix):
    """A hook that reads, and one that writes every logit too, beside sinks and scales."""
    write = "{ v->dump.data[(row->token * 8 + row->qo_head) * 300 + kv_index] = logit;"
    source = CASES["logit"].source.replace("{", write if suffix else "{", 1)
    written = dict(dump=torch.zeros(4, 8, 300, device=device)) if suffix else {}
    tensors = ["bias", *((name, "float32", "w") for name in written)]
    variant = Variant("biased", source, tensors=tensors, scalars=["factor"])
    plan, q, kv = make_decode(device, variant=variant, sinks=True)
    op, bias = AttentionOp(plan), torch.randn(8, 33, device=device)
    sinks, scales = bias[:, 0].contiguous(), bias[:2, 1].contiguous()

    def call(run, q, bias, factor, written):
        args = dict(written, bias=bias * 2, factor=factor)
        more = dict(sinks=sinks, k_scale=0.5, v_scale=scales, return_lse=True)
        return *run(q * 2, kv, variant_args=args, **more), *(x + 1 for x in written.values())

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for factor in (0.75, 3, 0.5):
        mine, theirs = ({name: x.clone() for name, x in written.items()} for _ in range(2))
        assert_equal(compiled(op, q, bias, factor, mine), call(plan.run, q, bias, factor, theirs))
        assert all(torch.equal(mine[name], x) and x.any() for name, x in theirs.items())
    given = dict(sinks=sinks, v_scales=scales, variant_tensors=[bias], variant_scalars=[0.5])
    given |= dict(variant_names=["bias", *written, "factor"])
    given |= dict(variant_written=list(written.values())) if suffix else {}
    for name in ("attention", "attention_lse"):
        torch.library.opcheck(operator(name + suffix).default, (q, kv, None, op.handle), given)


@needs_cc
@pytest.mark.keeps_blocks
def test_wrong_variant_args(device):
    variant = CASES["logit"].variant()
    plan, q, kv = make_decode(device, variant=variant)
    op, bias = AttentionOp(plan), torch.zeros(8, 33, device=device)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    good, typo = dict(bias=bias, factor=1.0), dict(bais=bias, factor=1.0)
    for wrong, given, error, message in (
        (op, typo, ArgumentError, "declares bias, factor; got bais, factor"),
        (compiled, typo, RuntimeError, "declares bias, factor; got bais, factor"),
        (op, None, ArgumentError, "declares bias, factor; got nothing"),
        (op, dict(good, factor=bias), DTypeError, "factor: expected a number, got Tensor"),
        (op, dict(good, bias=bias.tolist()), DTypeError, "bias: expected a torch tensor, got list"),
        (op, dict(good, bias=bias.double()), DTypeError, "bias: expected dtype float32"),
        (op, dict(good, bias=bias.clone().requires_grad_()), UnsupportedError, "no gradient"),
        (AttentionOp(make_decode(device)[0]), good, ArgumentError, "without a va"),
    ):
        with pytest.raises(error, match=message):
            wrong(q, kv, variant_args=given)


def test_result_of_another_dtype(device):
    plan, q, kv = make_decode(device, o_dtype="float16")
    out = AttentionOp(plan, out_dtype=torch.float16)(q, kv)
    assert_equal(out, plan.run(q, kv, out=torch.empty_like(q, dtype=torch.float16)))
    with pytest.raises(DTypeError, match="float16"):
        AttentionOp(plan)(q, kv)


# ------------------------------------------------------------------ torch.compile


def block(x, residual, weight, wq, op, positions, table, slots, k_cache, v_cache):
    """A layer around attention as a server has it."""
    raddle_ops.fused_add_rmsnorm(x, residual, weight)
    qkv = (x @ wq).view(x.shape[0], 12, 64)
    q, k = raddle_ops.rope(qkv[:, :8], qkv[:, 8:10], positions, table)
    raddle_ops.append_slots(k, qkv[:, 10:], slots, k_cache, v_cache)
    out, lse = op(q, (k_cache, v_cache), return_lse=True)
    gate = raddle_ops.silu_and_mul(out.view(x.shape[0], -1))
    return gate + residual.sum(-1, keepdim=True), lse


def block_arguments(device, op):
    batch = op.plan_lengths
    return [
        make(device, len(batch), 256), make(device, len(batch), 256, seed=1),
        make(device, 256, seed=2), make(device, 256, 768, seed=3) * 0.05, op,
        torch.tensor([n - 1 for n in batch], device=device),
        torch.from_dlpack(ops.rope_cos_sin_cache(512, 64, device=device)),
        op.slots.to(device),
        make(device, 24, 16, 2, 64, seed=4), make(device, 24, 16, 2, 64, seed=5),
    ]  # fmt: skip


def make_block_op(device, lengths):
    """An AttentionOp over pages of 24, request i's from i * 8 on, and the slots of last tokens."""
    op = AttentionOp(BatchDecode(page_size=16, max_batch=4, max_pages=24, **spec_of(device)))
    plan_block(op, lengths)
    return op


def plan_block(op, lengths):
    table = torch.arange(24).view(3, 8)
    op.plan.plan(block_table=table, seq_lens=torch.tensor(lengths))
    op.plan_lengths = lengths
    last = torch.tensor(lengths) - 1
    op.slots = table[torch.arange(3), last // 16] * 16 + last % 16


def test_compile_whole_layer(device):
    op = make_block_op(device, (20, 100, 3))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(*copies(block_arguments(device, op)))
    for lengths in ((20, 100, 3), (21, 101, 4), (128, 1, 17)):
        plan_block(op, lengths)  # between calls, as a server does
        eager, mine = (block_arguments(device, op) for _ in range(2))
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            want, got = block(*eager), compiled(*mine)
        assert_equal(got, want)
        for one, other in zip(mine, eager):
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other)


def test_compile_with_inductor(device):
    """As above by the default back end, which needs a C compiler or Triton."""
    if device == "cpu" and not shutil.which("g++"):
        pytest.skip("needs gcc: there is no g++, which inductor calls")
    op = make_block_op(device, (20, 100, 3))
    eager, mine = (block_arguments(device, op) for _ in range(2))
    with torch.no_grad():
        want, got = block(*eager), torch.compile(block, fullgraph=True)(*mine)
    tolerance = 1e-5 if device == "cpu" else 3e-2
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mine[8], eager[8], rtol=tolerance, atol=tolerance)


def test_many_plans_in_one_compiled_function(device):
    plans = [make_decode(device, lengths) for lengths in ((5, 9), (30, 2), (17, 80))]
    run = torch.compile(lambda op, q, kv: op(q, kv) + 1, fullgraph=True, backend="aot_eager")
    for plan, q, kv in plans:
        assert_equal(run(AttentionOp(plan), q, kv), plan.run(q, kv) + 1)


def test_cuda_graph(device):
    if device == "cpu":
        pytest.skip("the CPU has no graphs")
    op = make_block_op(device, (20, 100, 3))
    args = block_arguments(device, op)
    with torch.no_grad():
        block(*copies(args))  # compiles kernels
        static = copies(args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = block(*static)
        for lengths in ((20, 100, 3), (128, 1, 17)):
            plan_block(op, lengths)
            fresh = block_arguments(device, op)
            for place, value in zip(static, fresh):
                if isinstance(place, torch.Tensor):
                    place.copy_(value)
            want = block(*copies(fresh))
            graph.replay()
            assert_equal(out, want)


# ------------------------------------------------------------------ what is refused


def test_gradients_are_refused(device):
    x, weight = make(device, 6, 64), torch.nn.Parameter(make(device, 64))
    with pytest.raises(UnsupportedError, match="raddle::rmsnorm has no gradient"):
        raddle_ops.rmsnorm(x, weight)
    with torch.no_grad():
        assert not raddle_ops.rmsnorm(x, weight).requires_grad
    with torch.inference_mode():
        raddle_ops.rmsnorm(x, weight)
    with pytest.raises(UnsupportedError, match="fused_add_rmsnorm has no gradient"):
        raddle_ops.fused_add_rmsnorm(x, x.clone(), weight)
    plan, q, kv = make_decode(device)
    with pytest.raises(UnsupportedError, match="attention has no gradient"):
        AttentionOp(plan)(q.requires_grad_(), kv)


def test_a_plan_that_is_gone(device):
    plan, q, kv = make_decode(device)
    op = AttentionOp(plan)
    handle = op.handle
    del op
    raddle_ops.attention(q, kv, None, handle)  # its plan lives
    del plan
    with pytest.raises(StateError, match=f"no plan {handle}"):
        raddle_ops.attention(q, kv, None, handle)


def test_errors_of_the_plan_come_through(device):
    plan, q, kv = make_decode(device)
    with pytest.raises(ValueError, match="q"):
        AttentionOp(plan)(q[:2], kv)
