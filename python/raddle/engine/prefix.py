"""The prefix cache: K and V of tokens that were computed before are found, not computed again.

A block is the tokens of one full page. Its digest is that of its parent's digest and its token ids,
so that equal digests mean equal tokens from the first on (128 bits of BLAKE2b: a collision, which
would give wrong text, is not looked for). A block's page, one in each KV group, is published once
its sequence has computed it, and shared by all that begin with the same tokens. This holds for what
a model wrote too: the next turn of a chat finds it.

Groups without a window are prefix-closed: whoever holds a block's page holds its parent's, both
published, and lets go of the child first. So a parent is never evicted before its children, and the
longest published prefix is found by bisection. Layers with a window need the blocks of the window.

A hit moves the border between what is read from pages and what is computed in one piece, as another
max_tokens_per_step does, and with it the last bits of logits. In float32, greedy text is the same;
in 16 bits it may part where two tokens are about equally likely.

Ranks of one engine decide alike: nothing here depends on time, memory addresses or Python's hash().
"""

from array import array
from hashlib import blake2b

_ROOT = b""  # the parent of a first block
_DIGEST_BYTES = 16


def block_digest(parent, tokens):
    """The digest of a full block behind the one with the digest parent (b"": a first block)."""
    data = parent + array("i", tokens).tobytes()
    return blake2b(data, digest_size=_DIGEST_BYTES).digest()


class PrefixCache:
    """Finds and publishes the blocks of a Scheduler's Sequences in the groups of a KVCache.

    When it is not enabled, no block has a digest: none is ever found or published.
    num_hit_tokens: of all prompts, what each found when it was first admitted.
    """

    def __init__(self, cache, is_enabled=True):
        self._cache, self._page_size = cache, cache.page_size
        self._pools = [group.pool for group in cache.groups]
        self._is_enabled = is_enabled
        self.num_hit_tokens = 0

    def add_reader(self, sequence):
        """A sequence waits: what it will read is evicted last."""
        for digest in reversed(self._readable(sequence)):  # a child stays ahead of its parent
            for pool in self._pools:
                pool.add_reader(digest)

    def remove_reader(self, sequence):
        for digest in reversed(self._readable(sequence)):
            for pool in self._pools:
                pool.remove_reader(digest)

    def match(self, sequence):
        """The digests of the longest published prefix that a waiting sequence can begin with."""
        digests = self._readable(sequence)
        count, longest = len(digests), None
        while count != longest:  # until every group can supply what its window needs
            longest = count
            for group in self._cache.groups:
                count = group.count_cached(digests, count)
        return digests[:count]

    def take(self, sequence, digests):
        """Let a sequence with an empty slot begin with what match() found."""
        for group in self._cache.groups:
            group.take(sequence.slot, digests)
        sequence.computed = len(digests) * self._page_size
        sequence.num_published = len(digests)
        self._cache.lengths[sequence.slot] = sequence.computed
        if sequence.num_cached_tokens is None:
            for member in (sequence, *sequence.pending):
                member.num_cached_tokens = sequence.computed
            if sequence.index == 0:  # of n answers, one counts
                self.num_hit_tokens += sequence.computed

    def promise(self, sequence, length):
        """Publish the blocks before `length` that the coming step writes.

        Others may join that step with them: in each layer, K and V of all rows are written before
        any row attends. A step that is broken off must be followed by KVCache.clear().
        """
        digests = self._digests(sequence, length)
        for block in range(sequence.num_published, len(digests)):
            if any(pool.find(digests[block]) is not None for pool in self._pools):
                return  # publish() will take that page, but a step may not write into it
            self._publish(sequence, block)

    def publish(self, sequence, length):
        """Publish the blocks before `length`, all of them written. Where another sequence was
        first, its page takes the place of this one's."""
        for block in range(sequence.num_published, len(self._digests(sequence, length))):
            self._publish(sequence, block)

    def _readable(self, sequence):
        """Digests of the blocks that leave at least one token to compute: its logits are needed."""
        return self._digests(sequence, len(sequence.tokens) - 1)

    def _publish(self, sequence, block):
        for group in self._cache.groups:
            group.publish(sequence.slot, block, sequence.digests[block])
        sequence.num_published = block + 1

    def _digests(self, sequence, length):
        """Of the full blocks before `length`; each is computed once."""
        size, digests = self._page_size, sequence.digests
        count = length // size if self._is_enabled else 0
        for i in range(len(digests), count):
            parent = digests[-1] if digests else _ROOT
            digests.append(block_digest(parent, sequence.tokens[i * size : (i + 1) * size]))
        return digests[:count]
