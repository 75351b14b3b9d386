"""Who holds which page of the KV cache.

A page is `page_size` tokens of K and V in every layer of a group. Layers with the same attention
window form a group with its own pool, because a windowed layer can give back pages that no later
query sees. Pages are counted references: sequences that share a prompt share its pages, and the
first one to write into a shared page gets a copy of it (only ever the partly filled last one).

Each running sequence has a slot, a row of the arrays here. Arrays are indexed by slot so that a
step's index arrays come from a few NumPy gathers, whatever the batch.
"""

from ..errors import CapacityError


class PagePool:
    """Page ids 0..num_pages-1 with reference counts."""

    def __init__(self, num_pages):
        self.num_pages = num_pages
        self.peak_used = 0
        self.clear()

    def clear(self):
        """Every page is free."""
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._refs = [0] * self.num_pages

    @property
    def num_free(self):
        return len(self._free)

    @property
    def num_used(self):
        return self.num_pages - len(self._free)

    def allocate(self, count):
        """`count` page ids with one reference each; CapacityError leaves everything as it was."""
        if count > len(self._free):
            raise CapacityError(f"KV cache: {count} pages wanted, {len(self._free)} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        self.peak_used = max(self.peak_used, self.num_used)
        return pages

    def share(self, pages):
        for page in pages:
            self._refs[page] += 1

    def release(self, pages):
        """Drop one reference of each; a page without any is free again."""
        for page in pages:
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._free.append(page)

    def is_shared(self, page):
        return self._refs[page] > 1


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
        """Make room for tokens length..new_length-1; the pages must be free (pages_short)."""
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
        pages = self.table[slot, : self.held[slot]].tolist()
        self.held[slot] = self.dropped[slot] = 0
        self.pool.release(pages)

    def rows(self, slots, positions):
        """Where tokens live: page * page_size + offset, int32, for a slot and position each."""
        pages = self.table[slots, positions // self.page_size - self.dropped[slots]]
        return pages * self.page_size + positions % self.page_size

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

    def has_room(self, num_tokens):
        """Whether a new sequence of so many tokens would find its pages free."""
        return all(
            min(-(-num_tokens // self.page_size), group.max_blocks) <= group.pool.num_free
            for group in self.groups
        )

    def grow(self, slot, new_length):
        """Make room for a slot's tokens up to new_length; False, and no change, when there is none.

        A windowed group first gives back what the next query no longer sees.
        """
        length = int(self.lengths[slot])
        for group in self.groups:
            group.drop_unseen(slot, length)
        for group in self.groups:
            if group.pages_short(slot, length, new_length) > group.pool.num_free:
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
            group.window_left < 0 and group.pool.num_free >= len(chosen) for group in self.groups
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
