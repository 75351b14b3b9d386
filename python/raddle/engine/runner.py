"""One step on a device: index arrays from the page tables, attention plans, the forward pass.

Rows of a step are its decodes, one each, then the rows of its chunks. Decodes and chunks have a
plan each per KV group, made once per step and used by every layer of the group.

On a GPU the index arrays travel in one copy, and a step of decodes alone is a CUDA graph: captured
once per batch size (1, 2, 4, multiples of 8), launched with the batch padded to that size. A padded
row is a request without pages; its K and V go nowhere and its logits are dropped.

A step of decodes may be launched before the tokens of the one ahead of it are known: whoever draws
them writes them to `next_ids`, where the step that follows reads them.
"""

from .. import _core, tensor
from ..attention import BatchDecode, BatchPrefill, append_slots
from ..graph import Graph


class Runner:
    """Runs the Steps of a Scheduler through a Model and a KVCache. It is the `batch` that
    Model.forward reads: num_tokens, num_rows, ids, positions, rows, attend."""

    def __init__(self, model, cache, max_batch, max_tokens):
        import numpy as np

        self.model, self.cache = model, cache
        self.plans = [GroupPlans(model, group, max_batch, max_tokens) for group in cache.groups]
        self._place = {}  # layer -> (its group's plans, its cache)
        for plans in self.plans:
            for layer, kv in zip(plans.group.layers, plans.group.caches):
                self._place[layer] = (plans, kv)
        self._is_cuda = model.device != "cpu"
        self.runs_ahead = self._is_cuda  # a CPU has nothing to do meanwhile
        self._index = _core.Upload((2 + len(self.plans)) * max_tokens, model.device)
        self._sent = self._index.tensor
        self._slots = np.zeros(max_tokens, np.int64)
        self._graphs = {}  # rows -> Graph

    def next_ids(self, step):
        """Where the tokens that a step of decodes draws go, int32 [n], for one that follows it."""
        return self._sent[: step.num_tokens]

    def run(self, step, *, follows=False, all_rows=False):
        """Float32 logits, valid until the next call: a row per sample of the step, or with all_rows
        one per token.

        follows: the step's decodes are those of the last one, in its order, and their tokens are in
        next_ids, or will be when the device gets there.
        """
        n = step.num_tokens
        size = graph_size(n) if self._is_cuda and not step.chunks else n
        self._set_index(step, size, follows)
        for plans in self.plans:
            plans.plan(step, size - n, self.cache.lengths)
        self.num_tokens = self.num_rows = size
        self.rows = None
        if step.chunks and not all_rows:
            self._set_rows(step.sample_rows)
        if not self._is_cuda or step.chunks:
            return self.model.forward(self)
        return self._run_graph(size)[:n]

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

    def _run_graph(self, size):
        graph = self._graphs.get(size)
        if graph is not None:
            graph.launch()
            return self.model.logits[:size]
        logits = self.model.forward(self)  # the step itself; it compiles what the capture needs
        with Graph(device=self.model.device) as graph:
            self.model.forward(self)
        self._graphs[size] = graph
        return logits

    def _set_index(self, step, size, follows):
        """Token ids, positions and cache rows, each `size` numbers: ids, positions, rows per group
        one behind the other."""
        used = (2 + len(self.plans)) * size
        index = self._index.slot().numpy()[:used].reshape(-1, size)
        n = self._fill(step, index[0], index[1])
        index[:2, n:] = 0
        slots, positions = self._slots[:n], index[1, :n]
        for plans, rows in zip(self.plans, index[2:]):
            rows[:n] = plans.group.rows(slots, positions)
            rows[n:] = -1
        self._index.send(size if follows else 0, used)
        sent = self._sent
        self.ids, self.positions = sent[:size], sent[size : 2 * size]
        for i, plans in enumerate(self.plans, 2):
            plans.rows = sent[i * size : (i + 1) * size]

    def _fill(self, step, ids, positions):
        """Returns the number of rows; also sets the slot of each."""
        import numpy as np

        n = len(step.decodes)
        ids[:n] = [sequence.tokens[-1] for sequence in step.decodes]
        positions[:n] = self.cache.lengths[step.decode_slots]
        self._slots[:n] = step.decode_slots
        for sequence, count in step.chunks:
            begin, end = sequence.computed, sequence.computed + count
            ids[n : n + count] = sequence.tokens[begin:end]
            positions[n : n + count] = np.arange(begin, end, dtype=np.int32)
            self._slots[n : n + count] = sequence.slot
            n += count
        return n

    def _set_rows(self, rows):
        import numpy as np

        self.rows, self.num_rows = np.array(rows, np.int32), len(rows)
        if self._is_cuda:
            self.rows = tensor(self.rows, device=self.model.device)


def graph_size(n):
    """The batch size that n decodes are padded to."""
    return next((size for size in (1, 2, 4) if n <= size), -(-n // 8) * 8)


class GroupPlans:
    """The attention plans of one KV group, and where a step's K and V go in it (`rows`)."""

    def __init__(self, model, group, max_batch, max_tokens):
        self.group = group
        max_batch = graph_size(max_batch)
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

    def plan(self, step, num_padded, lengths):
        """num_padded: decodes without pages behind the step's own. lengths: tokens written, by
        slot."""
        import numpy as np

        self.num_decodes = len(step.decodes) + num_padded
        if step.decodes:
            slots = step.decode_slots
            table, seq_lens = self._table(slots, lengths[slots] + 1)
            if num_padded:
                table = np.concatenate([table, np.zeros((num_padded, table.shape[1]), np.int32)])
                seq_lens = np.concatenate([seq_lens, np.zeros(num_padded, np.int32)])
            self.decode.plan(block_table=table, seq_lens=seq_lens)
        if step.chunks:
            slots = np.array([sequence.slot for sequence, _ in step.chunks])
            counts = np.array([count for _, count in step.chunks], np.int32)
            indptr = np.zeros(len(counts) + 1, np.int32)
            np.cumsum(counts, out=indptr[1:])
            table, seq_lens = self._table(slots, lengths[slots] + counts)
            self.prefill.plan(indptr, block_table=table, seq_lens=seq_lens)

    def _table(self, slots, lengths):
        """(block_table, seq_lens) of slots with so many tokens each; dropped pages do not count."""
        group = self.group
        if group.window_left >= 0:
            lengths = lengths - group.dropped[slots] * group.page_size
        width = -(-int(lengths.max()) // group.page_size)
        return group.table[slots, :width], lengths
