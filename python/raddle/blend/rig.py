"""A few layers of a model on a device, as the engine runs them, and how long pieces of a step take.

What is timed is what raddle.engine runs: its Model with random weights, its attention plans over a
paged cache with shuffled pages, its Runner; on a GPU as CUDA graphs. All layers of a model are
alike: a pass through a few of them less a pass through one is what layers take, as the last layer,
the embedding and the logits are in both.

Times are those of a host clock around many launches, from an idle device to an idle device, so that
the latency of the first is spread over all.
"""

import statistics
import time
from dataclasses import dataclass
from math import ceil

from .. import _core

PAGE_SIZE = 16
SAMPLES = 5
_PIECE_BYTES = 16 << 20  # of random numbers that fill a larger tensor


def median_seconds(launch, finish, window, clock):
    """Seconds of one launch: the median of SAMPLES runs of as many launches as take `window`.

    launch() queues work, finish() waits for it.
    """
    launch()
    finish()

    def run(count):
        begin = clock()
        for _ in range(count):
            launch()
        finish()
        return (clock() - begin) / count

    count = max(1, ceil(window / max(run(1), 1e-9)))
    return statistics.median(run(count) for _ in range(SAMPLES))


def together_seconds(sides, clock):
    """Seconds until all sides are done, begun at once: the median of SAMPLES runs.

    sides: (launch, finish, count) each; launches of different sides alternate, so that none has
    its work queued late.
    """

    def run():
        order = sorted(
            ((i + 0.5) / count, side)
            for side, (_, _, count) in enumerate(sides)
            for i in range(count)
        )
        begin = clock()
        for _, side in order:
            sides[side][0]()
        for _, finish, _ in sides:
            finish()
        return clock() - begin

    run()
    return statistics.median(run() for _ in range(SAMPLES))


@dataclass(frozen=True)
class Chunk:
    """A piece of a prompt: count tokens behind `cached` ones."""

    count: int
    cached: int = 0

    @property
    def scores(self):
        """Query-key pairs, causal."""
        return self.count * self.cached + self.count * (self.count + 1) // 2


class Rig:
    """The layers, the caches and the plans.

    config: a ModelConfig of at least 2 layers, all of which are made. max_batch: a multiple of 8,
    the requests of a step, also its rows of logits. max_tokens: of a step. max_context: of a
    request. pool_tokens: of K and V. window: seconds that a sample takes at least.
    """

    def __init__(
        self,
        config,
        *,
        device,
        max_batch,
        max_tokens,
        max_context,
        pool_tokens,
        window,
        clock=time.perf_counter,
    ):
        import numpy as np

        from .. import Stream
        from ..engine.pages import KVCache
        from ..engine.runner import Runner

        self.num_layers, self.device, self.max_batch = config.num_layers, device, max_batch
        self._window, self._clock = window, clock
        self._model, self._single = (
            _make_model(config, layers, device, max_tokens, max_batch, max_context)
            for layers in (config.num_layers, 1)
        )
        self._group = self._make_group(max_context, pool_tokens)
        self._cache = KVCache([self._group], PAGE_SIZE, max_batch)
        self._runner = Runner(self._model, self._cache, max_batch, max_tokens)
        self._pages = np.random.default_rng(1).permutation(self._group.pool.num_pages)
        self._gemms, self._reads = Stream(device), Stream(device, high_priority=True)
        self._decodes = {}  # max_ctas -> BatchDecode
        # A step of all rows, so that buffers hold numbers, not what lay in memory.
        self._runner.run(self._make_step(0, 0, [Chunk(min(max_tokens, max_context))]))
        self._settle()

    # -- what is timed --------------------------------------------------------------------------

    def pass_seconds(self, tokens):
        """(seconds of a pass through one layer, through all): embedding, layers without attention
        but with the writing of K and V, logits of up to max_batch rows."""
        one, all_layers = (
            self._time(self._on(self._gemms, self._pass(model, tokens)), self._gemms)
            for model in (self._single, self._model)
        )
        return one, all_layers

    def decode_seconds(self, batch, kv_len):
        """Seconds of all layers' decode attention of batch requests with kv_len tokens each."""
        return self._time(self._on(self._reads, self._decode(batch, kv_len, 0)), self._reads)

    def prefill_seconds(self, chunk):
        """Seconds of all layers' attention of a Chunk."""
        return self._time(self._on(self._gemms, self._prefill(chunk)), self._gemms)

    def beside_seconds(self, tokens, batch, kv_len, counts, max_ctas, max_sms):
        """Seconds of counts[0] passes through all layers on one stream, their linear layers cut for
        max_sms multiprocessors (0: all), and counts[1] times their decode attention by at most
        max_ctas CTAs on another, begun at once."""
        reads = self._on(self._reads, self._decode(batch, kv_len, max_ctas))
        gemms = self._on(self._gemms, self._pass(self._model, tokens, max_sms))
        sides = (
            (reads, self._reads.synchronize, counts[1]),
            (gemms, self._gemms.synchronize, counts[0]),
        )
        return together_seconds(sides, self._clock)

    def step_seconds(self, batch, kv_len, chunks):
        """Seconds of a whole step of the engine's Runner, its tokens drawn and on the host: batch
        requests with kv_len cached tokens each decode, chunks of other prompts are read."""
        step = self._make_step(batch, kv_len, chunks)
        draw = self._make_draw(batch + len(chunks))

        def run():
            draw(self._runner.run(step))

        return median_seconds(run, _nothing, self._window, self._clock)  # each run waits

    def num_ctas(self):
        """CTAs (CPU: threads) that decode attention has without a bound."""
        return int(self._plan_decode(1, PAGE_SIZE, 0).schedule().config["num_workers"])

    def num_sms(self):
        """Multiprocessors; 0 on the CPU, which has none to share out."""
        if self.device == "cpu":
            return 0
        return _core.gpu_info(int(self.device.partition(":")[2]))["num_sms"]

    # -- pieces of work -------------------------------------------------------------------------

    def _pass(self, model, tokens, max_sms=0):
        batch = _Pass(self._group, self.device, tokens, self.max_batch)
        return lambda: model.forward(batch, max_sms=max_sms)

    def _decode(self, batch, kv_len, max_ctas):
        return self._attention(self._plan_decode(batch, kv_len, max_ctas), batch)

    def _prefill(self, chunk):
        import numpy as np

        kv_len = chunk.cached + chunk.count
        plan = self._runner.plans[0].prefill
        plan.plan(
            np.array([0, chunk.count], np.int32),
            block_table=self._place([kv_len]),
            seq_lens=np.array([kv_len], np.int32),
        )
        return self._attention(plan, chunk.count)

    def _attention(self, plan, rows):
        from .. import empty

        model = self._model
        shape = (rows, model.num_qo_heads, model.config.head_dim)
        q, out = _random(shape, model.dtype, self.device), empty(shape, model.dtype, self.device)

        def run():
            for cache in self._group.caches:
                plan.run(q, cache, out=out)

        return run

    def _make_step(self, batch, kv_len, chunks):
        import numpy as np

        from ..engine.scheduler import Sequence, Step

        computed = [kv_len] * batch + [chunk.cached for chunk in chunks]
        ends = [kv_len + 1] * batch + [chunk.cached + chunk.count for chunk in chunks]
        self._place(ends)
        self._cache.lengths[: len(computed)] = computed
        sequences = []
        for slot, end in enumerate(ends):
            tokens = np.arange(end) % self._model.config.vocab_size
            sequence = Sequence(None, 0, None, tokens.tolist(), 0, end)
            sequence.slot, sequence.computed = slot, computed[slot]
            sequences.append(sequence)
        chunks = [(s, chunk.count) for s, chunk in zip(sequences[batch:], chunks)]
        last = batch - 1 + np.cumsum([count for _, count in chunks], dtype=int)
        return Step(
            sequences[:batch],
            np.arange(batch),
            chunks,
            sequences,
            [*range(batch), *last.tolist()],
        )

    def _make_draw(self, rows):
        """A function that draws tokens from logits, greedily, as the engine does."""
        import numpy as np

        from ..engine.sampling import SamplingParams, SamplingTable, to_host

        table, slots = SamplingTable(self.max_batch), np.arange(rows)
        for slot in slots:
            table.set(slot, SamplingParams(temperature=0), 0, 0)
        return lambda logits: to_host(table.draw(logits, slots))

    # -- memory and plans -----------------------------------------------------------------------

    def _make_group(self, max_context, pool_tokens):
        from ..engine.pages import KVGroup

        model, num_pages = self._model, -(-pool_tokens // PAGE_SIZE)
        shape = (num_pages, 2, PAGE_SIZE, model.num_kv_heads, model.config.head_dim)
        layers = range(self.num_layers)
        caches = [_random(shape, model.dtype, self.device) for _ in layers]
        blocks = -(-max_context // PAGE_SIZE)
        return KVGroup(layers, -1, PAGE_SIZE, num_pages, self.max_batch, blocks, caches)

    def _place(self, lengths):
        """Shuffled pages, none of them twice, for so many tokens in each of the first slots; their
        block table."""
        table, at, widest = self._group.table, 0, 0
        for slot, length in enumerate(lengths):
            blocks = -(-length // PAGE_SIZE)
            table[slot, :blocks] = self._pages[at : at + blocks]
            at, widest = at + blocks, max(widest, blocks)
        return table[: len(lengths), :widest]

    def _plan_decode(self, batch, kv_len, max_ctas):
        import numpy as np

        from ..attention import BatchDecode

        if max_ctas not in self._decodes:
            model = self._model
            self._decodes[max_ctas] = BatchDecode(
                num_qo_heads=model.num_qo_heads,
                num_kv_heads=model.num_kv_heads,
                head_dim=model.config.head_dim,
                page_size=PAGE_SIZE,
                dtype=model.dtype,
                max_batch=self.max_batch,
                max_pages=self._group.pool.num_pages,
                max_ctas=max_ctas,
                device=self.device,
            )
        plan, lengths = self._decodes[max_ctas], np.full(batch, kv_len, np.int32)
        plan.plan(block_table=self._place(lengths), seq_lens=lengths)
        return plan

    # -- the device -----------------------------------------------------------------------------

    def _on(self, stream, work):
        """A function that queues work: on a GPU on stream, as a graph; on the CPU it does it."""
        from .. import Graph

        if self.device == "cpu":
            return work
        work()  # compiles what a capture needs compiled
        self._settle()
        graph = Graph(device=self.device, stream=stream)
        with graph:
            work()
        return graph.launch

    def _settle(self):
        """Waits for the legacy default stream, with which the others are not ordered."""
        self._model.logits[:1].reshape(-1)[:1].to("cpu")

    def _time(self, launch, stream):
        return median_seconds(launch, stream.synchronize, self._window, self._clock)


class _Pass:
    """What Model.forward reads of a batch: K and V are written, attention is left out."""

    def __init__(self, group, device, tokens, max_rows):
        import numpy as np

        from .. import tensor

        def place(numbers):
            array = numbers.astype(np.int32)
            return array if device == "cpu" else tensor(array, device=device)

        self._caches = group.caches
        self.num_tokens, self.num_rows = tokens, min(tokens, max_rows)
        self.ids = self.positions = place(np.zeros(tokens))
        self.rows = place(np.arange(max_rows)) if tokens > max_rows else None
        self._slots = place(np.arange(tokens))  # the first tokens of the pool

    def attend(self, layer, q, k, v, out):
        """out keeps what an earlier step left there."""
        from ..attention import append_slots

        append_slots(k, v, self._slots, self._caches[layer])


def _make_model(config, num_layers, device, max_tokens, max_batch, max_context):
    from dataclasses import replace

    from ..engine.model import Model
    from ..engine.weights import DummyWeights

    return Model(
        replace(config, num_layers=num_layers, windows=(-1,) * num_layers),
        DummyWeights(),
        device=device,
        dtype=config.dtype,
        max_tokens=max_tokens,
        max_rows=max_batch,
        max_positions=max_context,
    )


def _random(shape, dtype, device):
    """A tensor of normal numbers, a block of them repeated: a GPU draws less power, and is faster,
    when all that it multiplies is zero."""
    from math import prod

    from .. import empty
    from ..engine.weights import ITEM_BYTES, DummyWeights

    row_bytes = prod(shape[1:]) * ITEM_BYTES[dtype]
    piece_rows = min(shape[0], max(1, _PIECE_BYTES // row_bytes))
    piece_shape = (piece_rows, *shape[1:])
    host, result = empty(piece_shape, dtype), empty(shape, dtype, device)
    DummyWeights(std=1.0).read_into("random", host.numpy(), dtype, piece_shape)
    piece = host if device == "cpu" else host.to(device)
    for at in range(0, shape[0], piece_rows):
        part = result[at : at + piece_rows]
        part.copy_(piece[: len(part)])
    return result


def _nothing():
    pass
