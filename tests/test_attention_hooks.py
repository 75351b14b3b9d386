"""User-written attention variants against float64 NumPy, on both back ends, and what is said when
they are wrong.

Needs: numpy, a C compiler; a GPU for device cuda.
"""

import os
import shutil

import numpy as np
import pytest
import raddle
from raddle.attention import BatchDecode
from raddle.errors import (
    ArgumentError,
    CapacityError,
    CompileError,
    DTypeError,
    ShapeError,
    UnsupportedError,
)

from tests.hook_cases import CASES, reference
from tests.variant_cases import KINDS, Kind, check

pytestmark = pytest.mark.keeps_blocks  # compiled variants stay

if shutil.which(os.environ.get("CC", "cc").split()[0]) is None:
    pytest.skip("needs cc: there is no C compiler on the PATH", allow_module_level=True)


@pytest.fixture
def rng(request):
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(sum(request.node.name.encode()))


@pytest.mark.parametrize("kind", ["decode", "few tokens", "prefill"])
@pytest.mark.parametrize("name", CASES)
def test_hook(rng, device, name, kind):
    case = CASES[name]
    run = dict(variant_args=case.args)
    check(rng, kind, device, reference(case), spec=dict(variant=case.variant()), run=run)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("decode", "few tokens", "prefill")])
def test_all_hooks(rng, device, kind):
    case = CASES["all"]
    run = dict(variant_args=case.args)
    check(rng, kind, device, reference(case), spec=dict(variant=case.variant()), run=run)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["all", "weights"])
def test_16_bit(rng, device, name, dtype):
    case = CASES[name]
    run = dict(variant_args=case.args)
    for kind in ("decode", "prefill"):
        spec = dict(variant=case.variant())
        check(rng, kind, device, reference(case), spec=spec, run=run, dtype=dtype)


def test_float8_and_a_window(rng, device):
    case = CASES["all"]
    check(
        rng,
        "few tokens",
        device,
        reference(case, k_scale=0.5, v_scale=2.0),
        spec=dict(variant=case.variant(), kv_dtype="float8_e4m3fn"),
        run=dict(variant_args=case.args, k_scale=0.5, v_scale=2.0),
        dtype="bfloat16",
        window_left=30,
    )


def test_after_the_built_ins(rng, device):
    """Cap, ALiBi and sink come before the hooks of their places; rotary before query and key."""
    case = CASES["all"]
    sinks = np.linspace(-1, 1, 8, dtype=np.float32)
    run = dict(variant_args=case.args, sinks=sinks)
    for spec, built_in in (
        (dict(pos_encoding="ALIBI"), dict(alibi=True)),
        (dict(pos_encoding="ROPE"), dict(rope=(1e4, 1.0))),
    ):
        spec = dict(spec, variant=case.variant(), logits_soft_cap=3.0, sinks=True)
        want = reference(case, soft_cap=3.0, sinks=sinks, **built_in)
        check(rng, "few tokens", device, want, spec=spec, run=run)
    case = CASES["mask"]
    spec = dict(variant=case.variant(), weights="sigmoid")
    run = dict(variant_args=case.args)
    check(rng, "few tokens", device, reference(case, sigmoid=True), spec=spec, run=run)


def test_masked_values_do_not_reach_the_result(device):
    """A key that the mask hides may hold NaN and infinity, in V on the CPU alone: a GPU multiplies
    its V with a weight of 0."""
    source = """
bool raddle_variant_mask(const raddle_variant *v, const raddle_row *row, int32_t kv_index) {
    return kv_index % 3 != v->hidden;
}
"""
    hidden = raddle.Variant("hidden", source, scalars=(("hidden", "int32"),))
    rng = np.random.default_rng(3)
    shape = (8, 2, 16, 2, 64)
    clean = rng.standard_normal(shape).astype(np.float16)
    dirty = clean.copy()
    bad = np.arange(128).reshape(8, 16) % 3 == 1
    by_token = dirty.transpose(0, 2, 1, 3, 4)
    by_token[bad] = np.where(rng.random(64) < 0.5, np.nan, np.inf)
    if device == "cuda":
        by_token[..., 1, :, :][bad] = 65504.0
    # 120 keys for one query token each, and for 40 of the same request.
    for num_tokens in (1, 40):
        plan = raddle.attention.BatchPrefill(
            num_qo_heads=4,
            num_kv_heads=2,
            head_dim=64,
            page_size=16,
            max_batch=1,
            max_pages=8,
            max_qo_tokens=num_tokens,
            dtype="float16",
            variant=hidden,
            device=device,
        )
        indptrs = np.array([0, num_tokens]), np.array([0, 8])
        plan.plan(*indptrs, np.arange(8), np.array([8]))
        q = raddle.tensor(rng.standard_normal((num_tokens, 4, 64)).astype("f2"), device=device)
        outs = [
            plan.run(q, raddle.tensor(cache, device=device), variant_args=dict(hidden=1))
            .to("cpu")
            .numpy()
            for cache in (clean, dirty)
        ]
        np.testing.assert_allclose(outs[1], outs[0], rtol=2e-3, atol=2e-3)


def test_a_hook_may_write(rng, device):
    """Every logit of every row, where it belongs and nowhere else."""
    source = """
float raddle_variant_logit(const raddle_variant *v, const raddle_row *row, int32_t kv_index,
                           float logit) {
    v->dump.data[row->token * v->dump.stride[0] + row->qo_head * v->dump.stride[1] +
                 kv_index * v->dump.stride[2]] = logit;
    return logit;
}
"""
    kind = Kind((40, 0, 3, 17), (2, 1, 1, 3))
    dump = raddle.tensor(np.full((7, 8, 50), np.nan, np.float32), device=device)
    seen = []

    def record(row, keys, logits):
        seen.append((row.token, row.qo_head, keys, logits))
        return logits

    variant = raddle.Variant("dump", source, tensors=(("dump", "float32", "w"),))
    run = dict(variant_args=dict(dump=dump))
    check(rng, kind, device, dict(logit=record), spec=dict(variant=variant), run=run)
    want = np.full((7, 8, 50), np.nan)
    for token, head, keys, logits in seen:
        want[token, head, keys] = logits
    np.testing.assert_allclose(dump.to("cpu").numpy(), want, rtol=2e-3, atol=2e-3)


def test_results_do_not_depend_on_how_rows_are_cut(rng):
    """The same hooks, chunk by chunk, split over workers, and on one."""
    case = CASES["all"]
    outs = []
    for options in (dict(max_ctas=1), dict(max_ctas=2), dict(fixed_chunk=64)):
        kind = Kind((700, 30), (3, 2), True, limits=(("max_qo_len", 3),))
        spec = dict(variant=case.variant(), max_ctas=options.get("max_ctas", 0))
        kind = Kind(**{**kind.__dict__, "fixed_chunk": options.get("fixed_chunk", 0)})
        same = np.random.default_rng(11)
        run = dict(variant_args=case.args)
        outs.append(check(same, kind, "cpu", reference(case), spec=spec, run=run)[0])
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], rtol=1e-4, atol=1e-4)


# -- what is wrong --------------------------------------------------------------------------------

PLAN = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16, max_batch=1, max_pages=4)
PLAIN = "float raddle_variant_output(const raddle_variant *v, const raddle_row *row, int32_t dim,\n"


def make_plan(device, variant, **words):
    return BatchDecode(**{**PLAN, "dtype": "float16", "device": device, **words}, variant=variant)


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        ("                            float x) {\n    return x +;\n}\n", 3, ""),
        ("                            float x) {\n    return x * v->gain;\n}\n", 3, "gain"),
        (
            "                            float x) {\n\n    return frobnicate(x);\n}\n",
            4,
            "frobnicate",
        ),
        (
            "                            float x, int y) {\n    return x;\n}\n",
            1,
            "raddle_variant_output",
        ),
    ],
)
def test_a_compile_error_names_file_and_line(device, body, line, message):
    if device == "cuda" and line == 1:
        pytest.skip("NVRTC takes another signature for another function and fails at the call")
    variant = raddle.Variant("broken", PLAIN + body, filename="my_variant.c")
    with pytest.raises(CompileError, match=rf"my_variant\.c[:(]{line}\b.*{message}") as caught:
        make_plan(device, variant)
    assert "broken" in str(caught.value) or device == "cuda"
    assert f"my_variant.c:{line}" in caught.value.log or f"my_variant.c({line})" in caught.value.log


def test_the_name_stands_in_for_the_file(device):
    with pytest.raises(CompileError, match=r"no_file[:(]1\b"):
        make_plan(device, raddle.Variant("no_file", "bool raddle_variant_mask(int x) { nonsense }"))


GAIN = PLAIN + "float x) {\n    return x * v->gain * v->table.data[dim];\n}\n"


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (None, ArgumentError, "variant_args"),
        (dict(gain=1.0), ArgumentError, "table"),
        (dict(table="table"), ArgumentError, "gain"),
        (dict(gain=1.0, table="table", other=2), ArgumentError, "other"),
        (dict(gain="high", table="table"), (ArgumentError, TypeError), "gain"),
        (dict(gain=1.0, table="halves"), DTypeError, "table"),
        (dict(gain=1.0, table="deep"), ShapeError, "table"),
        (dict(gain=1.0, table=3.0), (ArgumentError, TypeError), "table"),
    ],
)
def test_runs_refuse_other_arguments(device, args, error, message):
    variant = raddle.Variant("gain", GAIN, tensors=("table",), scalars=("gain",))
    plan = make_plan(device, variant)
    plan.plan(np.array([0, 1]), np.array([0]), np.array([3]))
    q = raddle.tensor(np.zeros((1, 4, 64), np.float16), device=device)
    cache = raddle.tensor(np.zeros((1, 2, 16, 2, 64), np.float16), device=device)
    arrays = dict(
        table=np.ones(64, np.float32),
        halves=np.ones(64, np.float16),
        deep=np.ones((1, 1, 1, 1, 64), np.float32),
    )
    if args is not None:
        args = {
            name: raddle.tensor(arrays[x], device=device) if name == "table" and x in arrays else x
            for name, x in args.items()
        }
    with pytest.raises(error, match=message):
        plan.run(q, cache, variant_args=args)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (dict(name="two words"), ArgumentError, "name"),
        (dict(source="int x;"), ArgumentError, "no hook"),
        (
            dict(source="float raddle_variant_logits(float x) { return x; }"),
            ArgumentError,
            "logits",
        ),
        (dict(tensors=("1st",)), ArgumentError, "1st"),
        (dict(tensors=("a", "a")), ArgumentError, "twice"),
        (dict(tensors=(("a", "float64"),)), DTypeError, "float64"),
        (dict(tensors=(("a", "float32", "x"),)), ArgumentError, "access"),
        (dict(tensors=tuple("abcdefghi")), CapacityError, "at most 8"),
        (dict(scalars=(("a", "int64"),)), DTypeError, "int64"),
        (dict(filename='a"b.c'), ArgumentError, "filename"),
    ],
)
def test_variants_refuse(words, error, message):
    words = {"name": "fine", "source": PLAIN + "float x) { return x; }", **words}
    with pytest.raises(error, match=message):
        raddle.Variant(words.pop("name"), words.pop("source"), **words)


def test_a_comment_is_no_hook():
    source = PLAIN + "float x) { /* not raddle_variant_frob(x) */ return x; } // raddle_variant_x("
    raddle.Variant("fine", source)


def test_state_needs_a_softmax():
    with pytest.raises(ArgumentError, match="state"):
        raddle.Variant("wrong", CASES["state"].source, tensors=("sink",), softmax=False)


def test_pairs_need_a_multiple_of_16(device):
    with pytest.raises(ShapeError, match="multiple of 16"):
        make_plan(device, CASES["query"].variant(), head_dim=72)


def test_no_lse_without_a_softmax(device):
    plan = make_plan(device, CASES["weights"].variant())
    plan.plan(np.array([0, 1]), np.array([0]), np.array([3]))
    q = raddle.tensor(np.zeros((1, 4, 64), np.float16), device=device)
    cache = raddle.tensor(np.zeros((1, 2, 16, 2, 64), np.float16), device=device)
    seen = raddle.tensor(np.ones((1, 64), bool), device=device)
    with pytest.raises(UnsupportedError, match="lse"):
        plan.run(q, cache, variant_args=dict(seen=seen), return_lse=True)
