"""The forward pass of a Llama-shaped model over a ragged batch of tokens.

    residual = embedding(ids)
    per layer: qkv = linear(norm(residual)); rotate q, k; k, v into the cache; attention
               residual += linear(attention); residual += linear(act(gate) * up)
    logits = linear(norm(residual[rows]))

q, k and v are one linear, gate and up another: their weights are joined while they are read. Every
buffer is allocated once for the largest step and sliced, so that a step allocates nothing and a
step of one size always uses the same memory (which a captured CUDA graph needs).
"""

from dataclasses import dataclass
from typing import Any

from .. import empty, ops
from ..errors import ArgumentError, UnsupportedError

_IGNORED_SUFFIX = "rotary_emb.inv_freq"  # older files store what follows from rope_theta


class Communicator:
    """The one process of an engine without tensor parallelism; others replace it.

    Rank r of world_size holds 1 / world_size of the heads and of the MLP's width; all_reduce sums
    a tensor over the ranks in place.
    """

    rank = 0
    world_size = 1

    def all_reduce(self, tensor, stream=None):
        """Nothing to add."""


@dataclass
class Layer:
    """One block: norms as tensors, the rest as ops.Linear. qkv and gate_up are joined by rows."""

    input_norm: Any
    qkv: Any
    q_norm: Any  # None where the model has none
    k_norm: Any
    o: Any
    post_norm: Any
    gate_up: Any
    down: Any


class Model:
    """Weights on a device and the buffers of one step.

    dtype: of weights, activations and KV ("float32", "float16", "bfloat16"); logits are float32.
    max_tokens: rows of the largest step; max_rows: rows of logits, at most max_tokens;
    max_positions: of the rope table.
    """

    def __init__(
        self,
        config,
        source,
        *,
        device="cpu",
        dtype="float32",
        max_tokens,
        max_rows,
        max_positions,
        communicator=None,
        progress=None,
    ):
        self.config, self.dtype, self.device = config, dtype, device
        self.comm = communicator or Communicator()
        world = self.comm.world_size
        for name in ("num_qo_heads", "num_kv_heads", "intermediate_size"):
            if getattr(config, name) % world:
                raise ArgumentError(f"{name} {getattr(config, name)} does not split over {world}")
        self.num_qo_heads = config.num_qo_heads // world
        self.num_kv_heads = config.num_kv_heads // world
        self._activation = _activation(config.activation)
        self._load(source, progress)
        self.cos_sin = ops.rope_cos_sin_cache(
            max_positions,
            config.head_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
            device=device,
            max_position_embeddings=config.max_position_embeddings,
        )
        heads, head_dim = self.num_qo_heads + 2 * self.num_kv_heads, config.head_dim
        inner = config.intermediate_size // world

        def buffer(rows, *shape, dtype=dtype):
            return empty((rows, *shape), dtype=dtype, device=device)

        self._residual = buffer(max_tokens, config.hidden_size)
        self._x = buffer(max_tokens, config.hidden_size)
        self._qkv = buffer(max_tokens, heads * head_dim)
        self._qkv_heads = self._qkv.reshape((max_tokens, heads, head_dim))
        self._attn = buffer(max_tokens, self.num_qo_heads * head_dim)
        self._attn_heads = self._attn.reshape((max_tokens, self.num_qo_heads, head_dim))
        self._gate_up = buffer(max_tokens, 2 * inner)
        self._act = buffer(max_tokens, inner)
        self._picked_residual = buffer(max_rows, config.hidden_size)
        self._picked_attn = buffer(max_rows, self.num_qo_heads * head_dim)
        self.logits = buffer(max_rows, config.vocab_size, dtype="float32")

    def forward(self, batch, stream=None, max_sms=0):
        """Run one step; returns float32 logits [batch.num_rows, vocab], valid until the next.

        batch: num_tokens n, num_rows; ids and positions int32 [n]; rows int32 [num_rows], or None
        when the logits of all n rows are wanted in order; attend(layer, q, k, v, out), which writes
        k and v to the cache and attention of q to out. max_sms: of the linear layers.
        """
        config, n = self.config, batch.num_tokens
        eps, hq, hk = config.rms_norm_eps, self.num_qo_heads, self.num_kv_heads
        residual, x, qkv = self._residual[:n], self._x[:n], self._qkv[:n]
        heads, attn = self._qkv_heads[:n], self._attn[:n]
        q, k, v = heads[:, :hq], heads[:, hq : hq + hk], heads[:, hq + hk :]
        attn_heads, gate_up, act = self._attn_heads[:n], self._gate_up[:n], self._act[:n]
        ops.embedding(batch.ids, self._embedding, out=residual, stream=stream)
        ops.rmsnorm(residual, self._layers[0].input_norm, eps, out=x, stream=stream)
        for i, layer in enumerate(self._layers):
            layer.qkv(x, out=qkv, stream=stream, max_sms=max_sms)
            if layer.q_norm is not None:
                ops.rmsnorm(q, layer.q_norm, eps, out=q, stream=stream)
                ops.rmsnorm(k, layer.k_norm, eps, out=k, stream=stream)
            ops.apply_rope(q, k, batch.positions, self.cos_sin, stream=stream)
            batch.attend(i, q, k, v, attn_heads)
            is_last = i + 1 == len(self._layers)
            if is_last and batch.rows is not None:  # nobody reads the other rows
                attn, residual = self._pick(batch, attn, residual, stream)
                m = batch.num_rows
                x, gate_up, act = self._x[:m], self._gate_up[:m], self._act[:m]
            layer.o(attn, out=x, stream=stream, max_sms=max_sms)
            self.comm.all_reduce(x, stream)
            ops.fused_add_rmsnorm(x, residual, layer.post_norm, eps, stream=stream)
            layer.gate_up(x, out=gate_up, stream=stream, max_sms=max_sms)
            self._activation(gate_up, out=act, stream=stream)
            layer.down(act, out=x, stream=stream, max_sms=max_sms)
            self.comm.all_reduce(x, stream)
            norm = self._final_norm if is_last else self._layers[i + 1].input_norm
            ops.fused_add_rmsnorm(x, residual, norm, eps, stream=stream)
        logits = self.logits[: batch.num_rows]
        return self._lm_head(x, out=logits, stream=stream, max_sms=max_sms)

    def _pick(self, batch, attn, residual, stream):
        """Their rows batch.rows: a gather of rows is what an embedding does."""
        m = batch.num_rows
        return (
            ops.embedding(batch.rows, attn, out=self._picked_attn[:m], stream=stream),
            ops.embedding(batch.rows, residual, out=self._picked_residual[:m], stream=stream),
        )

    def _load(self, source, progress):
        config = self.config
        reader = _Reader(source, self.dtype, self.device, self.comm)
        hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
        q_rows, kv_rows = config.num_qo_heads * head_dim, config.num_kv_heads * head_dim
        self._embedding = reader.tensor("model.embed_tokens.weight", (config.vocab_size, hidden))
        self._layers = []
        layers = range(config.num_layers)
        for i in layers if progress is None else progress(layers):
            prefix = f"model.layers.{i}."
            attn, mlp = prefix + "self_attn.", prefix + "mlp."

            def norm(name, size=hidden):
                return reader.tensor(prefix + name + ".weight", (size,))  # noqa: B023

            qkv_parts = [
                (attn + "q_proj", q_rows),
                (attn + "k_proj", kv_rows),
                (attn + "v_proj", kv_rows),
            ]
            gate_up_parts = [(mlp + "gate_proj", inner), (mlp + "up_proj", inner)]
            self._layers.append(
                Layer(
                    input_norm=norm("input_layernorm"),
                    qkv=reader.by_rows(qkv_parts, hidden, config.qkv_bias),
                    q_norm=norm("self_attn.q_norm", head_dim) if config.qk_norm else None,
                    k_norm=norm("self_attn.k_norm", head_dim) if config.qk_norm else None,
                    o=reader.by_cols(attn + "o_proj", (hidden, q_rows), config.o_bias),
                    post_norm=norm("post_attention_layernorm"),
                    gate_up=reader.by_rows(gate_up_parts, hidden, config.mlp_bias),
                    down=reader.by_cols(mlp + "down_proj", (hidden, inner), config.mlp_bias),
                )
            )
        self._final_norm = reader.tensor("model.norm.weight", (hidden,))
        if config.tie_word_embeddings:
            self._lm_head = ops.Linear(self._embedding, device=self.device)
            reader.used.add("lm_head.weight")  # some files store it again
        else:
            self._lm_head = reader.by_rows([("lm_head", config.vocab_size)], hidden, False, True)
        reader.refuse_unused()


class _Reader:
    """Reads this rank's part of each weight to host memory, joins parts, and sends them over."""

    def __init__(self, source, dtype, device, comm):
        self._source, self._dtype, self._device, self._comm = source, dtype, device, comm
        self.used = set()

    def tensor(self, name, shape):
        """A whole tensor."""
        return self._joined([(name, shape, None, None)], shape)

    def by_rows(self, parts, width, has_bias, is_whole=False):
        """A Linear of (name, rows) parts one below the other, each with this rank's rows."""
        pieces, biases, total = [], [], 0
        for name, rows in parts:
            mine = None if is_whole else self._share(rows)
            total += rows if mine is None else mine[1] - mine[0]
            pieces.append((name + ".weight", (rows, width), mine, None))
            biases.append((name + ".bias", (rows,), mine, None))
        weight = self._joined(pieces, (total, width))
        bias = self._joined(biases, (total,)) if has_bias else None
        return ops.Linear(weight, bias, device=self._device)

    def by_cols(self, name, shape, has_bias):
        """A Linear with this rank's columns; the ranks' sum is the whole, so one adds the bias."""
        mine = self._share(shape[1])
        width = shape[1] if mine is None else mine[1] - mine[0]
        weight = self._joined([(name + ".weight", shape, None, mine)], (shape[0], width))
        bias = None
        if has_bias:
            bias = self.tensor(name + ".bias", shape[:1])
            bias = bias if self._comm.rank == 0 else None
        return ops.Linear(weight, bias, device=self._device)

    def refuse_unused(self):
        """What a file holds and the model has no use for would change its answers: say so."""
        if self._source.names is None:
            return
        unused = [n for n in self._source.names - self.used if not n.endswith(_IGNORED_SUFFIX)]
        if unused:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            raise UnsupportedError(
                "the weight files hold tensors that config.json's architecture does not use: "
                f"{', '.join(sorted(unused)[:3])}{more}"
            )

    def _share(self, count):
        rank, world = self._comm.rank, self._comm.world_size
        return None if world == 1 else (count * rank // world, count * (rank + 1) // world)

    def _joined(self, pieces, shape):
        host = empty(shape, dtype=self._dtype, device="cpu")
        array, at = host.numpy(), 0
        for name, whole, rows, cols in pieces:
            count = whole[0] if rows is None else rows[1] - rows[0]
            self._source.read_into(name, array[at : at + count], self._dtype, whole, rows, cols)
            self.used.add(name)
            at += count
        return host if self._device == "cpu" else host.to(self._device)


def _activation(name):
    by_name = {
        "silu": ops.silu_and_mul,
        "gelu_tanh": ops.gelu_tanh_and_mul,
        "gelu": getattr(ops, "gelu_and_mul", None),
    }
    if by_name[name] is None:
        raise UnsupportedError(f"config.json: hidden_act {name!r} has no kernel")
    return by_name[name]
