"""Which tokens run in the next step.

Every running sequence has tokens (prompt and output) and a count of those whose K and V are in the
cache. One missing token is a decode, more are a prompt still to be read, in chunks. A step takes
all decodes first, then chunks, then admits waiting sequences in their order, until the step's token
budget, the slots or the pages are used up. A sequence that is admitted begins with what the prefix
cache has of it, pages that others fill in the same step included: a shared prefix is computed once.
When a sequence needs a page and there is none, the sequence admitted last gives all its pages back
and waits to be read again from its tokens.

Nothing here touches a tensor. A sequence can always begin again from its tokens alone: that is what
preemption does to one, and `restart` to all after a step that was broken off (Ctrl-C).
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .prefix import PrefixCache


class Sequence:
    """One line of output tokens of one request."""

    __slots__ = (
        "request",
        "index",
        "params",
        "tokens",
        "num_prompt",
        "seed",
        "slot",
        "computed",
        "pending",
        "max_length",
        "reply",
        "finish_reason",
        "digests",
        "num_published",
        "num_cached_tokens",
    )

    def __init__(self, request, index, params, tokens, seed, max_length):
        self.request = request
        self.index = index
        self.params = params
        self.tokens = list(tokens)
        self.num_prompt = len(tokens)
        self.seed = seed
        self.max_length = max_length  # of tokens, prompt included
        self.slot = None
        self.computed = 0  # leading tokens whose K and V are in the cache
        self.pending = []  # siblings that begin when this one's prompt is read
        self.reply = None  # what the engine keeps of its text
        self.finish_reason = None
        self.digests = []  # of its blocks, as far as anybody asked (see prefix.py)
        self.num_published = 0  # leading blocks whose pages are published
        self.num_cached_tokens = None  # that were there when it was first admitted


class Work(NamedTuple):
    """What a step does, as raddle.blend.CostModel.step_seconds() takes it."""

    tokens: int  # through the GEMMs
    scores: int  # query-key pairs of the chunks' attention
    reads: int  # tokens of K and V that the decodes read


@dataclass
class Step:
    """One forward pass: a row per decode, then the rows of each chunk.

    decodes: sequences with one missing token; chunks: (sequence, number of tokens);
    samples: sequences that get a token, drawn from the logits of the row in sample_rows, or of
    their own number where that is None.
    """

    decodes: list
    decode_slots: Any  # their slots, an int64 array
    chunks: list = field(default_factory=list)
    samples: list = field(default_factory=list)
    sample_rows: list | None = None

    @property
    def num_tokens(self):
        return len(self.decodes) + sum(count for _, count in self.chunks)

    def sample_slots(self):
        import numpy as np

        if self.samples is self.decodes:
            return self.decode_slots
        return np.array([sequence.slot for sequence in self.samples], np.int64)


class Scheduler:
    """Continuous batching over the slots and pages of a KVCache."""

    def __init__(self, cache, max_tokens_per_step, on_admit=None, prefix_cache=False):
        self.cache = cache
        self.prefix = PrefixCache(cache, prefix_cache)
        self.max_tokens_per_step = max_tokens_per_step
        self.waiting = deque()
        self.running = []  # in the order of admission
        self.reading = []  # of those, the ones whose prompt is not read to its end
        self.num_preemptions = 0
        self._decodes = None  # (list, slots) of the last step, while nobody comes or goes
        self._on_admit = on_admit or (lambda sequence: None)

    def add(self, sequence):
        """Queue a sequence; its pending siblings come with it."""
        self.waiting.append(sequence)
        self.prefix.add_reader(sequence)

    def schedule(self):
        """The next Step, or None when there is nothing to do."""
        step = self._take_decodes()
        budget = self.max_tokens_per_step - len(step.decodes)
        budget = self._take_chunks(step, budget)
        self._admit(step, budget)
        if not step.num_tokens:
            return None
        step.samples = step.decodes
        if step.chunks:
            self._choose_samples(step)
        return step

    def follow(self, step):
        """The Step after one of decodes alone, whose tokens are not known: the same decodes again.

        None when it might be another one: somebody is admitted, or ended, or ends by its length, or
        finds no page. Who turns out to end by the token that is not known is in it for nothing.
        """
        if step.chunks or self.reading:
            return None
        if self.waiting and self._find_room(self.waiting[0]) is not None:
            return None
        if any(s.slot is None or len(s.tokens) + 1 >= s.max_length for s in step.decodes):
            return None
        slots = step.decode_slots
        for i in self.cache.grow_by_one(slots):
            if not self.cache.grow(slots[i], step.decodes[i].computed + 1):
                return None
        return Step(step.decodes, slots, samples=step.decodes)

    def work_of(self, step):
        """The Work of a step that was not committed yet; as if all layers saw all keys."""
        reads = int(self.cache.lengths[step.decode_slots].sum()) + len(step.decodes)
        scores = sum(n * s.computed + n * (n + 1) // 2 for s, n in step.chunks)
        return Work(step.num_tokens, scores, reads)

    def commit(self, step):
        """The step is under way, or has run: count its tokens as written, and start the siblings it
        brought."""
        for sequence in step.decodes:
            sequence.computed += 1
        self.cache.lengths[step.decode_slots] += 1
        for sequence, count in step.chunks:
            sequence.computed += count
            self.cache.lengths[sequence.slot] = sequence.computed
            self.prefix.publish(sequence, sequence.computed)
            if sequence.computed == len(sequence.tokens):
                self.reading.remove(sequence)
                self._decodes = None
                self._start_siblings(sequence)

    def finish(self, sequence):
        """Take a sequence out, wherever it is, and free what it and its pending siblings hold."""
        if sequence.slot is not None:
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            self.prefix.remove_reader(sequence)

    def restart(self, sequences):
        """Begin again from these sequences' tokens, whatever an interrupted step left behind."""
        self.cache.clear()
        self.running, self.reading, self._decodes = [], [], None
        self.waiting = deque()
        for sequence in sequences:
            sequence.slot, sequence.computed, sequence.pending = None, 0, []
            self.add(sequence)

    def _take_decodes(self):
        decodes, slots = self._get_decodes()
        preemptions = self.num_preemptions
        for i in self.cache.grow_by_one(slots):  # what did not go the short way
            sequence = decodes[i]
            while sequence.slot is not None:
                if self.cache.grow(sequence.slot, sequence.computed + 1):
                    break
                self._preempt(self.running[-1])
        if self.num_preemptions != preemptions:
            decodes, slots = self._get_decodes()
        return Step(decodes, slots)

    def _get_decodes(self):
        """The sequences whose prompt is read, and their slots."""
        import numpy as np

        if self._decodes is None:
            decodes = [s for s in self.running if s not in self.reading]
            self._decodes = decodes, np.array([s.slot for s in decodes], np.int64)
        return self._decodes

    def _take_chunks(self, step, budget):
        for sequence in list(self.reading):
            count = min(len(sequence.tokens) - sequence.computed, budget)
            if count == 0 or sequence.slot is None:  # given its pages back in this loop
                continue
            while not self.cache.grow(sequence.slot, sequence.computed + count):
                youngest = self.running[-1]
                if step.decodes or youngest is sequence:
                    # It waits with what it holds: others get on, and will free pages for it.
                    return 0
                self._preempt(youngest)
            self._add_chunk(step, sequence, count)
            budget -= count
        return budget

    def _admit(self, step, budget):
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            num_tokens = len(sequence.tokens)
            cached = self._find_room(sequence)
            if cached is None:
                return
            self.waiting.popleft()
            self.running.append(sequence)
            self.reading.append(sequence)
            for member in (sequence, *sequence.pending):
                member.slot = self.cache.take_slot()
                self._on_admit(member)
            self.prefix.take(sequence, cached)
            self.prefix.remove_reader(sequence)
            count = min(num_tokens - sequence.computed, budget)
            is_grown = self.cache.grow(sequence.slot, sequence.computed + count)
            assert is_grown, "a sequence that runs alone, or has room, must fit"
            self._add_chunk(step, sequence, count)
            budget -= count

    def _find_room(self, sequence):
        """What a waiting sequence finds in the prefix cache, or None when it has to go on waiting:
        for slots, or for pages, which one that would run alone always finds."""
        if self.cache.num_free_slots < 1 + len(sequence.pending):
            return None
        cached = self.prefix.match(sequence)
        has_room = not self.running or self.cache.has_room(len(sequence.tokens) + 1, cached)
        return cached if has_room else None

    def _add_chunk(self, step, sequence, count):
        step.chunks.append((sequence, count))
        self.prefix.promise(sequence, sequence.computed + count)

    @staticmethod
    def _choose_samples(step):
        """Decodes, and the chunks that reach the end of their prompt, with siblings."""
        step.samples, step.sample_rows = list(step.decodes), list(range(len(step.decodes)))
        row = len(step.decodes)
        for sequence, count in step.chunks:
            row += count
            if sequence.computed + count == len(sequence.tokens):
                step.samples += [sequence, *sequence.pending]
                step.sample_rows += [row - 1] * (1 + len(sequence.pending))

    def _start_siblings(self, sequence):
        pending, sequence.pending = sequence.pending, []
        for sibling in pending:
            self.cache.fork(sequence.slot, sibling.slot)
            sibling.computed = sequence.computed
            sibling.digests, sibling.num_published = sequence.digests[:], sequence.num_published
            self.running.append(sibling)

    def _preempt(self, sequence):
        self._leave(sequence)
        self.waiting.appendleft(sequence)
        self.prefix.add_reader(sequence)
        self.num_preemptions += 1

    def _leave(self, sequence):
        """Out of the running, and slots and pages free, those of pending siblings too."""
        self._decodes = None
        # What a step that is still under way computed for a token that is not known has no digest.
        self.prefix.publish(sequence, min(sequence.computed, len(sequence.tokens)))
        for group in (self.running, self.reading):
            if sequence in group:
                group.remove(sequence)
        for member in (sequence, *sequence.pending):
            self.cache.free_slot(member.slot)
            member.slot = None
            member.computed = 0
