"""Brute-force references for raddle.blend in plain Python: the tree of prefixes as a dict, sums
over requests one by one, the survival curve step by step, the bound by trying many step counts.
Slow, from the definitions, and sharing nothing with the C core."""

import math

import numpy

PRIOR = 8  # requests that a prior is worth
ROOM = 0.2  # of a group's lengths, the share that is longer than a request gets room for


class Trie:
    """Requests below every prefix. A node is a prefix where one of them ends, or they part."""

    def __init__(self, paths):
        self.paths = [tuple(path) for path in paths]
        self.below = {}  # prefix -> requests, as they came
        for i, path in enumerate(self.paths):
            for depth in range(len(path) + 1):
                self.below.setdefault(path[:depth], []).append(i)
        self.next_ids = {}  # prefix -> ids behind it, by who came first
        for prefix in self.below:
            if prefix:
                self.next_ids.setdefault(prefix[:-1], {})[prefix[-1]] = None
        self.distinct = len(self.below) - (() in self.below)
        self.nodes = {prefix for prefix in self.below if self.is_node(prefix)} | {()}

    def is_node(self, prefix):
        ends = any(len(self.paths[i]) == len(prefix) for i in self.below[prefix])
        return ends or len(self.next_ids.get(prefix, ())) > 1 or not prefix

    def own(self, prefix):
        """Requests that end here."""
        return [i for i in self.below.get(prefix, ()) if len(self.paths[i]) == len(prefix)]

    def children(self, prefix):
        """Nodes below, by who came first."""
        found = []
        for i in self.next_ids.get(prefix, ()):
            child = (*prefix, i)
            while child not in self.nodes:
                child = (*child, *self.next_ids[child])  # the only one
            found.append(child)
        return found

    def preorder(self):
        """(prefix, its parent) of all nodes, depth first."""
        stack, found = [((), None)], []
        while stack:
            prefix, parent = stack.pop()
            found.append((prefix, parent))
            stack += [(child, prefix) for child in reversed(self.children(prefix))]
        return found

    def order(self):
        return [i for prefix, _ in self.preorder() for i in self.own(prefix)]

    def shared(self, i):
        """Blocks that a request shares with any other."""
        path = self.paths[i]
        return max(d for d in range(len(path) + 1) if d == 0 or len(self.below[path[:d]]) > 1)

    def shared_before(self):
        """Of each request, blocks that it shares with those before it, depth first."""
        seen, found = set(), {}
        for i in self.order():
            path = self.paths[i]
            known = [d for d in range(1, len(path) + 1) if path[:d] in seen]
            found[i] = max(known, default=0)
            seen |= {path[:d] for d in range(1, len(path) + 1)}
        return found


def found_in_order(paths, block, prompts, order):
    """Tokens that each request finds, when they come in this order and nothing is forgotten."""
    seen, found = set(), {}
    for i in order:
        path = tuple(paths[i])
        known = max((d for d in range(1, len(path) + 1) if path[:d] in seen), default=0)
        found[i] = min(known * block, prompts[i] - 1)  # the last token is always computed
        seen |= {path[:d] for d in range(1, len(path) + 1)}
    return found


def most_found(paths, block, prompts):
    """(tokens that requests find at most, in the best order; that each finds in one that is).

    All but the first to have a block find it. A prompt that is found whole has its last token
    computed even so: of each node, those without a tail come first, so that one of them finds less.
    """
    trie = Trie(paths)
    order = []
    for prefix, _ in trie.preorder():
        order += sorted(trie.own(prefix), key=lambda i: (prompts[i] > len(paths[i]) * block, i))
    found = found_in_order(paths, block, prompts, order)
    bare = [tuple(p) for p, length in zip(paths, prompts) if length == len(p) * block]
    blocks = sum(map(len, paths)) - trie.distinct
    assert sum(found.values()) == blocks * block - (len(bare) - len(set(bare)))
    return sum(found.values()), found


# -- work and seconds ---------------------------------------------------------------------------


def work_of(prompt, found, output):
    """(tokens, scores, reads), token by token."""
    scores = sum(range(found + 1, prompt + 1))
    reads = sum(prompt + j for j in range(1, output))
    return prompt - found + output - 1, scores, reads


def expected_work(prompt, found, mean, square):
    """The same of a length that is thought of: E[d] and E[d^2] stand for d and d^2."""
    tokens, scores, _ = work_of(prompt, min(found, prompt - 1), 1)
    return tokens + mean - 1, scores, (mean - 1) * prompt + (square - mean) / 2


def plain_seconds(cost, work):
    """(computing, reading), as if nothing hid either and weights were read for all."""
    tokens, scores, reads = work
    compute = tokens * cost.flops_per_token / cost.gemm_rate[-1]
    compute += scores * cost.flops_per_score / cost.attention_flops_rate
    return compute, reads * cost.kv_bytes_per_token / cost.read_rate


def step_seconds(cost, work):
    """Of arrays of tokens, scores and reads, all of them above 0 tokens."""
    tokens, scores, reads = (numpy.asarray(part, float) for part in work)
    at = numpy.array(cost.rate_tokens)
    times = at * cost.flops_per_token / numpy.array(cost.gemm_rate)
    if len(at) == 1:
        gemm = tokens * cost.flops_per_token / cost.gemm_rate[0]
    else:
        gemm = numpy.interp(tokens, at, times)  # below the first: as long as that
        slope = max((times[-1] - times[-2]) / (at[-1] - at[-2]), times[-1] / at[-1])
        gemm = numpy.where(tokens > at[-1], times[-1] + (tokens - at[-1]) * slope, gemm)
    compute = gemm + scores * cost.flops_per_score / cost.attention_flops_rate
    read = (reads * cost.kv_bytes_per_token + cost.weight_bytes) / cost.read_rate
    longer, shorter = numpy.maximum(compute, read), numpy.minimum(compute, read)
    return longer + cost.alpha * shorter + cost.overhead


def survey(rows, block, pool, step_tokens):
    """(work, fewest steps) of all requests, nothing computed twice."""
    trie = Trie([ids for _, _, ids in rows])
    prompts = [row[0] for row in rows]
    _, found = most_found(trie.paths, block, prompts)
    total, held = numpy.zeros(3), 0
    for i, (prompt, output, _) in enumerate(rows):
        total += work_of(prompt, found[i], output)
        alone = prompt - trie.shared(i) * block
        held += sum(alone + j for j in range(1, output))  # of its own, in every step
    longest = max(output for _, output, _ in rows)
    return total, max(longest, total[0] / step_tokens, held / pool)


def bound_seconds(cost, work, least_steps):
    """The best of many numbers of equal steps, looked at closer and closer."""
    low, high = max(least_steps, 1), max(2 * least_steps, 2, work[0])
    for _ in range(12):
        steps = numpy.geomspace(low, high, 200)
        seconds = steps * step_seconds(cost, [part / steps for part in work])
        best = int(seconds.argmin())
        low, high = steps[max(best - 1, 0)], steps[min(best + 1, 199)]
    return float(seconds.min())


def least_seconds(cost, surveyed, preemptions, pool):
    """That any run takes. One that steps back gives its next token at the end of its prompt, where
    the cost model has no reading of K and V: so much less may be read."""
    (tokens, scores, reads), least = surveyed
    return bound_seconds(cost, (tokens, scores, max(reads - preemptions * pool, 0)), least)


# -- output lengths -----------------------------------------------------------------------------


class Curve:
    """Survival of a group's lengths, after Kaplan and Meier: lengths of those that ended, and what
    the others have given. Behind the longest nobody is left."""

    def __init__(self, ended, going):
        self.longest = max([*ended, *going])
        self.above = numpy.ones(self.longest + 1)  # [t]: the share that is longer than t
        share = 1.0
        for t in range(1, self.longest + 1):
            reached = sum(x >= t for x in ended) + sum(x >= t for x in going)
            share *= 1 - sum(x == t for x in ended) / reached
            self.above[t] = share
        self.above[self.longest] = 0
        self.points = sorted({*ended, *going})

    def share_above(self, t):
        return self.above[t] if t <= self.longest else 0.0

    def beyond(self, given):
        """E[d] and E[d^2] of those longer than given."""
        left = self.share_above(given)
        if left <= 0:
            return float(given), float(given) ** 2
        times = numpy.arange(given, self.longest)
        shares = self.above[given : self.longest] / left
        return given + shares.sum(), given**2 + (shares * (2 * times + 1)).sum()

    def room(self):
        """The shortest length that no more than a fifth is longer than, over the mean."""
        edge = next(x for x in self.points if self.share_above(x) <= ROOM + 1e-9)
        return max(edge / self.beyond(0)[0], 1)


def guess(paths, groups, most, seen, so_far):
    """(mean, square, room before it is rounded up) of each request; what is seen is known."""
    trie, count = Trie(paths), len(paths)
    going = [so_far[i] if seen[i] < 0 else 0 for i in range(count)]
    all_seen = [seen[i] for i in range(count) if seen[i] >= 0]
    curves, beliefs = {}, {}
    for g in set(groups):
        own = [i for i in range(count) if groups[i] == g]
        ended = [seen[i] for i in own if seen[i] >= 0]
        under_way = [going[i] for i in own if going[i] > 0]
        if ended or under_way:
            curves[g] = Curve(ended, under_way)
            beliefs[g] = curves[g].beyond(0)
        elif all_seen:
            beliefs[g] = numpy.mean(all_seen), numpy.mean(numpy.square(all_seen, dtype=float))
        else:
            beliefs[g] = math.inf, math.inf
    found = []
    for i in range(count):
        if seen[i] >= 0:
            found.append((seen[i], seen[i] ** 2, seen[i]))
            continue
        g = groups[i]
        if going[i] > 0:
            mean, square = curves[g].beyond(going[i])
        else:
            mean, square = _down_the_tree(trie, groups, seen, going, curves, beliefs[g], i)
        mean = min(max(mean, 1), most[i])
        square = max(min(square, mean * most[i]), mean**2)
        room = min(mean * (curves[g].room() if g in curves else 1), most[i])
        found.append((mean, square, room))
    return found


def _down_the_tree(trie, groups, seen, going, curves, belief, request):
    """From the group to the request's own node: each node of one group draws what is thought of its
    parent towards what is known of its own requests, a prior being worth eight of them. One that
    has not ended counts for as much as the share of lengths that it outlived."""
    path = trie.paths[request]
    for depth in range(1, len(path) + 1):
        prefix = path[:depth]
        own = trie.below[prefix]
        if prefix not in trie.nodes or len({groups[i] for i in own}) > 1:
            continue
        weight = total = squares = 0.0
        for i in own:
            if seen[i] >= 0:
                worth, mean, square = 1.0, seen[i], seen[i] ** 2
            elif going[i] > 0:
                curve = curves[groups[i]]
                worth = 1 - curve.share_above(going[i])
                mean, square = curve.beyond(going[i])
            else:
                continue
            weight, total, squares = weight + worth, total + worth * mean, squares + worth * square
        if weight > 0:
            belief = (
                (total + PRIOR * belief[0]) / (weight + PRIOR),
                (squares + PRIOR * belief[1]) / (weight + PRIOR),
            )
    return belief
