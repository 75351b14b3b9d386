"""The scheduler for an engine: what each step does, of requests whose outputs end when they end.

How vLLM's loop would call it. A class named by --scheduler-cls stands in for v1's Scheduler and has
one of these. pool_tokens is what its block pool has: (num_gpu_blocks - 1) x block_size, less a
block for each request that may run, whose last one is not full; the block_size of Requests is its
own or a multiple; step_tokens is max_num_batched_tokens. schedule() calls step(): of preempted it
frees the blocks (kv_cache_manager.free) and names them in preempted_req_ids; of each chunk it takes
blocks (get_computed_blocks where chunk_is_first, then allocate_slots) and writes
num_scheduled_tokens[id] = chunk_count, for every request that decodes 1. What get_computed_blocks
finds is what counts: where it is less than chunk_begin, blocks went that the scheduler thinks are
there, and a chunk has that many tokens more; where it is more, fewer. allocate_slots gives None
only where that difference ate the room, which kv_cache_manager.block_pool.get_num_free_blocks() x
block_size, as free_tokens of step(), tells beforehand. update_from_output() finds out who stopped
and calls retire() with them; a request that was aborted is named once it gives a token. With async
scheduling, a step ahead, retire() gets those that reach max_tokens at once, and those that a stop
token ended a step later, whose last token is thrown away; one that stepped back meanwhile comes
back for a token more.

How SGLang's loop would call it. event_loop_normal calls get_next_batch_to_run(), which here calls
step() in place of the policy (SchedulePolicy.calc_priority) and of PrefillAdder. pool_tokens is
max_total_num_tokens, the block_size of Requests page_size or a multiple, step_tokens
chunked_prefill_size with enable_mixed_chunk. preempted is what retract_decode() picks otherwise
(release_req gives their room back); chunks are requests of the waiting queue with extend_input_len
= chunk_count, the one without chunk_is_last is the chunked_req. What is free is
token_to_kv_pool_allocator.available_size() + tree_cache.evictable_size(), which is free_tokens, and
match_prefix says what is in memory, as above. process_batch_result() asks each request whether it
is finished() and calls retire() with those that are. Without mixed chunks a step with chunks is run
as two batches, the chunks' and the others', and ends after both.

One that runs in threads or on several ranks has one scheduler, where the batches are made: the same
arguments and the same ended give the same steps, so that ranks may as well have one each.
"""

from dataclasses import dataclass

from .. import _core
from ..errors import ArgumentError, DTypeError
from .cost import CostModel
from .requests import Requests

__all__ = ["Scheduler", "Step"]


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """What an engine does at once. Arrays are NumPy's, copies that stay as they are; requests are
    indices of Requests.

    Before all else preempted [n] step back, int32: their K and V is gone, and what they generated
    is computed again, as a part of the prompt, when they come back. Then each request that decodes
    gives one token: all whose last chunk came in an earlier step, which neither ended nor stepped
    back; they are not listed, as nothing is done for each of them. Last, chunk i of [m] computes
    the tokens [chunk_begin[i], chunk_begin[i] + chunk_count[i]) of chunk_request[i]'s prompt
    (int32), behind which stands what it generated before it stepped back. chunk_is_first[i] (bool):
    it begins to run; what lies before chunk_begin[i] then is in memory, shared with others.
    chunk_is_last[i]: it ends the prompt, and gives a token in this step."""

    preempted: object
    chunk_request: object
    chunk_begin: object
    chunk_count: object
    chunk_is_first: object
    chunk_is_last: object
    num_decoding: int  # requests that decode
    tokens: int  # through the GEMMs: num_decoding and all chunks
    scores: float  # query-key pairs of the chunks' attention
    reads: float  # tokens of K and V that those that decode read
    prompt_tokens: int  # of prompts that end in this step
    hit_tokens: int  # of them, that were found in memory
    seconds: float  # that it takes by the cost model

    @property
    def admitted(self):
        """Requests that begin to run, int32."""
        return self.chunk_request[self.chunk_is_first]


class Scheduler:
    """Says what each step of an engine does; the engine says who gave a last token in it.

        scheduler = Scheduler(requests, cost, pool_tokens=400_000, lengths="guess")
        while not scheduler.done:
            step = scheduler.step()
            ...  # run it: num_decoding tokens, and the chunks
            scheduler.retire(ended)

    requests: Requests, kept alive. cost: a CostModel. policy: of policy_names(). pool_tokens: of K
    and V in memory, shared prefixes once. step_tokens: the most through the GEMMs of a step, and
    the most requests that run at once. seed: of the policy "random".

    lengths: what is thought of outputs. "known": what the requests say is the truth (of an OpenAI
    file that is max_tokens), and where they say nothing it is guessed. "guess": only seen is known,
    int32 or int64 [num_requests], -1 where a length was not seen, as from an earlier run of some
    (Requests.sample). Guesses come from requests of the same source and of like prefixes; they are
    looked at again as requests end, but the order is made once: where nothing was seen (None) all
    are thought to be max_tokens then, and it is made by that. A request must end at max_tokens at
    the latest; prompt and max_tokens (or output_length, where it is known) must fit into the pool.

    Decodes come first in a step, chunks of prompts fill it; a request is admitted when its peak
    fits, as far as outputs are known. When the pool overflows, the newest steps back. After
    BlendServe (arXiv 2411.16102); what vLLM and SGLang would call is said above, in this module.
    The same arguments and the same ended give the same steps.

    A call that raises leaves all as it was, unless memory ran out within step() or retire(), after
    which all raise StateError. One thread at a time: another one's call while one is inside raises
    StateError (done and counts() may be asked any time); other Python threads run meanwhile. Raises
    ArgumentError for an unknown policy or a request that is larger than the pool, ShapeError and
    DTypeError for arrays that do not fit.
    """

    def __init__(
        self,
        requests,
        cost,
        *,
        policy="paced",
        pool_tokens,
        step_tokens=2048,
        lengths="known",
        seen=None,
        seed=0,
    ):
        if not isinstance(requests, Requests):
            raise DTypeError(f"requests: expected Requests, got {type(requests).__name__}")
        if not isinstance(cost, CostModel):
            raise DTypeError(f"cost: expected a CostModel, got {type(cost).__name__}")
        seen = _seen(requests, lengths, seen)
        self._core = _core.BlendScheduler(
            requests._core, policy, cost.to_dict(), pool_tokens, step_tokens, seed, seen
        )
        self._num_requests = requests.num_requests

    def step(self, free_tokens=None):
        """Begin the next step; returns a Step. retire() ends it.

        free_tokens: of K and V that the engine has room for now, beside what its running requests
        hold (prefixes that it may evict count as free), where that may be less than pool_tokens
        leaves; 0 or more. Decodes that find no room step back, nobody begins that does not fit, and
        prompts that are being computed keep the room that they were admitted with. None: what
        pool_tokens leaves.

        When all is done the step is empty, and with free_tokens also when nothing fits: retire
        nobody, and ask again when there is more room. Raises StateError when the last step has not
        ended, and without free_tokens when nothing can run because a request generated more than it
        said; DTypeError and ArgumentError for what is no such number.
        """
        *arrays, decoding, tokens, scores, reads, prompts, hits, seconds = self._core.step(
            free_tokens
        )
        return Step(
            *(array.numpy() for array in arrays),
            num_decoding=decoding,
            tokens=int(tokens),
            scores=scores,
            reads=reads,
            prompt_tokens=prompts,
            hit_tokens=hits,
            seconds=seconds,
        )

    def retire(self, ended):
        """End the step. ended: the requests that gave their last token in it, of those that decode
        and those with chunk_is_last: int32 or int64 [..] on the host, a list or a tuple. Their
        order says no more than whose prefix was used last.

        Raises StateError without a step; ArgumentError for one that gave no token in it, or that is
        named twice; DTypeError and ShapeError for what is no list of integers.
        """
        self._core.retire(ended)

    @property
    def done(self):
        """Whether all requests gave their last tokens."""
        return self._core.num_done == self._num_requests

    def generated(self, request):
        """Tokens that a request has given up to the last step that ended; 0 before it ran.

        Raises ArgumentError when there is no such request.
        """
        return self._core.generated(request)

    def counts(self):
        """A dict of integers. Up to the step at hand: preemptions, computed_tokens (through the
        GEMMs), recomputed_tokens (of them, after preemptions), hit_tokens (of prompts, that were
        found in memory; each prompt once), held_tokens and peak_tokens (of K and V: now; at most),
        requests running (in memory) and decoding. Up to the last that ended: steps, requests
        done."""
        return self._core.counts()


def _seen(requests, lengths, seen):
    """As the core takes it: None, or [num_requests] with -1 where nothing is known."""
    import numpy

    if lengths == "known":
        if seen is not None:
            raise ArgumentError('seen: goes with lengths="guess"; the requests say what is known')
        return None
    if lengths != "guess":
        raise ArgumentError(f'lengths: expected "known" or "guess", got {lengths!r}')
    return numpy.full(requests.num_requests, -1, numpy.int32) if seen is None else seen
