"""What the tests of the prefix cache share: prompts that begin alike, and what must be true of the
page pool, its queues and the K and V in it after any step."""

from contextlib import suppress

import numpy as np
import pytest

from tests.engine_cases import make_engine
from tests.reference import llama


class Truth:
    """K and V of the last block of any tokens, computed without prefix cache."""

    def __init__(self, folder, page_size):
        self.engine = make_engine(folder, page_size=page_size, prefix_cache=False)
        self._free_slot, self.engine.cache.free_slot = self.engine.cache.free_slot, self._read
        self._of = {}  # tokens -> {layer: [2, page_size, kv_heads, head_dim]}

    def block(self, tokens):
        if tokens not in self._of:
            self._tokens = tokens
            self.engine.logits(list(tokens))
        return self._of[tokens]

    def _read(self, slot):
        found = self._of[self._tokens] = {}
        for group in self.engine.cache.groups:
            page = int(group.table[slot, group.held[slot] - 1])
            for layer, kv in zip(group.layers, group.caches):
                found[layer] = kv.numpy()[page].copy()
        self._free_slot(slot)


class Watch:
    """Checks an engine after every step. Digests are known by the tokens they were made of."""

    def __init__(self, engine, truth=None):
        self.engine, self.truth = engine, truth
        self.prefix, self.tokens_of = engine._scheduler.prefix, {}
        for group in engine.cache.groups:
            for kv in group.caches:
                kv.numpy()[...] = np.nan
        digests = self.prefix._digests

        def remember(sequence, length):
            result, size = digests(sequence, length), engine.cache.page_size
            for i, digest in enumerate(result):
                tokens = tuple(sequence.tokens[: (i + 1) * size])
                assert self.tokens_of.setdefault(digest, tokens) == tokens
            return result

        self.prefix._digests = remember
        self.admitted = []  # slots that this step may read in what it writes
        self.take, self.prefix.take = self.prefix.take, self.note_taken
        self.run, engine._runner.run = engine._runner.run, self.check_step

    def note_taken(self, sequence, digests):
        self.admitted.append(sequence.slot)
        self.take(sequence, digests)

    def check_step(self, step, **options):
        """Nobody holds what another writes, but those that this step admitted."""
        slots = {s.slot for s in self.engine._scheduler.running} - set(self.admitted)
        for group in self.engine.cache.groups:
            held = {slot: set(group.table[slot, : group.held[slot]].tolist()) for slot in slots}
            for sequence, count in [(s, 1) for s in step.decodes] + step.chunks:
                positions = np.arange(sequence.computed, sequence.computed + count)
                pages = group.rows(np.full(count, sequence.slot), positions) // group.page_size
                others = [held[slot] for slot in slots if slot != sequence.slot]
                assert not set(pages.tolist()) & set().union(*others)
        self.admitted.clear()
        return self.run(step, **options)

    def check(self):
        scheduler, cache = self.engine._scheduler, self.engine.cache
        running = [m for s in scheduler.running for m in (s, *s.pending)]
        assert len({s.slot for s in running}) == len(running)
        assert cache.num_free_slots + len(running) == self.engine.max_batch
        for group in cache.groups:
            self.check_pool(group, [s.slot for s in running], scheduler.waiting)
        for sequence in running:
            assert cache.lengths[sequence.slot] == sequence.computed <= len(sequence.tokens)

    def check_pool(self, group, slots, waiting):
        pool = group.pool
        held = [group.table[slot, : group.held[slot]].tolist() for slot in slots]
        counts = [0] * pool.num_pages
        for pages in held:
            assert len(set(pages)) == len(pages)
            for page in pages:
                counts[page] += 1
        assert pool._refs == counts
        evictable = [*pool._unread, *pool._awaited]
        parts = [pool._free, evictable, [page for page, count in enumerate(counts) if count]]
        assert sorted(sum(parts, [])) == list(range(pool.num_pages))
        assert pool.num_free + pool.num_used + pool.num_evictable == pool.num_pages
        assert {page: d for d, page in pool._published.items()} == {
            page: d for page, d in enumerate(pool._digests) if d is not None
        }
        assert set(evictable) == {p for p in pool._published.values() if not counts[p]}
        readers = {}
        for sequence in waiting:
            for digest in self.prefix._readable(sequence):
                readers[digest] = readers.get(digest, 0) + 1
        assert pool._readers == readers
        assert all(pool._digests[page] in readers for page in pool._awaited)
        assert not any(pool._digests[page] in readers for page in pool._unread)
        self.check_tree(group, counts, evictable)

    def check_tree(self, group, counts, evictable):
        """Blocks without their parent are never found; a parent outlives its children."""
        pool, size = group.pool, self.engine.cache.page_size
        by_tokens = {self.tokens_of[d]: page for d, page in pool._published.items()}
        rank = {page: i for i, page in enumerate(evictable)}
        for tokens, page in by_tokens.items():
            if self.truth is not None:
                self.check_content(group, tokens, page)
            if group.window_left >= 0 or len(tokens) == size:
                continue
            parent = by_tokens[tokens[:-size]]
            assert counts[page] <= counts[parent]
            if not counts[parent]:
                assert rank[page] < rank[parent]

    def check_content(self, group, tokens, page):
        expected = self.truth.block(tokens)
        for layer, kv in zip(group.layers, group.caches):
            scale = np.abs(expected[layer]).max()
            assert np.abs(kv.numpy()[page] - expected[layer]).max() <= 2e-5 * scale


def shared_prompts(rng, count, page_size, vocab=3):
    """Prompts that begin alike: walks down a tree of few tokens and few branches."""
    trunk = rng.integers(3, 3 + vocab, 12 * page_size).tolist()
    prompts = []
    for _ in range(count):
        cut = int(rng.integers(0, len(trunk) - 1))
        tail = rng.integers(3, 3 + vocab, int(rng.integers(1, 2 * page_size + 2))).tolist()
        prompts.append(trunk[:cut] + tail)
        if rng.random() < 0.3:
            trunk = (prompts[-1] + trunk)[: len(trunk)]
    return prompts


def windows_first(folder):
    """A model whose first KV group has a window, of 24, and the second has none."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    llama.write_model(folder, llama.config_of("qwen2", layer_types=types))
    return folder


def break_off(engine, runs):
    """A step that ends by an error in the forward pass, or behind it."""
    run = engine._runner.run

    def broken(step, **options):
        if runs:
            run(step, **options)
        raise RuntimeError("broken off")

    engine._runner.run = broken
    is_ahead = engine._ahead is not None  # then the step may have run before
    with suppress(RuntimeError) if is_ahead else pytest.raises(RuntimeError, match="broken off"):
        engine.step()
    engine._runner.run = run


def rows_of(engine):
    """A list that gets the number of rows of every step."""
    rows, run = [], engine._runner.run

    def count(step, **options):
        rows.append(step.num_tokens)
        return run(step, **options)

    engine._runner.run = count
    return rows
