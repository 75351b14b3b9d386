"""Who holds which page of the KV cache.

A page is `page_size` tokens of K and V in every layer of a group. Layers with the same attention
window form a group with its own pool, because a windowed layer can give back pages that no later
query sees. Pages are counted references: sequences that share a prompt share its pages, and the
first one to write into a shared page gets a copy of it (only ever the partly filled last one).

A full page may be published under a digest of its tokens and all before them, which prefix.py
computes. It then outlives its sequence, until its memory is needed.

Each running sequence has a slot, a row of the arrays here. Arrays are indexed by slot so that a
step's index arrays come from a few NumPy gathers, whatever the batch.
"""

from bisect import bisect_left
from collections import OrderedDict

from ..errors import CapacityError


class PagePool:
    """Page ids 0..num_pages-1. A page is free, held (references are counted), or evictable: it is
    published and nobody holds it.

    Allocation takes free pages, then evicts: pages that no waiting request reads before the others,
    and of each kind the one that was released first.
    """

    def __init__(self, num_pages):
        self.num_pages = num_pages
        self.peak_used = 0
        self.clear()

    def clear(self):
        """Every page is free."""
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._refs = [0] * self.num_pages
        self._digests = [None] * self.num_pages  # of the published pages
        self._published = {}  # digest -> page
        self._readers = {}  # digest -> waiting requests that read it, published or not
        self._unread, self._awaited = OrderedDict(), OrderedDict()  # evictable pages, next first

    @property
    def num_free(self):
        return len(self._free)

    @property
    def num_evictable(self):
        return len(self._unread) + len(self._awaited)

    @property
    def num_available(self):
        """Pages that allocate() can give."""
        return len(self._free) + len(self._unread) + len(self._awaited)

    @property
    def num_used(self):
        return self.num_pages - self.num_available

    def allocate(self, count):
        """`count` page ids with one reference each; CapacityError leaves everything as it was."""
        if count > self.num_available:
            raise CapacityError(
                f"KV cache: {count} pages wanted, {self.num_available} are free or evictable"
            )
        while len(self._free) < count:
            self._evict()
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        self.peak_used = max(self.peak_used, self.num_used)
        return pages

    def share(self, pages):
        for page in pages:
            if self._refs[page] == 0:
                del self._queue(self._digests[page])[page]
            self._refs[page] += 1
        self.peak_used = max(self.peak_used, self.num_used)

    def release(self, pages):
        """Drop one reference of each; a page without any is free again, or evictable."""
        for page in pages:
            self._refs[page] -= 1
            if self._refs[page] == 0:
                digest = self._digests[page]
                if digest is None:
                    self._free.append(page)
                else:
                    self._queue(digest)[page] = None

    def is_shared(self, page):
        return self._refs[page] > 1

    def is_held(self, digest):
        """Whether a page is published under this digest, and somebody holds it."""
        page = self._published.get(digest)
        return page is not None and self._refs[page] > 0

    def find(self, digest):
        """The page that is published under this digest, or None."""
        return self._published.get(digest)

    def publish(self, page, digest):
        """Let a page that is held, and will not change, be found. The digest must be new."""
        self._published[digest] = page
        self._digests[page] = digest

    def add_reader(self, digest):
        """A waiting request reads this block."""
        self._readers[digest] = self._readers.get(digest, 0) + 1
        self._requeue(digest)

    def remove_reader(self, digest):
        self._readers[digest] -= 1
        if self._readers[digest] == 0:
            del self._readers[digest]
            self._requeue(digest)

    def _queue(self, digest):
        return self._awaited if digest in self._readers else self._unread

    def _requeue(self, digest):
        """Evictable pages go to the end of the queue that they belong to now."""
        page = self._published.get(digest)
        if page is not None and self._refs[page] == 0:
            self._unread.pop(page, None)
            self._awaited.pop(page, None)
            self._queue(digest)[page] = None

    def _evict(self):
        page, _ = (self._unread or self._awaited).popitem(last=False)
        del self._published[self._digests[page]]
        self._digests[page] = None
        self._free.append(page)


class KVGroup:
    """The page tables, and the K/V tensors, of the layers that share one attention window.

    table[slot, :held[slot]] are the live pages of a slot, oldest first; `dropped[slot]` pages came
    before them and are gone. caches[i] is [pages, 2, page_size, kv_heads, head_dim] of layers[i].
    """

    def __init__(self, layers, window_left, page_size, num_pages, max_slots, max_blocks, caches):
        import numpy as np

        self.layers = tuple(layers)
        self.window_left = window_left
        self.page_size = page_size
        self.caches = caches
        self.pool = PagePool(num_pages)
        self.max_blocks = max_blocks
        self.table = np.zeros((max_slots, max_blocks), np.int32)
        self.held = np.zeros(max_slots, np.int32)
        self.dropped = np.zeros(max_slots, np.int32)

    @property
    def num_bytes(self):
        return sum(cache.nbytes for cache in self.caches)

    def clear(self):
        self.held[:] = 0
        self.dropped[:] = 0
        self.pool.clear()

    def pages_short(self, slot, length, new_length):
        """Pages to allocate before tokens length..new_length-1 of a slot can be written."""
        held, first = int(self.held[slot]), int(self.dropped[slot])
        short = max(0, -(-new_length // self.page_size) - first - held)
        return short + (self._shared_tail(slot, length) is not None)

    def grow(self, slot, length, new_length):
        """Make room for tokens length..new_length-1; the pages must be there (pages_short)."""
        tail = self._shared_tail(slot, length)
        if tail is not None:
            self._copy_on_write(slot, tail)
        held, first = int(self.held[slot]), int(self.dropped[slot])
        short = -(-new_length // self.page_size) - first - held
        if short > 0:
            self.table[slot, held : held + short] = self.pool.allocate(short)
            self.held[slot] = held + short

    def drop_unseen(self, slot, first_query):
        """Give back the pages that the query at position first_query, and any later one, skips."""
        if self.window_left < 0:
            return
        first_seen = max(0, first_query - self.window_left)
        count = min(first_seen // self.page_size - int(self.dropped[slot]), int(self.held[slot]))
        if count > 0:
            row, held = self.table[slot], int(self.held[slot])
            gone = row[:count].tolist()
            row[: held - count] = row[count:held].copy()
            self.held[slot] = held - count
            self.dropped[slot] += count
            self.pool.release(gone)

    def fork(self, parent, child):
        """Let slot `child` hold all that `parent` holds."""
        held = int(self.held[parent])
        self.pool.share(self.table[parent, :held].tolist())
        self.table[child, :held] = self.table[parent, :held]
        self.held[child], self.dropped[child] = held, self.dropped[parent]

    def release(self, slot):
        """Drop all that a slot holds, the last page first: it is the one to evict first."""
        pages = self.table[slot, : self.held[slot]].tolist()
        self.held[slot] = self.dropped[slot] = 0
        self.pool.release(reversed(pages))

    def count_cached(self, digests, count):
        """How many of the first `count` blocks a new sequence can begin with: the pages of all of
        them, or of those in the window of the query that follows, are published."""
        find = self.pool.find
        if self.window_left < 0:  # a published block's parent is published too
            return bisect_left(digests, True, 0, count, key=lambda digest: find(digest) is None)
        block = count
        while block > self._first_seen_block(count):
            block -= 1
            if find(digests[block]) is None:
                count = block
        return count

    def take(self, slot, digests):
        """Let an empty slot hold the published pages of these blocks that its next query sees."""
        first = self._first_seen_block(len(digests))
        pages = [self.pool.find(digest) for digest in digests[first:]]
        self.pool.share(pages)
        self.table[slot, : len(pages)] = pages
        self.held[slot], self.dropped[slot] = len(pages), first

    def publish(self, slot, block, digest):
        """Publish a slot's page, or take the page of that digest in its place."""
        column = block - int(self.dropped[slot])
        if column < 0:  # out of the window, and gone
            return
        page, published = int(self.table[slot, column]), self.pool.find(digest)
        if published is None:
            self.pool.publish(page, digest)
        elif published != page:
            self.pool.share([published])
            self.table[slot, column] = published
            self.pool.release([page])

    def has_room(self, num_tokens, digests):
        """Whether a new sequence of so many tokens that begins with these published blocks would
        find its pages, those of the window where there is one."""
        num_pages = min(-(-num_tokens // self.page_size), self.max_blocks)
        if self.window_left < 0:  # who holds a block holds those before it
            is_held = self.pool.is_held
            num_pages -= bisect_left(digests, True, key=lambda digest: not is_held(digest))
        return num_pages <= self.pool.num_available

    def rows(self, slots, positions):
        """Where tokens live: page * page_size + offset, int32, for a slot and position each."""
        pages = self.table[slots, positions // self.page_size - self.dropped[slots]]
        return pages * self.page_size + positions % self.page_size

    def _first_seen_block(self, num_blocks):
        """Of the query that comes after so many blocks."""
        if self.window_left < 0:
            return 0
        return max(0, num_blocks * self.page_size - self.window_left) // self.page_size

    def _shared_tail(self, slot, length):
        """The table column of the page that the next token goes to, if others hold it too."""
        column = length // self.page_size - int(self.dropped[slot])
        if length % self.page_size == 0 or column >= self.held[slot]:
            return None
        return column if self.pool.is_shared(int(self.table[slot, column])) else None

    def _copy_on_write(self, slot, column):
        old = int(self.table[slot, column])
        (page,) = self.pool.allocate(1)
        try:
            for cache in self.caches:
                cache[page : page + 1].copy_(cache[old : old + 1])
        except BaseException:  # also Ctrl-C: the slot still reads the old page
            self.pool.release([page])
            raise
        self.table[slot, column] = page
        self.pool.release([old])


class KVCache:
    """All groups of a model, and how many tokens each slot has written."""

    def __init__(self, groups, page_size, max_slots):
        import numpy as np

        self.groups = groups
        self.page_size = page_size
        self.lengths = np.zeros(max_slots, np.int32)
        self._tail_shared = np.zeros(max_slots, bool)
        self._free_slots = []
        self.clear()

    def clear(self):
        """Forget all sequences: every slot and page is free, whatever was going on."""
        self.lengths[:] = 0
        self._tail_shared[:] = False
        self._free_slots[:] = range(len(self.lengths) - 1, -1, -1)
        for group in self.groups:
            group.clear()

    @property
    def num_free_slots(self):
        return len(self._free_slots)

    @property
    def max_length(self):
        """Tokens that one sequence alone can always hold; a whole window counts as any number."""
        bounds = [
            group.pool.num_pages * self.page_size
            for group in self.groups
            if group.window_left < 0 or group.pool.num_pages < group.max_blocks
        ]
        return min(bounds, default=(1 << 31) - 1)

    def take_slot(self):
        return self._free_slots.pop()

    def free_slot(self, slot):
        """Give back a slot and its pages."""
        for group in self.groups:
            group.release(slot)
        self.lengths[slot] = 0
        self._tail_shared[slot] = False
        self._free_slots.append(slot)

    def has_room(self, num_tokens, digests=()):
        """Whether a new sequence of so many tokens, beginning with these published blocks, fits."""
        return all(group.has_room(num_tokens, digests) for group in self.groups)

    def grow(self, slot, new_length):
        """Make room for a slot's tokens up to new_length; False, and no change, when there is none.

        A windowed group first gives back what the next query no longer sees.
        """
        length = int(self.lengths[slot])
        for group in self.groups:
            group.drop_unseen(slot, length)
        for group in self.groups:
            if group.pages_short(slot, length, new_length) > group.pool.num_available:
                return False
        for group in self.groups:
            group.grow(slot, length, new_length)
        self._tail_shared[slot] = False
        return True

    def grow_by_one(self, slots):
        """Make room for one more token of each slot where that is simple: a fresh page, no window.

        Returns the positions in slots of those that grow() must see to, one after the other.
        """
        first = self.groups[0]  # all groups have pages for the same tokens
        is_full = (first.held + first.dropped)[slots] * self.page_size <= self.lengths[slots]
        needing = (is_full | self._tail_shared[slots]).nonzero()[0]
        if not len(needing):
            return ()
        chosen = slots[needing]
        is_simple = not self._tail_shared[chosen].any() and all(
            group.window_left < 0 and group.pool.num_available >= len(chosen)
            for group in self.groups
        )
        if not is_simple:
            return needing.tolist()
        for group in self.groups:
            held = group.held[chosen]
            group.table[chosen, held] = group.pool.allocate(len(chosen))
            group.held[chosen] = held + 1
        return ()

    def fork(self, parent, child):
        for group in self.groups:
            group.fork(parent, child)
        self.lengths[child] = self.lengths[parent]
        self._tail_shared[[parent, child]] = self.lengths[parent] % self.page_size != 0
