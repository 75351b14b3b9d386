"""How many parameters a model has, how many of them a token uses, and what its K and V weigh."""

from dataclasses import dataclass

from ..errors import ArgumentError, UnsupportedError

# Architecture -> the dense one that its attention and its norms are like.
DENSE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
EXPERTS = {
    "MixtralForCausalLM": "MistralForCausalLM",
    "Qwen2MoeForCausalLM": "Qwen2ForCausalLM",
    "Qwen3MoeForCausalLM": "Qwen3ForCausalLM",
}
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Shape:
    """Counts of parameters; K and V are those of one token, in all layers."""

    parameters: int
    active_parameters: int  # that a token is multiplied with; the embedding table counts
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype_bytes: int

    @classmethod
    def from_dict(cls, config):
        """From the content of a transformers config.json. UnsupportedError for what is not known:
        other architectures, quantised weights, layers that do not see all keys."""
        from ..engine.config import ModelConfig

        name = _architecture(config)
        like = EXPERTS.get(name, name)
        _refuse_hybrids(config, name)
        changes = {"architectures": [like]}
        if name == "MixtralForCausalLM":
            changes["sliding_window"] = config.get("sliding_window")  # absent: none, unlike Mistral
        model = ModelConfig.from_dict({**config, **changes})
        if any(window >= 0 for window in model.windows):
            raise UnsupportedError(
                "config.json: sliding_window: layers that do not see all keys are not modelled; "
                "set it to null to have them see all"
            )
        return cls._of(model, *_mlp(config, name, model))

    @classmethod
    def from_model(cls, model):
        """From an engine's ModelConfig, as if all its layers saw all keys."""
        inner = _dense_mlp(model) * model.num_layers
        return cls._of(model, inner, inner)

    @classmethod
    def _of(cls, model, inner, active_inner):
        rest = _attention_and_norms(model) * model.num_layers + model.hidden_size
        tables = 1 if model.tie_word_embeddings else 2
        rest += tables * model.vocab_size * model.hidden_size
        return cls(
            parameters=rest + inner,
            active_parameters=rest + active_inner,
            num_layers=model.num_layers,
            num_qo_heads=model.num_qo_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype_bytes=DTYPE_BYTES[model.dtype],
        )

    @property
    def kv_bytes(self):
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes


def with_layers(config, num_layers):
    """The content of a config.json for a model of so many layers."""
    changed = {**config, "num_hidden_layers": num_layers}
    kinds = config.get("layer_types")
    if kinds:
        changed["layer_types"] = [kinds[i % len(kinds)] for i in range(num_layers)]
    return changed


def _architecture(config):
    names = config.get("architectures") or []
    known = (*DENSE, *EXPERTS)
    for name in names:
        if name in known:
            return name
    what = ", ".join(map(str, names)) or "missing"
    raise UnsupportedError(
        f"config.json: architectures is {what}; parameters are counted for {', '.join(known)}; "
        "give a CostModel of your own for others"
    )


def _refuse_hybrids(config, name):
    layers = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if layers:
        raise UnsupportedError(
            f"config.json: layer_types holds {', '.join(sorted(map(str, layers)))}: only layers of "
            "attention are modelled"
        )
    experts = [field for field in _EXPERT_FIELDS if config.get(field)]
    if name in DENSE and experts:
        raise UnsupportedError(f"config.json: {experts[0]}: {name} with experts is not known")


def _attention_and_norms(m):
    """Parameters of a layer but for its MLP."""
    qo, kv = m.num_qo_heads * m.head_dim, m.num_kv_heads * m.head_dim
    count = 2 * m.hidden_size * (qo + kv) + 2 * m.hidden_size
    count += (qo + 2 * kv) * m.qkv_bias + m.hidden_size * m.o_bias
    return count + 2 * m.head_dim * m.qk_norm


def _mlp(config, name, m):
    """Parameters of all MLPs, and those that a token uses."""
    dense = _dense_mlp(m)
    if name in DENSE:
        return dense * m.num_layers, dense * m.num_layers
    is_mixtral = name == "MixtralForCausalLM"
    experts = _size(config, "num_local_experts" if is_mixtral else "num_experts")
    used = _size(config, "num_experts_per_tok")
    if used > experts:
        raise ArgumentError(
            f"config.json: num_experts_per_tok is {used}, expected at most {experts}, the experts"
        )
    width = m.intermediate_size if is_mixtral else _size(config, "moe_intermediate_size")
    each, always = 3 * m.hidden_size * width, m.hidden_size * experts  # an expert; the router
    if name == "Qwen2MoeForCausalLM":
        if config.get("qkv_bias", True) is not True:
            raise UnsupportedError("config.json: qkv_bias: Qwen2Moe without biases is not known")
        # A shared expert, and the gate in front of it.
        always += 3 * m.hidden_size * _size(config, "shared_expert_intermediate_size")
        always += m.hidden_size
    sparse = m.num_layers if is_mixtral else _count_sparse(config, m.num_layers)
    rest = dense * (m.num_layers - sparse) + always * sparse
    return rest + each * experts * sparse, rest + each * used * sparse


def _dense_mlp(m):
    """Parameters of a layer's MLP."""
    dense = 3 * m.hidden_size * m.intermediate_size
    return dense + (2 * m.intermediate_size + m.hidden_size) * m.mlp_bias


def _count_sparse(config, num_layers):
    step, dense_layers = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if type(step) is not int or step < 1:
        raise ArgumentError(f"config.json: decoder_sparse_step is {step!r}, expected 1 or more")
    return sum((i + 1) % step == 0 and i not in dense_layers for i in range(num_layers))


def _size(config, name):
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ArgumentError(f"config.json: {name} is {value!r}, expected an integer of 1 or more")
    return value
