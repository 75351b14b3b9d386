"""The plan of a batch job: orders that are made anew, lengths that are learnt, what is left; the
engine's counters that go with it.

Needs: safetensors, tokenizers, jinja2.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
from raddle.blend import CostModel, Requests, Scheduler, order, policy_names, simulate
from raddle.engine import Engine, SamplingParams
from raddle.engine.plan import Limits, Plan, cost_of
from raddle.engine.prompt import check_request
from raddle.errors import ArgumentError, DTypeError, ShapeError

from tests.batch_cases import COST, make_engine, model

pytest.importorskip("safetensors", reason="needs safetensors: not installed")
pytest.importorskip("tokenizers", reason="needs tokenizers: not installed")
pytest.importorskip("jinja2", reason="needs jinja2: not installed")

__all__ = ["model"]  # a fixture


# ---- plans


def random_plan(rng, policy, num_lines=300, **options):
    counts = [rng.choice([0, 1, 1, 1, 3]) for _ in range(num_lines)]
    begin = np.concatenate([[0], np.cumsum(counts)])
    waits = [count > 0 and rng.random() < 0.8 for count in counts]
    total = int(begin[-1])
    lengths = np.array([rng.randrange(1, 200) for _ in range(total)], np.int32)
    blocks = lengths // 16
    ids = [hash((i % 9 if k < 3 else i, k)) for i in range(total) for k in range(blocks[i])]
    arrays = {
        "block_size": 16,
        "input_lengths": lengths,
        "max_tokens": np.full(total, 400, np.int32),
        "hash_ids": np.array(ids, np.int64),
        "indptr": np.concatenate([[0], np.cumsum(blocks)]),
    }
    plan = Plan(arrays, begin, waits, COST, Limits(16, 256, 20_000), policy=policy, **options)
    return plan, begin, waits


@pytest.mark.parametrize("policy", policy_names())
def test_replans_neither_lose_nor_repeat_a_line(policy):
    rng = random.Random(7)
    plan, begin, waits = random_plan(rng, policy)
    given, running, plans = [], [], []
    while True:
        if plan.is_due or rng.random() < 0.02:
            plan.make([(r, rng.randrange(400)) for r in running])
            plans.append(len(given))
        if len(running) < 16 and (new := plan.next()) is not None:
            given.append(new)
            running += range(begin[new], begin[new + 1])
        elif running:
            request = running.pop(rng.randrange(len(running)))
            plan.end(request, rng.choice([0, *range(1, 30)]))
        else:
            break
    assert sorted(given) == [i for i, is_waiting in enumerate(waits) if is_waiting]
    assert len(plans) > 3 and plan.seconds_left == 0 and plan.num_plans == len(plans) + 1


def test_a_plan_of_nothing():
    arrays = {name: np.zeros(0, np.int32) for name in ("input_lengths", "max_tokens", "hash_ids")}
    arrays |= {"block_size": 16, "indptr": np.zeros(1, np.int64)}
    arrays["hash_ids"] = arrays["hash_ids"].astype(np.int64)
    plan = Plan(arrays, [0], [], COST, Limits(16, 256, 20_000))
    assert plan.next() is None and plan.seconds_left == 0 and plan.bound_seconds() == 0


def test_what_ends_counts_for_what_is_left():
    """Before anything ended max_tokens is all that is known; a sample of short answers changes it.
    Failures say nothing of lengths. seconds_left falls to nothing, and never rises in between."""
    count = 1000
    arrays = {
        "block_size": 16,
        "input_lengths": np.full(count, 100, np.int32),
        "max_tokens": np.full(count, 400, np.int32),
        "hash_ids": np.zeros(0, np.int64),
        "indptr": np.zeros(count + 1, np.int64),
    }
    plan = Plan(
        arrays, range(count + 1), [True] * count, COST, Limits(16, 256, 20_000), sample_rate=0.1
    )

    def simulated(outputs):
        known = Requests(**arrays, output_lengths=np.full(count, outputs, np.int32))
        return simulate(known, COST, pool_tokens=16 * (100 + outputs), step_tokens=256).seconds

    assert plan.seconds_left == pytest.approx(simulated(400), rel=1e-6)
    sample = [plan.next() for _ in range(100)]
    for i, request in enumerate(sample):
        assert not plan.is_due
        before = plan.seconds_left
        plan.end(request, 20 if i % 2 else 0)
        assert plan.seconds_left < before
        plan.end(request, 400)  # a second time: not heard
    assert plan.is_due
    plan.make()
    assert not plan.is_due
    assert plan.seconds_left == pytest.approx(simulated(20) * 0.9, rel=0.02)
    due = []
    for ended in range(101, count + 1):
        plan.end(plan.next(), 20)
        if plan.is_due:
            due.append(ended)
            plan.make()
    assert due == [200, 400, 800]
    assert plan.seconds_left == 0 and plan.num_plans == 5


def test_plans_look_at_what_runs():
    """Short answers end first: those that run on tell that there are long ones."""
    seconds = []
    for so_far in (0, 300):
        plan, begin, _ = random_plan(random.Random(1), "paced", sample_rate=0)
        lines = [plan.next() for _ in range(100)]
        requests = [r for i in lines for r in range(begin[i], begin[i + 1])]
        for request in requests[:70]:
            plan.end(request, 5)
        plan.make([(request, so_far) for request in requests[70:]])
        seconds.append(plan.seconds_left)
    assert seconds[1] > 3 * seconds[0]


def test_policies_that_ask_for_no_lengths_need_no_sample(model, tmp_path):
    """Whatever outputs are thought to be, their order is the same; that of others is not."""
    rng = random.Random(3)
    lengths = np.array([rng.randrange(1, 300) for _ in range(200)], np.int32)
    for name in policy_names():
        plan, *_ = random_plan(random.Random(2), name)
        orders = set()
        for _ in range(4):
            outputs = np.array([rng.randrange(1, 300) for _ in range(200)], np.int32)
            known = Requests(block_size=16, input_lengths=lengths, output_lengths=outputs)
            orders.add(tuple(order(known, COST, name, pool_tokens=9000).tolist()))
        is_blind = len(orders) == 1
        assert is_blind == (plan._first is None), name


def test_the_bound_is_that_of_what_ended():
    plan, begin, waits = random_plan(random.Random(5), "paced")
    assert plan.bound_seconds() == 0
    rows = []
    while (i := plan.next()) is not None:
        for request in range(begin[i], begin[i + 1]):
            plan.end(request, 0 if request % 3 == 0 else 10)
            rows += [request] if request % 3 else []
    part = plan._part(np.sort(rows), np.full(begin[-1], 10, np.int32))
    totals = part.prompt_tokens + 10 * len(rows)
    pool = min(20_000, int(16 * totals / len(rows)))
    expected = simulate(part, COST, "fcfs", pool_tokens=pool, step_tokens=256).bound_seconds
    assert plan.bound_seconds() == pytest.approx(expected)


# ---- costs, counters, guesses


def test_work_of_steps_is_that_of_the_cost_model(model, tmp_path):
    """Summed up over a job it is what requests do: tokens, scores and reads in closed form."""
    engine = Engine.from_folder(model, max_batch=8, kv_memory_bytes=4 << 20, prefix_cache=False)
    total = np.zeros(3)
    prompts = ["x" * n for n in (1, 5, 40, 90, 200)]
    for i, prompt in enumerate(prompts):
        params = SamplingParams(n=1 + i % 2, max_tokens=i + 1, ignore_eos=True)
        engine.add_request(prompt, params)
    while engine.has_work:
        engine.step()
        total += engine.last_work
    expected = np.zeros(3)
    for i, prompt in enumerate(prompts):
        p, d, n = len(check_request(engine, prompt, SamplingParams())), i + 1, 1 + i % 2
        expected += p, p * (p + 1) // 2, 0
        expected += n * (d - 1), 0, n * sum(p + k for k in range(1, d))
    assert total.tolist() == expected.tolist()


def test_step_seconds_are_those_of_blend():
    rates = {"gemm_rate": [1e10, 2e11, 2e11], "rate_tokens": [1, 64, 100], "overhead": 1e-4}
    cost = CostModel(**{**COST.to_dict(), **rates})
    requests = Requests(
        block_size=16,
        input_lengths=np.arange(1, 120, dtype=np.int32),
        output_lengths=np.arange(1, 120, dtype=np.int32)[::-1].copy(),
    )
    scheduler = Scheduler(requests, cost, pool_tokens=2000, step_tokens=300)
    left = dict(enumerate(requests.output_lengths.tolist()))
    decoding, num_steps = set(), 0
    while not scheduler.done:
        step = scheduler.step()
        found = cost.step_seconds(step.tokens, step.scores, step.reads)
        assert found == pytest.approx(step.seconds, rel=1e-12)
        decoding -= set(step.preempted.tolist())
        decoding |= set(step.chunk_request[step.chunk_is_last].tolist())
        for request in decoding:
            left[request] -= 1
        ended = [request for request in decoding if left[request] == 0]
        decoding -= set(ended)
        scheduler.retire(ended)
        num_steps += 1
    assert num_steps > 20


def test_cost_of(model, tmp_path):
    engine = make_engine(model)
    path, cost = tmp_path / "cost.json", cost_of(engine)
    replace(cost, alpha=0.2).save(path)
    assert cost_of(engine, path) == cost_of(engine, str(path)) == cost and cost.alpha == 1.0
    COST.save(path)
    with pytest.raises(ArgumentError, match="it was measured for another model"):
        cost_of(engine, path)
    rates = tmp_path / "rates.json"
    rates.write_text('{"gemm_rate": 1e12, "read_rate": 1e11, "alpha": 0}')
    ours = cost_of(engine, str(rates))
    assert ours == replace(CostModel.from_config(model, str(rates)), alpha=1.0)
    assert ours.gemm_rate == (1e12,) and cost_of(engine).flops_per_token == ours.flops_per_token
    assert cost_of(engine, "a100").read_rate == 1.73e12
    with pytest.raises(ArgumentError, match="hardware: 'none' is neither one of a100, h100 nor"):
        cost_of(engine, "none")


def test_what_a_guess_refuses():
    nine = np.full(3, 9)
    requests = Requests(block_size=16, input_lengths=nine, max_tokens=nine)
    seen, none = np.array([-1, 4, -1]), np.zeros(3, np.int32)
    found = requests.guess(seen, np.array([7, 0, 0]))
    assert found[1] == 4 and 8 <= found[0] <= 9 and 1 <= found[2] <= 9
    for bad, so_far, error, message in (
        (seen, [0, 0], ShapeError, "so_far"),
        (seen, none.astype("f4"), DTypeError, "so_far"),
        (
            seen,
            np.array([9, 0, 0]),
            ArgumentError,
            r"than max_tokens \(9\); got 9 .request 0",
        ),
        (seen, np.array([0, 0, -1]), ArgumentError, "so_far: .* got -1 .request 2"),
        (np.array([-1, 10, -1]), none, ArgumentError, "seen: expected 1 to max_tokens"),
        (seen[:2], none, ShapeError, "seen"),
    ):
        with pytest.raises(error, match=message):
            requests.guess(bad, np.asarray(so_far))
