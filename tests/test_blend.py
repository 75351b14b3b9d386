"""raddle.blend: requests in, times and orders out, against a trie and sums in plain Python.

Needs: numpy. The workloads of the README's numbers need the traces beside the checkout.
"""

import threading

import numpy
import pytest
from raddle import _core
from raddle.blend import Requests, compare, order, policy_names, simulate
from raddle.errors import ArgumentError, DTypeError, RaddleError

from tests.blend_cases import (
    BLOCK,
    COST,
    POOL,
    TRACES,
    hits_in_order,
    make,
    numbers,
    prefixes,
    random_rows,
    run,
    workload,
)

# -- what is counted ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_blocks_against_a_trie(seed):
    rows = random_rows(seed, 150)
    requests = make(rows)
    assert requests.num_requests == 150 and requests.block_size == BLOCK
    assert requests.num_blocks == sum(len(ids) for _, _, ids in rows)
    assert requests.distinct_blocks == len(prefixes(rows))
    assert requests.prompt_tokens == sum(length for length, _, _ in rows)
    assert requests.shared_tokens == (requests.num_blocks - len(prefixes(rows))) * BLOCK
    assert requests.output_lengths.tolist() == [output for _, output, _ in rows]
    assert requests.output_lengths.dtype == numpy.int32
    assert not requests.has_unknown and requests.num_sources == 1


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_conserved(policy, seed):
    rows = random_rows(seed, 150)
    requests = make(rows)
    for pool in (2_000, POOL, 10**7):
        found = run(requests, policy, pool)
        assert found["prompt_tokens"] == sum(length for length, _, _ in rows)
        assert found["output_tokens"] == sum(output for _, output, _ in rows)
        computed = found["prompt_tokens"] - found["hit_tokens"] + found["output_tokens"]
        assert found["computed_tokens"] == computed - len(rows) + found["recomputed_tokens"]
        assert 0 < found["peak_tokens"] <= pool
        assert 0 < found["bound_seconds"] <= found["seconds"] * (1 + 1e-9)
        assert found["hit_tokens"] <= requests.shared_tokens
        assert found["planning_seconds"] >= 0


@pytest.mark.parametrize("policy", ["fcfs", "random", "dfs"])
@pytest.mark.parametrize("seed", range(3))
def test_hits_against_a_trie(policy, seed):
    """With room for everything, what is found is what came before in the order."""
    rows = random_rows(seed, 120)
    requests = make(rows)
    indices = order(requests, COST, policy, pool_tokens=10**7, seed=seed)
    found = run(requests, policy, 10**7, seed=seed)
    assert found["hit_tokens"] == hits_in_order(rows, indices.tolist())


@pytest.mark.parametrize("policy", policy_names())
def test_timeline_adds_up(policy):
    requests = make(random_rows(5, 400))
    found = run(requests, policy)
    line = simulate(requests, COST, policy, pool_tokens=POOL, step_tokens=512).timeline
    assert 1 <= len(line.seconds) <= 512
    assert line.seconds.sum() == pytest.approx(found["seconds"], rel=1e-9)
    assert line.steps.sum() == found["steps"]
    assert len(set(line.steps[:-1])) <= 1
    longer = numpy.maximum(line.compute_seconds, line.read_seconds)
    assert (line.seconds >= longer * (1 - 1e-9)).all()
    assert line.held_tokens.max() <= found["peak_tokens"]
    if not found["preemptions"]:
        assert line.prompt_tokens.sum() == found["prompt_tokens"]
        assert line.hit_tokens.sum() == found["hit_tokens"]


# -- orders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("merged", [True, False])
def test_orders_are_permutations(policy, merged):
    requests = make(random_rows(1, 333))
    indices = order(requests, COST, policy, pool_tokens=POOL, merged=merged)
    assert indices.dtype == numpy.int32
    assert sorted(indices.tolist()) == list(range(333))
    again = order(requests, COST, policy, pool_tokens=POOL, merged=merged)
    assert (again == indices).all()


def test_order_of_arrival():
    requests = make(random_rows(2, 50))
    assert order(requests, COST, "fcfs", pool_tokens=POOL).tolist() == list(range(50))


@pytest.mark.parametrize("seed", range(3))
def test_dfs_is_depth_first(seed):
    """Those that share a prefix stand together, whatever the prefix."""
    rows = random_rows(seed, 200)
    indices = order(make(rows), COST, "dfs", pool_tokens=POOL).tolist()
    for prefix in prefixes(rows):
        places = [k for k, i in enumerate(indices) if tuple(rows[i][2][: len(prefix)]) == prefix]
        assert places[-1] - places[0] == len(places) - 1


def test_seeds():
    requests = make(random_rows(3, 300), sources=numpy.arange(300) % 2)
    orders = [order(requests, COST, "random", pool_tokens=POOL, seed=s).tolist() for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    samples = [requests.sample(0.1, quota=20, seed=s).tolist() for s in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    assert numbers(run(requests, "random", seed=4)) == numbers(run(requests, "random", seed=4))


def test_merged_streams_keep_their_order():
    rows = random_rows(4, 500, sharing=False)
    requests = make(rows)
    streams = order(requests, COST, "paced", pool_tokens=10**6, merged=False).tolist()
    merged = order(requests, COST, "paced", pool_tokens=10**6).tolist()
    assert streams != merged
    # Strata differ in how much they read: one after the other, long outputs come together.
    outputs = numpy.array([output for _, output, _ in rows])
    halves = [outputs[indices[:250]].mean() / outputs.mean() for indices in (streams, merged)]
    assert abs(halves[1] - 1) < abs(halves[0] - 1)


# -- samples and unknown lengths ----------------------------------------------------------------


def test_sample():
    sources = numpy.array([0] * 200 + [3] * 5 + [1] * 95)
    requests = make(random_rows(6, 300), sources=sources)
    assert requests.num_sources == 4
    chosen = requests.sample(0.5, quota=10)
    counts = numpy.bincount(sources[chosen], minlength=4)
    assert counts.tolist() == [100, 48, 0, 5]
    assert chosen.dtype == numpy.int32 and (numpy.diff(chosen) > 0).all()
    assert len(requests.sample(0, quota=0)) == 0
    assert requests.sample(1, quota=0).tolist() == list(range(300))
    for rate in (-0.1, 1.5, float("nan")):
        with pytest.raises(ArgumentError, match="sample_rate"):
            requests.sample(rate)
    with pytest.raises(DTypeError, match="sample_rate"):
        requests.sample("all")
    with pytest.raises(ArgumentError, match="quota"):
        requests.sample(0.1, quota=-1)


@pytest.mark.parametrize("policy", policy_names())
def test_sampled_lengths(policy):
    requests = make(random_rows(7, 400), sources=numpy.arange(400) % 3)
    options = dict(pool_tokens=POOL, lengths="sample", sample_rate=0.05, seed=9)
    results = [simulate(requests, COST, policy, **options) for _ in range(2)]
    assert results[0].seconds == results[1].seconds >= results[0].bound_seconds
    everything = simulate(requests, COST, policy, **{**options, "sample_rate": 1.0})
    known = simulate(requests, COST, policy, pool_tokens=POOL)
    assert everything.bound_seconds == pytest.approx(known.bound_seconds)
    assert len(set(order(requests, COST, policy, **options).tolist())) == 400


def test_the_planner_is_not_told_what_it_guesses():
    """max_tokens is by default that of the source, so that a guess is not cut to the truth."""
    rows = random_rows(8, 300, sharing=False)
    sources = numpy.arange(300) % 2
    outputs = numpy.array([output for _, output, _ in rows])
    longest = numpy.array([outputs[sources == s].max() for s in (0, 1)])[sources]
    options = dict(pool_tokens=5_000, lengths="sample", sample_rate=0.1)
    found = [
        simulate(make(rows, sources=sources, max_tokens=most), COST, "paced", **options).seconds
        for most in (None, longest, outputs)
    ]
    assert found[0] == found[1] != found[2]


def test_unknown_outputs():
    rows = random_rows(8, 100)
    outputs = numpy.array([output for _, output, _ in rows])
    outputs[::3] = -1
    for unknown in (outputs, None):
        requests = make(rows, output_lengths=unknown)
        assert requests.has_unknown
        with pytest.raises(ArgumentError, match=r"output_length: .*request \d+ has none"):
            simulate(requests, COST, "fcfs", pool_tokens=10**8)
        for policy in policy_names():
            indices = order(requests, COST, policy, pool_tokens=10**8)
            assert sorted(indices.tolist()) == list(range(100))


# -- few requests -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", policy_names())
def test_no_requests(policy):
    empty = numpy.zeros(0, numpy.int32)
    for requests in (
        make([]),
        Requests(block_size=1, input_lengths=empty, output_lengths=empty),
        Requests(block_size=1, tokens=empty, indptr=numpy.zeros(1, numpy.int64)),
    ):
        assert requests.num_requests == requests.prompt_tokens == requests.shared_tokens == 0
        for lengths in ("known", "sample"):
            result = simulate(requests, COST, policy, pool_tokens=1, lengths=lengths)
            assert (result.seconds, result.tokens_per_s, result.share_of_bound) == (0, 0, 1)
            assert len(result.timeline.seconds) == 0
        assert order(requests, COST, policy, pool_tokens=1).tolist() == []


@pytest.mark.parametrize("policy", policy_names())
def test_one_request(policy):
    """By hand: one step of the prompt, then one token a step."""
    prompt, output = 100, 5
    result = simulate(make([(prompt, output, [1])]), COST, policy, pool_tokens=105)
    weights = COST.weight_bytes / COST.read_rate
    seconds = 0
    for step in range(output):
        tokens = prompt if step == 0 else 1
        compute = tokens * COST.flops_per_token / COST.gemm_rate[0]
        if step == 0:
            scores = prompt * (prompt + 1) / 2
            compute += scores * COST.flops_per_score / COST.attention_flops_rate
        held = 0 if step == 0 else prompt + step
        read = weights + held * COST.kv_bytes_per_token / COST.read_rate
        seconds += max(compute, read) + COST.alpha * min(compute, read)
    assert result.seconds == pytest.approx(seconds, rel=1e-12)
    assert result.tokens_per_s == pytest.approx((prompt + output) / seconds)
    assert (result.policy, result.hit_ratio, result.preemptions) == (policy, 0, 0)


# -- all policies, all threads --------------------------------------------------------------------


def test_threads_at_once():
    requests = make(random_rows(11, 2000))
    expected = [numbers(run(requests, name)) for name in policy_names()]
    found = {}

    def work(i):
        found[i] = [numbers(run(requests, name)) for name in policy_names()]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == [expected] * 4


def test_compare():
    requests = make(random_rows(12, 200))
    assert _core.blend_policy_names() == policy_names()
    assert len(set(policy_names())) == len(policy_names()) >= 5
    results = compare(requests, COST, pool_tokens=POOL)
    assert [result.policy for result in results] == list(policy_names())
    assert len({result.bound_seconds for result in results}) == 1
    for result in results:
        assert 0 < result.share_of_bound <= 1 + 1e-9 and 0 <= result.hit_ratio < 1
    assert [r.policy for r in compare(requests, COST, ["dfs"], pool_tokens=POOL)] == ["dfs"]
    with pytest.raises(RaddleError, match="policy"):
        compare(requests, COST, ["dfs", ""], pool_tokens=POOL)


# -- the workloads of the traces ----------------------------------------------------------------


@pytest.mark.parametrize(("name", "least", "sharing"), [("DH", 1.08, 0.428), ("SL", 1.12, 0.037)])
def test_paced_beats_dfs_on_real_traces(name, least, sharing):
    """At full size: it takes a second, and a sixteenth is mostly its end, with nothing to mix."""
    if not TRACES.is_dir():
        pytest.skip("needs traces: shared/traces does not stand beside the checkout")
    requests = Requests(**workload(name))
    assert requests.shared_tokens / requests.prompt_tokens == pytest.approx(sharing, abs=0.001)
    dfs, paced = compare(requests, COST, ["dfs", "paced"], pool_tokens=457_763)
    assert dfs.seconds / paced.seconds > least
    assert paced.share_of_bound > 0.9 and dfs.hit_ratio == pytest.approx(sharing, abs=0.001)
