"""Tokens per second of the engine.

cpu: examples/tiny-llama, 64 prompts, greedy; the peer is transformers' generate on one padded batch
of the same prompts, same dtype, same number of threads. Two workloads: ragged random prompts whose
answers all have the same length, and the prompts of examples/requests.jsonl whose answers end where
the model ends them. Runs are interleaved and the median counts. A row's time is microseconds per
output token, prompts included.

cuda: one decode step of Llama-3-8B's shape with dummy bf16 weights at a context of 2048 tokens. A
row's time is that of Engine.step(), host work and sampling included; bytes are the weights and the
KV that it reads. The peer is transformers on the same shape where it is installed.
"""

import statistics
import time
from pathlib import Path

import common

TINY_LLAMA = Path(__file__).resolve().parents[1] / "examples" / "tiny-llama"
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
CONTEXT = 2048


def make_prompts(count, vocab):
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.integers(3, vocab, n).tolist() for n in rng.integers(8, 65, count)]


# ---- cpu


def bench_cpu(report, args):
    import torch
    from raddle.engine import Engine

    peer = f"transformers generate, {torch.get_num_threads()} threads"
    new_tokens = 64 if args.quick else 128
    for dtype in ("bfloat16", "float32"):
        # Runs repeat their prompts: with a prefix cache, only the first would read them.
        engine = Engine.from_folder(TINY_LLAMA, dtype=dtype, prefix_cache=False)
        model = transformers_model(dtype)
        for case, prompts, ends in (
            (f"x {new_tokens} tokens", make_prompts(64, engine.config.vocab_size), False),
            ("of requests.jsonl", request_prompts(engine.tokenizer), True),
        ):
            sides = (
                ours(engine, prompts, new_tokens, ends),
                theirs(model, prompts, new_tokens, ends),
            )
            times = [[], []]
            for _ in range(3 if args.quick else 7):
                for side, samples in zip(sides, times):
                    start = time.perf_counter()
                    count = side()
                    samples.append((time.perf_counter() - start) * 1e6 / count)
            us, peer_us = (statistics.median(samples) for samples in times)
            report.add(f"tiny-llama {dtype}, 64 {case}", us, peer, peer_us)
            counts = " and ".join(str(side()) for side in sides)
            print(f"  {1e6 / us:.0f} and {1e6 / peer_us:.0f} tokens/s; {counts} tokens")


def request_prompts(tokenizer):
    """The prompts of examples/requests.jsonl, as token ids."""
    import json

    prompts = []
    for line in (TINY_LLAMA.parent / "requests.jsonl").read_text().splitlines():
        body = json.loads(line)["body"]
        if "messages" in body:
            text = tokenizer.chat_template.render(body["messages"])
            prompts.append(tokenizer.encode(text, add_special_tokens=False))
        else:
            prompts.append(tokenizer.encode(body["prompt"]))
    return prompts


def ours(engine, prompts, new_tokens, ends):
    """A function that answers all and returns the number of tokens written."""
    from raddle.engine import SamplingParams

    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=not ends)
    return lambda: sum(len(answer.token_ids) for (answer,) in engine.generate(prompts, params))


def transformers_model(dtype):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        TINY_LLAMA, dtype=getattr(torch, dtype)
    ).eval()


def theirs(model, prompts, new_tokens, ends):
    """As ours, by generate on one batch padded on the left; what follows an end does not count."""
    import torch

    eos, pad = 1, 2
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def run():
        model.generation_config.eos_token_id = eos if ends else None
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        rows = out[:, width:].tolist()
        return sum(row.index(eos) + 1 if ends and eos in row else len(row) for row in rows)

    return run


# ---- cuda


def bench_cuda(report, args, ceiling):
    from raddle.engine import Engine

    config = dict(LLAMA_3_8B)
    if args.quick:
        config["num_hidden_layers"] = 4
    batches = (1, 16, 64)
    engine = Engine.with_dummy_weights(
        config,
        device="cuda",
        max_batch=64,
        max_model_len=CONTEXT + 256,
        kv_memory_bytes=20 << 30,  # leaves room for the peer
    )
    weight_bytes, token_bytes = count_bytes(config)
    peers = {} if args.quick else transformers_steps(config, batches)
    for batch in batches:
        us = decode_step(engine, batch, args.repeat)
        peer_us = peers.get(batch)
        report.add(
            f"Llama-3-8B shape, {config['num_hidden_layers']} layers, step B{batch} x {CONTEXT}",
            us,
            "transformers, sdpa" if peer_us else None,
            peer_us,
            num_bytes=weight_bytes + batch * CONTEXT * token_bytes,
            ceiling=ceiling,
        )


def count_bytes(config):
    """(bytes of the weights that a decode step reads, KV bytes of a token), bf16."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head_dim
    layer = hidden * (2 * hidden + 2 * kv) + 3 * hidden * inner
    layers = config["num_hidden_layers"]
    return 2 * (layers * layer + config["vocab_size"] * hidden), 2 * 2 * layers * kv


def decode_step(engine, batch, repeat):
    """Median microseconds of a step in which every one of `batch` sequences decodes."""
    import numpy as np
    from raddle.engine import SamplingParams

    rng = np.random.default_rng(0)
    steps = repeat + 8
    # While later prompts are read, earlier ones decode: about a step for each prompt.
    params = SamplingParams(
        max_tokens=steps + 2 * batch + 8, temperature=0, ignore_eos=True, stream=False
    )
    length = CONTEXT - steps // 2 - batch // 2
    for _ in range(batch):
        engine.add_request(rng.integers(0, engine.config.vocab_size, length).tolist(), params)
    while engine.num_waiting or engine.is_reading:
        engine.step()
    samples = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        samples.append((time.perf_counter() - start) * 1e6)
    while engine.has_work:
        engine.step()
    return statistics.median(samples[8:])


def transformers_steps(config, batches):
    """batch -> median microseconds of a step of transformers' model; {} where it is missing."""
    try:
        import torch
        import transformers
    except ImportError:
        print("transformers is not installed: no peer")
        return {}
    model_config = transformers.LlamaConfig(**config)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.LlamaForCausalLM(model_config).eval()
        torch.set_default_dtype(torch.float32)
    times = {}
    for batch in batches:
        cache = transformers.DynamicCache()
        samples = []
        with torch.no_grad():
            for _ in range(CONTEXT // 128):
                ids = torch.randint(0, 1000, (batch, 128), device="cuda")
                model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            for _ in range(16):
                ids = torch.randint(0, 1000, (batch, 1), device="cuda")
                torch.cuda.synchronize()
                start = time.perf_counter()
                model(ids, past_key_values=cache, use_cache=True).logits.argmax(-1).cpu()
                samples.append((time.perf_counter() - start) * 1e6)
        times[batch] = statistics.median(samples[4:])
    return times


def main():
    args = common.parse_args(__doc__)
    if args.device == "cpu":
        report = common.Report("engine", args, {})
        bench_cpu(report, args)
    else:
        ceiling = common.measure_read("cuda", 1 << 30, 5)
        report = common.Report("engine", args, {"read_gb_per_s": ceiling})
        bench_cuda(report, args, ceiling)
    report.write()


if __name__ == "__main__":
    main()
