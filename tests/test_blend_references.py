"""The parts of raddle.blend that decide, held against brute force on random trees: the tree itself,
sums and densities over its nodes, guessed lengths, the bound, orders, replicas; and the examples
that the paper works out.

Needs: numpy, a C compiler (the core is asked for what Python does not see).
"""

import numpy
import pytest
from raddle import _core
from raddle.blend import CostModel, Requests, order, partition
from raddle.blend.cost import LLAMA_3_8B

from tests import blend_native, blend_trees
from tests.blend_native import Probe
from tests.blend_trees import case
from tests.reference import blend as reference

PEAKS = CostModel.from_config(
    LLAMA_3_8B, {"gemm_rate": 312e12, "read_rate": 2.039e12, "alpha": 0.45}
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return blend_native.build(tmp_path_factory.mktemp("probe"))


def probe_of(library, own, **changes):
    return Probe(library, own.block, own.rows, own.cost, **changes)


def trie_of(own):
    return reference.Trie([ids for _, _, ids in own.rows])


# -- the tree -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [range(0, 60), range(60, 120)])
def test_trees(library, seeds):
    for seed in seeds:
        own = case(seed)
        trie, expected = trie_of(own), trie_of(own).preorder()
        with probe_of(library, own) as probe:
            nodes, walk, shared_before, shared = probe.tree()
        assert len(nodes) == len(expected) == len(trie.nodes)
        assert walk.tolist() == trie.order()
        places = {prefix: k for k, (prefix, _) in enumerate(expected)}
        found = trie.shared_before()
        for (prefix, parent), row in zip(expected, nodes.tolist(), strict=True):
            assert row[0] == (-1 if parent is None else places[parent])
            assert row[2] == len(prefix)
            assert sorted(walk[row[3] : row[4]].tolist()) == trie.below.get(prefix, [])
            inside = [other for other in trie.nodes if other[: len(prefix)] == prefix]
            assert row[1] - places[prefix] == len(inside)
        assert shared_before.tolist() == [found[i] for i in walk.tolist()]
        assert shared.tolist() == [trie.shared(i) for i in walk.tolist()]
        requests = own.requests()
        assert requests.distinct_blocks == trie.distinct
        assert requests.shared_tokens == (requests.num_blocks - trie.distinct) * own.block


def test_tokens_make_the_same_tree():
    """Blocks of tokens are equal where the tokens are; what is left of a prompt is its own."""
    for seed in range(20):
        rng = numpy.random.default_rng(seed)
        block = int(rng.choice([1, 2, 3, 16]))
        prompts = [rng.integers(0, 2, int(rng.integers(1, 12))).tolist() for _ in range(40)]
        at = int(rng.integers(0, block))  # blocks differ in one token, wherever it is
        prompts = [[t if k == at else 0 for t in p for k in range(block)] for p in prompts]
        prompts = [p[: max(len(p) - int(rng.integers(0, block)), 1)] for p in prompts]
        indptr = numpy.cumsum([0, *map(len, prompts)])
        tokens = numpy.array([t for p in prompts for t in p], numpy.int32)
        requests = Requests(block_size=block, tokens=tokens, indptr=indptr)
        paths = [
            [tuple(p[i : i + block]) for i in range(0, len(p) - block + 1, block)] for p in prompts
        ]
        trie = reference.Trie(paths)
        assert requests.distinct_blocks == trie.distinct
        assert requests.num_blocks == sum(map(len, paths))
        walk = order(requests, PEAKS, "dfs", pool_tokens=10**9)
        assert walk.tolist() == trie.order()


# -- moments and densities ----------------------------------------------------------------------


def works_of(own, lengths=None):
    """(computing, reading) seconds of each request in a walk through the tree."""
    found = trie_of(own).shared_before()
    result = []
    for i, (prompt, output, _) in enumerate(own.rows):
        mean, square = (output, output**2) if lengths is None else lengths[i][:2]
        work = reference.expected_work(prompt, found[i] * own.block, mean, square)
        result.append((*reference.plain_seconds(own.cost, work), work[0]))
    return numpy.array(result)


def likely_lengths(own, seed):
    """[count][mean, square, room] as float32 has them."""
    rng = numpy.random.default_rng(seed)
    mean = rng.uniform(1, 300, len(own.rows)).astype(numpy.float32)
    square = (mean * mean * rng.uniform(1, 3, len(mean))).astype(numpy.float32)
    return numpy.stack([mean, square, numpy.ceil(mean)], axis=1).astype(float)


@pytest.mark.parametrize("is_known", [True, False])
def test_moments_of_nodes(library, is_known):
    """Computing and reading below every node, hence its density: shared prefixes computed once,
    read by each; of lengths that are guessed, two moments."""
    for seed in range(200, 250):
        own = case(seed)
        trie, lengths = trie_of(own), None if is_known else likely_lengths(own, seed)
        with probe_of(library, own) as probe:
            nodes, *_ = probe.tree()
            compute, read, tokens = probe.sums(lengths)
        works = works_of(own, lengths)
        assert tokens == pytest.approx(works[:, 2].sum(), rel=1e-6)
        for (prefix, _), row in zip(trie.preorder(), nodes.tolist(), strict=True):
            below = trie.below.get(prefix, [])
            for sums, column in ((compute, 0), (read, 1)):
                expected = works[below, column].sum()
                is_near = pytest.approx(expected, rel=1e-6, abs=1e-9 * sums[-1])
                assert sums[row[4]] - sums[row[3]] == is_near


def test_densities_of_requests(library):
    """As the paper has it: p d + d^2 / 2 tokens of K and V are read."""
    for seed in range(300, 330):
        own = case(seed)
        lengths = likely_lengths(own, seed)
        with probe_of(library, own) as probe:
            for i, (prompt, output, ids) in enumerate(own.rows):
                cached = len(ids) // 2 * own.block
                for known in (None, lengths):
                    mean, square = (output, output**2) if known is None else known[i][:2]
                    tokens, scores, _ = reference.expected_work(prompt, cached, mean, square)
                    work = tokens, scores, prompt * mean + square / 2
                    compute, read = reference.plain_seconds(own.cost, work)
                    found = probe.density(i, cached, known)
                    assert found == pytest.approx(compute / read, rel=1e-6)


# -- guessed lengths ----------------------------------------------------------------------------


def under_way(seed):
    """Groups that are whole subtrees, or lie across them; some ended, some give tokens."""
    own, rng = case(seed, longest=100), numpy.random.default_rng(seed)
    count = len(own.rows)
    groups = rng.integers(0, 4, count)
    if seed % 2:
        groups = numpy.array([hash(tuple(ids[:1])) % 4 for _, _, ids in own.rows])
    has_ended = rng.random(count) < rng.choice([0, 0.1, 0.6, 1], 4)[groups]
    has_begun = rng.random(count) < rng.choice([0, 0.5, 1], 4)[groups]
    outputs = numpy.array(own.outputs)
    so_far = numpy.where(has_begun, rng.integers(0, outputs + 1), 0)  # some outlive what they said
    so_far += (rng.random(count) < 0.1) * rng.integers(0, 40, count) * has_begun
    seen = numpy.where(has_ended, outputs, -1)
    most = numpy.maximum(outputs, so_far) + rng.integers(0, 60, count)
    return own, groups.tolist(), most.tolist(), seen.tolist(), so_far.tolist()


@pytest.mark.parametrize("has_begun", [False, True])
def test_guesses(library, has_begun):
    """By the group's survival curve and down the tree, some requests under way."""
    for seed in range(400, 520):
        own, groups, most, seen, so_far = under_way(seed)
        so_far = so_far if has_begun else [0] * len(seen)
        with probe_of(library, own, most=most, groups=groups) as probe:
            found = probe.guess(seen, so_far)
            if not has_begun:
                assert (probe.guess(seen) == found).all()
        paths = [ids for _, _, ids in own.rows]
        expected = reference.guess(paths, groups, most, seen, so_far)
        for (mean, square, room), (own_mean, own_square, own_room) in zip(expected, found.tolist()):
            assert own_mean == pytest.approx(mean, rel=1e-5)
            assert own_square == pytest.approx(square, rel=1e-5)
            assert numpy.ceil(room * (1 - 1e-9)) <= own_room <= numpy.ceil(room * (1 + 1e-9))


# -- the bound ----------------------------------------------------------------------------------


def test_bounds(library):
    for seed in range(600, 680):
        own = case(seed)
        work, least = reference.survey(own.rows, own.block, own.pool, own.step_tokens)
        with probe_of(library, own) as probe:
            found, found_least, bound = probe.survey(own.pool, own.step_tokens)
        assert found == pytest.approx(work, rel=1e-6)  # lengths are of 24 bits there
        assert found_least == pytest.approx(least, rel=1e-6)
        assert bound == pytest.approx(reference.bound_seconds(own.cost, work, least), rel=1e-5)


# -- orders -------------------------------------------------------------------------------------


def test_orders_of_blend_by_density(library):
    """Wherever a node stands in one piece, what it has stands there by density, densest first."""
    checked = 0
    for seed in range(700, 760):
        own, trie = case(seed), trie_of(case(seed))
        works = works_of(own)
        with probe_of(library, own) as probe:
            (found,) = probe.plan("blend", own.pool, own.step_tokens)
        place = {i: k for k, i in enumerate(found)}
        assert sorted(found) == list(range(len(own.rows)))

        def is_whole(requests, place=place):
            places = [place[i] for i in requests]
            return not places or max(places) - min(places) == len(places) - 1

        for prefix, _ in trie.preorder():
            parts = [[i] for i in trie.own(prefix)] + [trie.below[c] for c in trie.children(prefix)]
            if not is_whole(trie.below.get(prefix, [])) or not all(map(is_whole, parts)):
                continue
            parts.sort(key=lambda part: place[part[0]])
            sums = [works[part, :2].sum(axis=0) for part in parts]
            for (compute, read), (next_compute, next_read) in zip(sums, sums[1:]):
                assert compute * next_read >= next_compute * read * (1 - 1e-6)
                checked += 1
    assert checked > 500


def test_balance_deals_evenly(library):
    for seed in range(800, 830):
        own = case(seed)
        seconds = []
        for prompt, output, _ in own.rows:
            work = reference.expected_work(prompt, 0, output, output**2)
            seconds.append(reference.plain_seconds(own.cost, work))
        with probe_of(library, own) as probe:
            streams = probe.plan("balance", own.pool, own.step_tokens)
        assert sorted(i for stream in streams for i in stream) == list(range(len(own.rows)))
        density = [compute / read if read else numpy.inf for compute, read in seconds]
        whole, largest = numpy.sum(seconds), max(map(sum, seconds))
        for k, stream in enumerate(streams):
            assert stream == sorted(stream)  # as they came
            assert numpy.sum([seconds[i] for i in stream]) <= whole / 32 + largest + 1e-12
            before = min(density[i] for i in streams[k - 1]) if k else numpy.inf
            assert max(density[i] for i in stream) <= before * (1 + 1e-6)


def test_strata_walk_depth_first(library):
    """And lose next to nothing: one token in two hundred."""
    for seed in range(900, 960):
        own, trie = case(seed), trie_of(case(seed))
        place = {i: k for k, i in enumerate(trie.order())}
        with probe_of(library, own) as probe:
            streams = probe.plan("paced", own.pool, own.step_tokens)
        assert sorted(place) == sorted(i for stream in streams for i in stream)
        for stream in streams:
            assert [place[i] for i in stream] == sorted(place[i] for i in stream)
        lost = sum(map(len, (blocks_of(own, s) for s in streams))) - trie.distinct
        assert 0 <= lost * own.block <= 0.005 * works_of(own)[:, 2].sum() * (1 + 1e-6)


def blocks_of(own, requests):
    """Prefixes of blocks that these have."""
    paths = [tuple(own.rows[i][2]) for i in requests]
    return {path[:depth] for path in paths for depth in range(1, len(path) + 1)}


# -- replicas -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [0.0, 0.2, 1.0])
def test_partitions(tail):
    """Each request has one place; what replicas compute again is counted block by block; the
    busiest is no less busy than it is."""
    for seed in range(1000, 1060):
        own, trie = case(seed), trie_of(case(seed))
        requests, replicas = own.requests(), int(numpy.random.default_rng(seed).integers(1, 9))
        dealt = partition(requests, own.cost, replicas, tail=tail)
        owners, shares = _core.blend_partition(
            requests._core, own.cost.to_dict(), replicas, tail, None
        )
        parts = [*dealt.parts, dealt.tail]
        assert len(parts) == replicas + 1
        assert sorted(numpy.concatenate(parts).tolist()) == list(range(len(own.rows)))
        place = {i: k for k, i in enumerate(trie.order())}
        for k, part in enumerate(parts):
            assert (owners.numpy()[part] == k).all()
            assert [place[i] for i in part.tolist()] == sorted(place[i] for i in part.tolist())
        works = works_of(own)
        again = [len(blocks_of(own, part.tolist())) for part in parts]
        assert shares["tokens_again"] == (sum(again) - trie.distinct) * own.block
        assert shares["tokens"] == pytest.approx(works[:, 2].sum(), rel=1e-6)
        expected = shares["tokens_again"] / max(shares["tokens"], 1)
        assert dealt.duplicated == pytest.approx(expected)
        assert (tail == 0) <= (dealt.tail.size == 0) and (tail < 1 or dealt.tail.size)
        if tail == 0:
            check_busiest(own, parts[:-1], works, shares["busiest"])
            assert dealt.speedup == pytest.approx(1 / shares["busiest"])


def check_busiest(own, parts, works, busiest):
    """Of computing, with the share of tokens that are computed again; of reading."""
    found = trie_of(own).shared_before()
    busy = 0.0
    whole = numpy.maximum(works.sum(axis=0), 1e-300)
    for part in parts:
        requests = part.tolist()
        had = sum(len(own.rows[i][2]) - found[i] for i in requests)
        again = (len(blocks_of(own, requests)) - had) * own.block / whole[2]
        compute, read, _ = works[requests].sum(axis=0) / whole
        busy = max(busy, compute + again, read)
    assert busy * (1 - 1e-6) <= busiest
    assert busiest >= 1 / len(parts) * (1 - 1e-6)


# -- what the paper works out -------------------------------------------------------------------

# (trace, prompt, output, tokens of the prompt that are shared, density in the paper, by hand): its
# table of traces, of which the means alone are known. At peak rates, without prefill attention.
TRACES = [
    ("WildChat", 496, 510, 0, 2.13, 2.1),
    ("Azure", 2508, 23, 0, 33.2, 35.0),
    ("MMLU", 804, 2, 695, 54.91, 56),  # 86.46 % are shared
    ("OpenVid, 16K", 121, 16000, 0, 0.096, 0.099),
]
LOOSE = [  # where the spread of lengths is missing, or the paper rounds
    ("OpenVid", 121, 43726, 0, 0.05, 0.037),
    ("LIMO", 109, 7617, 0, 0.14, 0.21),
    ("BurstGPT", 244, 27, 0, 17.78, 31),
]


def test_densities_of_the_trace_table(library):
    cost = CostModel(**{**PEAKS.to_dict(), "flops_per_score": 0})
    # What they follow from: 51.5 us for a token, 64.3 ns to read one, 29.4 ms to read 60 GB.
    assert cost.flops_per_token / 312e12 == pytest.approx(51.5e-6, rel=1e-3)
    assert cost.kv_bytes_per_token / 2.039e12 == pytest.approx(64.3e-9, rel=1e-3)
    assert 60e9 / 2.039e12 == pytest.approx(29.4e-3, rel=2e-3)
    for name, prompt, output, shared, paper, by_hand in TRACES + LOOSE:
        with Probe(library, 1, [(prompt, output, [])], cost) as probe:
            found = probe.density(0, shared)
        assert found == pytest.approx(by_hand, rel=0.03), name
        assert found == pytest.approx(paper, rel=0.06) or (name, prompt) in {x[:2] for x in LOOSE}
        computed = (prompt - shared + output - 1) * cost.flops_per_token / 312e12
        read = (prompt * output + output**2 / 2) * cost.kv_bytes_per_token / 2.039e12
        assert found == pytest.approx(computed / read, rel=1e-6)


def test_memory_partition_of_the_paper(library):
    """Figure 6: 60 GB at root density 1.27 between ends of 3.73 and 0.096: 19.3 and 40.7."""
    ends = [(3.73, 244, 27, 244 + 13.5), (0.096, 121, 16000, 121 + 8000)]
    (left, left_budget), (right, right_budget) = blend_native.share_out(library, 1.27, 60, ends)
    assert left == pytest.approx(19.3, abs=0.1) and right == pytest.approx(40.7, abs=0.1)
    assert left + right == pytest.approx(60)
    assert left * 3.73 + right * 0.096 == pytest.approx(60 * 1.27)
    # Per side N = M / (p + d / 2) requests, of which p / d tokens enter in a step.
    assert left_budget == pytest.approx(left / 257.5 * 244 / 27)
    assert right_budget == pytest.approx(right / 8121 * 121 / 16000)
    for seed in range(100):
        rng = numpy.random.default_rng(seed)
        root, dense, sparse = rng.uniform(0.01, 10, 3)
        ends = [(dense, 1, 1, 1), (sparse, 1, 1, 1)]
        shares = blend_native.share_out(library, root, 100, ends)
        assert shares.min() >= 0 and shares[:, 0].sum() == pytest.approx(100)
        if dense > root > sparse:
            mixed = (shares[:, 0] * (dense, sparse)).sum()
            assert mixed == pytest.approx(100 * root)


def test_cases_are_as_odd_as_they_claim():
    """The generator's own check: what the properties should meet, they meet."""
    cases = [case(seed) for seed in range(300)]
    assert {c.block for c in cases} == set(blend_trees.BLOCK_SIZES)
    assert any(c.pool == max(p + o for p, o, _ in c.rows) for c in cases)
    assert any(len(ids) > 60 for c in cases for _, _, ids in c.rows)
    assert any(p == o == 1 for c in cases for p, o, _ in c.rows)
    assert any(c.step_tokens == 1 for c in cases) and any(max(c.sources) > 900 for c in cases)
    assert any(len(ids) * c.block == p for c in cases for p, _, ids in c.rows)
    assert any(len(c.rows) == 1 for c in cases)
