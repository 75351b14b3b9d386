"""The engine: requests in, tokens out, one step at a time.

    engine = Engine.from_folder("path/to/model")
    engine.add_request("Once upon a time", SamplingParams(max_tokens=32))
    while engine.has_work:
        for output in engine.step():
            print(output.text, end="")

One thread at a time. A step that is broken off (Ctrl-C, an error) loses nothing: the next one
computes again what it needs from the tokens that are known.
"""

import dataclasses
import itertools
import random

from .. import _core, empty
from ..errors import ArgumentError, CapacityError, StateError
from .config import DTYPES, ModelConfig
from .memory import build_cache
from .model import Model
from .prompt import check_ids, check_request
from .reply import Reply
from .runner import Runner, graph_size
from .sampling import SamplingParams, SamplingTable, draw_logprobs, seed_of_answer, to_host
from .scheduler import Scheduler, Sequence, Step, Work
from .tokenizer import Tokenizer
from .weights import DummyWeights, open_weights


class Engine:
    """Runs one model. Made by from_folder or with_dummy_weights, whose options are these:

    device: "cpu", "cuda" or "cuda:1". dtype: of weights, activations and KV; default: the model's.
    max_batch: answers that are written at once. max_tokens_per_step: tokens of one forward pass,
    decodes and pieces of prompts together (default 2048). max_model_len: longest prompt and answer
    together (default and most: the model's context). page_size: tokens of a KV page.
    kv_memory_bytes: of the KV cache (default: what max_batch full contexts need, at most a quarter
    of the machine's memory, or nine tenths of a GPU's free memory). prefix_cache: find K and V of
    tokens that were computed before. seed: of requests without one (default: another each time).
    """

    def __init__(
        self,
        config,
        source,
        tokenizer=None,
        *,
        device="cpu",
        dtype=None,
        max_batch=64,
        max_tokens_per_step=2048,
        max_model_len=None,
        page_size=16,
        kv_memory_bytes=None,
        prefix_cache=True,
        seed=None,
        communicator=None,
        progress=None,
    ):
        dtype = dtype or config.dtype
        if dtype not in DTYPES:
            raise ArgumentError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        if type(prefix_cache) is not bool:
            raise ArgumentError(f"prefix_cache: expected True or False, got {prefix_cache!r}")
        _check_size("max_batch", max_batch)
        _check_size("page_size", page_size)
        _check_size("max_tokens_per_step", max_tokens_per_step)
        max_tokens = max(max_tokens_per_step, max_batch)
        max_rows_of_step = max(max_tokens, graph_size(max_batch))
        context = config.max_position_embeddings
        if max_model_len is not None:
            _check_size("max_model_len", max_model_len)
            if max_model_len > context:
                raise CapacityError(
                    f"max_model_len: {max_model_len} is more than the model's context of {context}"
                )
            context = max_model_len
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise ArgumentError(
                f"tokenizer.json: has token ids up to {tokenizer.vocab_size - 1}, config.json has "
                f"a vocab_size of {config.vocab_size}: they are not of one model"
            )
        device = empty(1, device=device).device  # "cuda" is cuda:0; or an error that says why not
        self.config, self.tokenizer, self.device, self.dtype = config, tokenizer, device, dtype
        self.max_batch, self.max_tokens_per_step = max_batch, max_tokens
        try:
            self._model = Model(
                config,
                source,
                device=device,
                dtype=dtype,
                max_tokens=max_rows_of_step,
                max_rows=graph_size(max_batch),
                max_positions=context,
                communicator=communicator,
                progress=progress,
            )
        finally:
            source.close()
        self.cache = build_cache(
            self._model, context, max_batch, max_tokens, page_size, kv_memory_bytes
        )
        self.max_model_len = min(context, self.cache.max_length)
        self._runner = Runner(self._model, self.cache, max_batch, max_rows_of_step)
        self._drawn = _core.Readback(max_batch, device)
        self._ahead = None  # (step, logits, work) of a step that was launched before its turn
        self._sampling = SamplingTable(max_batch)
        self._scheduler = Scheduler(self.cache, max_tokens, self._admitted, prefix_cache)
        self._requests = {}  # id -> its unfinished sequences
        self._ids = itertools.count()
        self._random = random.Random(seed)
        self._outputs = []
        self._num_with_logprobs = 0  # sequences that want them
        self._is_interrupted = False
        self.num_prompt_tokens = self.num_output_tokens = self.num_steps = 0
        self.last_work = Work(0, 0, 0)  # of the last step

    @classmethod
    def from_folder(cls, folder, **options):
        """Load a Hugging Face model folder: config.json, safetensors, tokenizer.json.

        RaddleIOError for missing or damaged files, ShapeError for a tensor of another shape than
        config.json says, UnsupportedError for models of other kinds; each names file and tensor.
        """
        config = ModelConfig.from_folder(folder)
        return cls(config, open_weights(folder), Tokenizer(folder), **options)

    @classmethod
    def with_dummy_weights(cls, config, *, weights_seed=0, tokenizer=None, **options):
        """A model of random weights, of any shape and without a file.

        config: what config.json would hold. Without a tokenizer (a Tokenizer), prompts are token
        ids and answers have no text.
        """
        config = config if isinstance(config, ModelConfig) else ModelConfig.from_dict(config)
        source = DummyWeights(weights_seed, config.initializer_range)
        return cls(config, source, tokenizer, **options)

    # ---- requests

    def add_request(self, prompt, params=None, *, request_id=None):
        """Queue a prompt; returns the request's id (request_id, or a number).

        prompt: a text, a list of token ids, or chat messages [{"role": .., "content": ..}, ..],
        which the model's chat template turns into a text. ArgumentError or CapacityError for what
        cannot be answered; nothing is queued then.
        """
        params = params or SamplingParams()
        tokens = check_request(self, prompt, params)
        request_id = next(self._ids) if request_id is None else request_id
        if request_id in self._requests:
            raise ArgumentError(f"request_id: {request_id!r} is being answered already")
        length = min(self.max_model_len, len(tokens) + (params.max_tokens or self.max_model_len))
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        sequences = [
            Sequence(request_id, i, params, tokens, seed_of_answer(seed, i), length)
            for i in range(params.n)
        ]
        for sequence in sequences:
            sequence.reply = Reply(request_id, params, self.tokenizer, self.config.eos_token_ids)
        sequences[0].pending = sequences[1:]
        self._requests[request_id] = sequences
        self._scheduler.add(sequences[0])
        self._num_with_logprobs += params.n * (params.logprobs is not None)
        self.num_prompt_tokens += len(tokens)
        return request_id

    def abort(self, request_id):
        """Drop a request and free what it holds; False when it is not, or no longer, known."""
        self._restart_if_interrupted()
        sequences = self._requests.pop(request_id, None)
        for sequence in sequences or ():
            self._num_with_logprobs -= sequence.params.logprobs is not None
            self._scheduler.finish(sequence)
        return sequences is not None

    def reset_prefix_cache(self):
        """Forget what requests left in it. StateError while one is unfinished."""
        if self._requests:
            raise StateError("reset_prefix_cache: requests are unfinished; step or abort them")
        self.cache.clear()

    def num_generated(self, request_id):
        """{index of an answer: its tokens so far} of those that a request still waits for."""
        sequences = self._requests.get(request_id, ())
        return {s.index: len(s.tokens) - s.num_prompt for s in sequences}

    @property
    def has_work(self):
        return bool(self._requests or self._outputs)

    @property
    def num_waiting(self):
        """Requests that no step has touched yet, or that gave their pages back."""
        return len(self._scheduler.waiting)

    @property
    def is_reading(self):
        """Whether a prompt is being read: the next step is more than decodes."""
        return bool(self._scheduler.reading)

    @property
    def cache_bytes(self):
        """Memory of the KV cache."""
        return sum(group.num_bytes for group in self.cache.groups)

    @property
    def num_preemptions(self):
        """How often a sequence gave its pages back to be read again."""
        return self._scheduler.num_preemptions

    @property
    def num_hit_tokens(self):
        """Of num_prompt_tokens, those found in the prefix cache when their request was admitted."""
        return self._scheduler.prefix.num_hit_tokens

    # ---- steps

    def step(self):
        """One forward pass; returns the Outputs of the answers that have news."""
        self._restart_if_interrupted()
        self._is_interrupted = True
        launched = self._take_ahead() or self._launch(self._scheduler.schedule())
        if launched is not None:
            step, logits, self.last_work = launched
            self._ahead = self._launch(self._follow(step), follows=True)
            self._finish_step(step, logits)
            self.num_steps += 1
        elif self._requests:
            raise StateError("the scheduler has requests but nothing to do")
        self._is_interrupted = False
        return self._take_outputs()

    def generate(self, prompts, params=None, progress=None):
        """Answer a list of prompts; returns a list of lists of Output, n for each prompt.

        params: one SamplingParams for all, or one each. progress: called with the number of
        prompts done, after each step.
        """
        params = list(params) if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(params) != len(prompts):
            raise ArgumentError(f"params: {len(params)} for {len(prompts)} prompts")
        ids, results, others = [], {}, []
        try:
            for prompt, one in zip(prompts, params):
                one = dataclasses.replace(one or SamplingParams(), stream=False)
                ids.append(self.add_request(prompt, one))
                results[ids[-1]] = [None] * one.n
            num_done = 0
            while num_done < len(ids):
                for output in self.step():
                    answers = results.get(output.request_id)
                    if answers is None:
                        others.append(output)
                        continue
                    answers[output.index] = output
                    num_done += None not in answers
                if progress is not None:
                    progress(num_done)
        except BaseException:
            for request_id in ids:
                self.abort(request_id)
            raise
        finally:
            self._outputs = others + self._outputs  # of requests that were there before
        return [results[request_id] for request_id in ids]

    def logits(self, token_ids):
        """Float32 [len(token_ids), vocab_size]: the model's word on what follows each token.

        Runs at once, beside whatever is being answered, in pages that nobody holds at the moment.
        """
        import numpy as np

        tokens = check_ids(token_ids, self.config.vocab_size)
        if len(tokens) > self.max_model_len:
            raise CapacityError(
                f"token_ids: {len(tokens)} tokens, the context has {self.max_model_len}"
            )
        self._restart_if_interrupted()
        if not self.cache.num_free_slots:
            raise CapacityError("logits: all slots are taken; step until a request is done")
        sequence = Sequence(None, 0, None, tokens, 0, len(tokens))
        sequence.slot = self.cache.take_slot()
        pieces = []
        try:
            while sequence.computed < len(tokens):
                count = min(self.max_batch, len(tokens) - sequence.computed)
                if not self.cache.grow(sequence.slot, sequence.computed + count):
                    raise CapacityError("logits: the KV cache is full; step until some are done")
                step = Step([], np.zeros(0, np.int64), [(sequence, count)])
                pieces.append(to_host(self._runner.run(step, all_rows=True)).copy())
                sequence.computed += count
                self.cache.lengths[sequence.slot] = sequence.computed
        finally:
            self.cache.free_slot(sequence.slot)
        return np.concatenate(pieces) if pieces else np.zeros((0, self.config.vocab_size), "f4")

    # ---- inside a step

    def _admitted(self, sequence):
        num_drawn = len(sequence.tokens) - sequence.num_prompt
        self._sampling.set(sequence.slot, sequence.params, sequence.seed, num_drawn)

    def _launch(self, step, follows=False):
        """Queue a step and the drawing of its tokens; (step, logits, work), or None for None."""
        if step is None:
            return None
        work = self._scheduler.work_of(step)
        logits = self._runner.run(step, follows=follows)
        self._scheduler.commit(step)
        if step.samples:
            out = None if step.chunks else self._runner.next_ids(step)
            self._drawn.start(self._sampling.draw(logits, step.sample_slots(), out))
        return step, logits, work

    def _follow(self, step):
        """The step that can be launched before the tokens of this one are known, or None."""
        if not self._runner.runs_ahead or self._num_with_logprobs:  # logprobs are read from logits
            return None
        return self._scheduler.follow(step)

    def _take_ahead(self):
        """What was launched before its turn, unless all of its sequences have ended since."""
        launched, self._ahead = self._ahead, None
        if launched and all(sequence.slot is None for sequence in launched[0].samples):
            self._drawn.wait()
            return None
        return launched

    def _finish_step(self, step, logits):
        """Read a step's tokens, and tell those who have news."""
        if not step.samples:
            return
        ids = self._drawn.wait().numpy().tolist()
        logprobs = {}
        if self._num_with_logprobs:
            logprobs = draw_logprobs(logits, ids, [s.params.logprobs for s in step.samples])
        told = []
        for i, (sequence, token) in enumerate(zip(step.samples, ids)):
            if sequence.slot is None:  # it ended while the step was under way
                continue
            reply = sequence.reply
            if token < 0:
                sequence.finish_reason = "error"
            else:
                sequence.tokens.append(token)
                self.num_output_tokens += 1
                if reply.is_quiet and not reply.ends_with(token, sequence):
                    continue  # nothing to tell: the common case, and there are many
                reply.advance(sequence, logprobs.get(i))
            told.append(sequence)
        for sequence in told:
            output = sequence.reply.output(sequence)
            if output is not None:
                self._outputs.append(output)
            if sequence.finish_reason is not None:
                self._retire(sequence)

    def _retire(self, sequence):
        self._scheduler.finish(sequence)
        self._num_with_logprobs -= sequence.params.logprobs is not None
        left = self._requests[sequence.request]
        left.remove(sequence)
        if not left:
            del self._requests[sequence.request]

    def _restart_if_interrupted(self):
        """After a step that was broken off: retire what is done, compute the rest again."""
        if not self._is_interrupted:
            return
        self._scheduler.restart([])
        self._ahead, self._drawn = None, _core.Readback(self.max_batch, self.device)
        for sequences in list(self._requests.values()):
            for sequence in list(sequences):
                sequence.slot, sequence.pending = None, []
                if sequence.finish_reason is not None:
                    output = sequence.reply.output(sequence)
                    if output is not None:
                        self._outputs.append(output)
                    self._retire(sequence)
                else:
                    sequence.reply.forget_unseen(sequence)
        self._scheduler.restart([s for group in self._requests.values() for s in group])
        self._is_interrupted = False

    def _take_outputs(self):
        outputs, self._outputs = self._outputs, []
        return outputs


def _check_size(name, value):
    if type(value) is not int or value < 1:
        raise ArgumentError(f"{name}: expected an integer of 1 or more, got {value!r}")
