"""The engine's parts by themselves: pages, scheduler, stop texts, detokenisers, weights, ranks.

Needs: numpy; safetensors for the ranks; tokenizers for the detokenisers and a folder's templates.
"""

import json
import threading

import numpy as np
import pytest
from raddle.engine import ModelConfig
from raddle.engine.model import Communicator, Model
from raddle.engine.pages import KVCache, KVGroup, PagePool
from raddle.engine.sampling import StopStrings
from raddle.engine.scheduler import Scheduler, Sequence
from raddle.engine.weights import convert, open_weights
from raddle.errors import ArgumentError, CapacityError

from tests.reference import llama

# ---- pages


def test_pool_counts_references():
    pool = PagePool(4)
    pages = pool.allocate(3)
    assert len(set(pages)) == 3 and pool.num_free == 1
    with pytest.raises(CapacityError, match="2 pages wanted, 1 are free"):
        pool.allocate(2)
    pool.share(pages[:2])
    pool.release(pages)
    assert pool.num_used == 2 and not pool.is_shared(pages[0])
    pool.release(pages[:2])
    assert pool.num_used == 0 and pool.peak_used == 3
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


class Pages:
    """A stand-in for a layer's K/V: remembers which page was copied to which."""

    def __init__(self, page=None, copies=None):
        self.page, self.copies = page, [] if copies is None else copies

    def __getitem__(self, where):
        return Pages(where.start, self.copies)

    def copy_(self, source):
        self.copies.append((source.page, self.page))


def make_cache(num_pages, page_size=4, max_slots=4, window=-1, max_blocks=64):
    layers = [Pages(), Pages()]
    group = KVGroup([0, 1], window, page_size, num_pages, max_slots, max_blocks, layers)
    return KVCache([group], page_size, max_slots), group


def held(group, slot):
    return group.table[slot, : group.held[slot]].tolist()


def test_a_shared_page_is_copied_by_the_first_writer():
    cache, group = make_cache(8)
    parent, child = cache.take_slot(), cache.take_slot()
    assert cache.grow(parent, 6)
    cache.lengths[parent] = 6
    cache.fork(parent, child)
    assert held(group, parent) == held(group, child) and group.pool.num_used == 2
    full, tail = held(group, parent)
    assert cache.grow_by_one(np.array([parent, child])) == [0, 1]
    assert cache.grow(child, 7)
    assert held(group, child)[0] == full and held(group, child)[1] != tail
    copy = (tail, held(group, child)[1])
    assert group.caches[0].copies == [copy] and group.caches[1].copies == [copy]
    assert cache.grow(parent, 7)  # alone on its page now: nothing to copy
    assert held(group, parent) == [full, tail] and len(group.caches[0].copies) == 1
    cache.free_slot(parent)
    assert group.pool.num_used == 2
    cache.free_slot(child)
    assert group.pool.num_used == 0 and cache.num_free_slots == 4


def test_a_fork_at_the_end_of_a_page_copies_nothing():
    cache, group = make_cache(8)
    parent, child = cache.take_slot(), cache.take_slot()
    cache.grow(parent, 8)
    cache.lengths[parent] = 8
    cache.fork(parent, child)
    assert cache.grow(parent, 9) and cache.grow(child, 9)
    assert held(group, parent)[:2] == held(group, child)[:2]
    assert held(group, parent)[2] != held(group, child)[2]
    assert not group.caches[0].copies


def test_growth_that_does_not_fit_changes_nothing():
    cache, group = make_cache(3)
    slot = cache.take_slot()
    assert cache.grow(slot, 8)
    before = held(group, slot), group.pool.num_free
    assert not cache.grow(slot, 17)
    assert (held(group, slot), group.pool.num_free) == before
    assert cache.has_room(4) and not cache.has_room(5)
    assert cache.max_length == 12


def test_windowed_pages_are_given_back():
    cache, group = make_cache(6, window=5)
    slot = cache.take_slot()
    for length in range(40):
        assert cache.grow(slot, length + 1)
        first = max(0, length - 5)
        assert group.dropped[slot] == first // 4
        rows = group.rows(np.array([slot]), np.array([length], np.int32))
        page = held(group, slot)[length // 4 - group.dropped[slot]]
        assert rows.tolist() == [page * 4 + length % 4]
        cache.lengths[slot] = length + 1
        assert group.pool.num_used <= 3
    cache.free_slot(slot)
    assert group.pool.num_used == 0


# ---- scheduler


def test_scheduler_at_random():
    """Every sequence is computed whole, in order, within budget, slots and pages."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        num_slots, budget = int(rng.integers(2, 7)), int(rng.integers(8, 40))
        cache, group = make_cache(int(rng.integers(16, 30)), max_slots=num_slots)
        scheduler, unfinished = Scheduler(cache, budget), []
        for i in range(15):
            tokens = list(range(int(rng.integers(1, 40))))
            length = len(tokens) + int(rng.integers(1, 20))
            n = int(rng.integers(1, min(3, num_slots) + 1))
            family = [Sequence(i, k, None, tokens, 0, length) for k in range(n)]
            family[0].pending = family[1:]
            scheduler.add(family[0])
            unfinished += family
        steps = 0
        while unfinished:
            step = scheduler.schedule()
            assert step is not None and 0 < step.num_tokens <= budget
            check_step(step, group, cache)
            scheduler.commit(step)
            for sequence in step.samples:
                sequence.tokens.append(0)
                if len(sequence.tokens) == sequence.max_length:
                    scheduler.finish(sequence)
                    unfinished.remove(sequence)
            steps += 1
            assert steps < 5000
        assert scheduler.schedule() is None
        assert group.pool.num_used == 0 and cache.num_free_slots == num_slots
    assert scheduler.num_preemptions >= 0


def check_step(step, group, cache):
    """What a step writes lies in pages of its own."""
    written = []
    work = [(s, 1) for s in step.decodes] + step.chunks
    assert len({s.slot for s, _ in work}) == len(work)
    for sequence, count in work:
        assert cache.lengths[sequence.slot] == sequence.computed
        assert sequence.computed + count <= len(sequence.tokens)
        positions = np.arange(sequence.computed, sequence.computed + count, dtype=np.int32)
        rows = group.rows(np.full(count, sequence.slot), positions)
        for page in set((rows // group.page_size).tolist()):
            assert not group.pool.is_shared(page)
        written += rows.tolist()
    assert len(set(written)) == len(written)


def test_decodes_come_first_and_prompts_fill_the_rest():
    cache, _ = make_cache(64, max_slots=4)
    scheduler = Scheduler(cache, 10)
    first, second = (Sequence(i, 0, None, list(range(12)), 0, 99) for i in range(2))
    scheduler.add(first)
    scheduler.add(second)
    sizes = []
    for _ in range(4):
        step = scheduler.schedule()
        sizes.append((len(step.decodes), [(s.request, count) for s, count in step.chunks]))
        scheduler.commit(step)
        for sequence in step.samples:
            sequence.tokens.append(0)
    assert sizes == [(0, [(0, 10)]), (0, [(0, 2), (1, 8)]), (1, [(1, 4)]), (2, [])]


# ---- stop texts


def test_stop_strings_wherever_pieces_are_cut():
    rng = np.random.default_rng(0)
    for _ in range(400):
        text = "".join(rng.choice(list("ab"), 30))
        stops = ["".join(rng.choice(list("ab"), int(rng.integers(1, 6)))) for _ in range(2)]
        cuts = sorted(rng.integers(0, 30, 5).tolist())
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 30])]
        finder, shown, fed = StopStrings(tuple(stops)), "", ""
        for piece in pieces:
            shown += finder.feed(piece)
            fed += piece
            assert fed.startswith(shown)
            if finder.matched is not None:
                break
        first = min((fed.find(s) for s in stops if s in fed), default=None)
        if first is None:
            assert finder.matched is None and shown + finder.flush() == text
        else:
            assert shown == fed[:first] and fed[first:].startswith(finder.matched)


# ---- text


def make_tokenizer(folder, kind):
    """Tokenizers of the three families: byte-level, SentencePiece-like with bytes, WordPiece."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: not installed")
    from raddle.engine import Tokenizer

    llama.write_tokenizer(folder, 320)
    if kind == "bytes":
        return Tokenizer(folder)
    words = ["\u2581the", "\u2581cat", "s", "\u2581", "a", "\u00e9", "\u20ac", "."]
    if kind == "sentencepiece":
        vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
        model = tokenizers.models.BPE(
            {t: i for i, t in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True
        )
        decoders = tokenizers.decoders
        decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        vocab = ["[UNK]", "the", "cat", "##s", "##a", ".", "\u00e9"]
        model = tokenizers.models.WordPiece({t: i for i, t in enumerate(vocab)}, unk_token="[UNK]")
        decoder = tokenizers.decoders.WordPiece()
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(vocab[:3] if kind == "sentencepiece" else vocab[:1])
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "wordpiece"])
def test_pieces_of_text_join_to_the_text(tmp_path, kind):
    tokenizer = make_tokenizer(tmp_path, kind)
    rng = np.random.default_rng(0)
    for skip in (True, False):
        for case in range(40):
            ids = rng.integers(0, tokenizer.vocab_size, 30).tolist()
            if kind == "sentencepiece" and case % 2:  # runs of bytes that are characters
                text = "".join(rng.choice(list("a\u00e9\u20ac\U0001f600"), 8))
                ids = [3 + byte for byte in text.encode()]
            elif kind == "sentencepiece":  # bytes alone are never text: pieces may differ there
                ids = [i for i in ids if not 3 <= i < 259]
            stream, joined = tokenizer.stream(skip), ""
            for at, token in enumerate(ids):
                piece = stream.feed(token)
                joined += piece
                if kind == "bytes" or not case % 2:
                    continue
                assert "\ufffd" not in piece, at
            assert joined + stream.flush() == tokenizer.decode(ids, skip)


def test_half_a_character_is_never_shown(tmp_path):
    tokenizer = make_tokenizer(tmp_path, "bytes")
    text = "a\u00e9\u20ac\U0001f600"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    stream = tokenizer.stream()
    shown = [stream.feed(token) for token in ids]
    assert [piece for piece in shown if piece] == list(text)
    stream = tokenizer.stream()
    assert "".join(stream.feed(token) for token in ids[:-1]) == text[:-1]
    assert stream.flush() == "\ufffd"


def test_a_run_of_bytes_that_are_no_text_is_not_held_for_ever(tmp_path):
    tokenizer = make_tokenizer(tmp_path, "sentencepiece")
    stream = tokenizer.stream()
    pieces = [stream.feed(3 + 0xFF) for _ in range(100)]
    assert sum(map(len, pieces)) >= 80
    assert len(stream._ids) < 40


def test_special_tokens_of_the_map_reach_the_template(tmp_path):
    tokenizer = make_tokenizer(tmp_path, "bytes")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"bos_token": {"content": "<B>"}}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<E>"}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ pad_token }}")
    tokenizer = type(tokenizer)(tmp_path)
    assert tokenizer.chat_template.render([{"role": "user", "content": ""}]) == "<B><E>"


def test_a_template_cannot_reach_out(tmp_path):
    from raddle.engine.chat import ChatTemplate

    pytest.importorskip("jinja2", reason="needs jinja2: not installed")
    for source in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.clear() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ no_such_function() }}",
    ):
        with pytest.raises(ArgumentError, match="messages: "):
            ChatTemplate(source).render([{"role": "user", "content": "x"}])


# ---- weights and ranks


def test_bfloat16_is_rounded_to_nearest_even():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 4000, dtype=np.uint64).astype(np.uint32)
    edge = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x80000000, 0x00000001], np.uint32)
    values = np.concatenate([bits, edge]).view(np.float32)
    got = convert(convert(values, "float32", "bfloat16"), "bfloat16", "float32")
    for value, result in zip(values.tolist(), got.tolist()):
        if value != value:
            assert result != result
            continue
        low = np.array([value], np.float32).view(np.uint32) & 0xFFFF0000
        pair = np.stack([low, low + np.uint32(0x10000)]).view(np.float32).astype(np.float64)
        with np.errstate(invalid="ignore"):
            below, above = abs(value - pair[0, 0]), abs(pair[1, 0] - value)
        if np.isinf(pair[1, 0]):
            continue  # overflow: rounds to infinity past the middle
        nearest = pair[0, 0] if below < above else pair[1, 0]
        if below == above:
            nearest = pair[0, 0] if not (low[0] >> 16) & 1 else pair[1, 0]
        assert result == nearest
    assert convert(np.array([1e9], np.float32), "float32", "float16")[0] == np.inf


class ThreadRanks(Communicator):
    """Ranks as threads of one process."""

    def __init__(self, rank, world_size, shared):
        self.rank, self.world_size, self._shared = rank, world_size, shared

    def all_reduce(self, tensor, stream=None):
        barrier, parts = self._shared
        parts[self.rank] = tensor.numpy().copy()
        barrier.wait()
        tensor.numpy()[...] = sum(parts)
        barrier.wait()


class Whole:
    """A batch of one prompt without a cache: attention by the reference."""

    def __init__(self, ids, windows):
        self.num_tokens = self.num_rows = len(ids)
        self.ids = np.array(ids, np.int32)
        self.positions, self.rows = np.arange(len(ids), dtype=np.int32), None
        self._windows = windows

    def attend(self, layer, q, k, v, out):
        window = self._windows[layer]
        q, k, v = (x.numpy().astype(np.float64) for x in (q, k, v))
        out.numpy()[...] = llama.attention(q, k, v, None if window < 0 else window + 1)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_two_ranks_hold_half_and_sum_to_the_whole(tmp_path, kind):
    pytest.importorskip("safetensors", reason="needs safetensors: not installed")
    config = llama.config_of(kind)
    weights = llama.write_model(tmp_path, config)
    ids = np.random.default_rng(0).integers(3, 320, 20).tolist()
    shared, results = (threading.Barrier(2), [None, None]), [None, None]
    read = ModelConfig.from_dict(config)
    limits = dict(max_tokens=32, max_rows=32, max_positions=64)

    def run(rank):
        comm = ThreadRanks(rank, 2, shared)
        model = Model(read, open_weights(tmp_path), communicator=comm, **limits)
        assert (model.num_qo_heads, model.num_kv_heads) == (2, 1)
        results[rank] = model.forward(Whole(ids, read.windows)).numpy().copy()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = llama.logits(config, weights, ids)
    for got in results:
        assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()
    with pytest.raises(ArgumentError, match="num_qo_heads 4 does not split over 3"):
        Model(read, open_weights(tmp_path), communicator=ThreadRanks(0, 3, shared), **limits)
