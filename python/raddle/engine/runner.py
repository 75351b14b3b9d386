"""One step on a device: index arrays from the page tables, attention plans, the forward pass.

Rows of a step are its decodes, one each, then the rows of its chunks. Decodes and chunks have a
plan each per KV group, made once per step and used by every layer of the group.
"""

from ..attention import BatchDecode, BatchPrefill, append_slots


class Runner:
    """Runs the Steps of a Scheduler through a Model and a KVCache, on the CPU."""

    def __init__(self, model, cache, max_batch, max_tokens):
        import numpy as np

        self.model, self.cache = model, cache
        self.plans = [GroupPlans(model, group, max_batch, max_tokens) for group in cache.groups]
        self._place = {}  # layer -> (its group's plans, its cache)
        for plans in self.plans:
            for layer, kv in zip(plans.group.layers, plans.group.caches):
                self._place[layer] = (plans, kv)
        self._ids = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int32)
        self._slots = np.zeros(max_tokens, np.int64)
        self.num_rows = 0

    def run(self, step, all_rows=False):
        """Float32 logits, valid until the next call: a row per sample of the step, or with all_rows
        one per token."""
        import numpy as np

        n = self.num_tokens = step.num_tokens
        self._fill(step)
        self.ids, self.positions = self._ids[:n], self._positions[:n]
        for plans in self.plans:
            plans.plan(step, self._slots[:n], self.positions, self.cache.lengths)
        self.rows, self.num_rows = None, n
        if step.chunks and not all_rows:
            self.rows = np.array([row for _, row in step.samples], np.int32)
            self.num_rows = len(self.rows)
        return self.model.forward(self)

    def attend(self, layer, q, k, v, out):
        """What Model.forward asks of its batch."""
        plans, kv = self._place[layer]
        append_slots(k, v, plans.rows, kv)
        first = plans.num_decodes
        if first == self.num_tokens:
            plans.decode.run(q, kv, out=out)
        elif first == 0:
            plans.prefill.run(q, kv, out=out)
        else:
            plans.decode.run(q[:first], kv, out=out[:first])
            plans.prefill.run(q[first:], kv, out=out[first:])

    def _fill(self, step):
        """Token ids, positions and slots of every row."""
        import numpy as np

        n = len(step.decodes)
        self._ids[:n] = [sequence.tokens[-1] for sequence in step.decodes]
        self._positions[:n] = self.cache.lengths[step.decode_slots]
        self._slots[:n] = step.decode_slots
        for sequence, count in step.chunks:
            begin, end = sequence.computed, sequence.computed + count
            self._ids[n : n + count] = sequence.tokens[begin:end]
            self._positions[n : n + count] = np.arange(begin, end, dtype=np.int32)
            self._slots[n : n + count] = sequence.slot
            n += count


class GroupPlans:
    """The attention plans of one KV group, and where a step's K and V go in it."""

    def __init__(self, model, group, max_batch, max_tokens):
        self.group = group
        shared = dict(
            num_qo_heads=model.num_qo_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.config.head_dim,
            page_size=group.page_size,
            dtype=model.dtype,
            window_left=group.window_left,
            max_batch=max_batch,
            max_pages=max_batch * group.max_blocks,
            device=model.device,
        )
        self.decode = BatchDecode(**shared)
        self.prefill = BatchPrefill(**shared, causal=True, max_qo_tokens=max_tokens)
        self.num_decodes = 0
        self.rows = None

    def plan(self, step, slots, positions, lengths):
        """slots and positions: of every row of the step; lengths: tokens written, by slot."""
        import numpy as np

        self.rows = self.group.rows(slots, positions)
        self.num_decodes = len(step.decodes)
        if step.decodes:
            self.decode.plan(*self._table(step.decode_slots, lengths[step.decode_slots] + 1))
        if step.chunks:
            slots = np.array([sequence.slot for sequence, _ in step.chunks])
            counts = np.array([count for _, count in step.chunks], np.int32)
            table = self._table(slots, lengths[slots] + counts)
            self.prefill.plan(_indptr(counts), *table)

    def _table(self, slots, lengths):
        """(indptr, indices, last_page_len) of slots that hold so many tokens each."""
        import numpy as np

        group = self.group
        held = group.held[slots]
        width = int(held.max())
        indices = group.table[slots, :width][np.arange(width) < held[:, None]]
        last = lengths - (group.dropped[slots] + held - 1) * group.page_size
        return _indptr(held), indices, last


def _indptr(counts):
    import numpy as np

    indptr = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=indptr[1:])
    return indptr
