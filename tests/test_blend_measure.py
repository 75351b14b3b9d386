"""What times a model for a CostModel, on the CPU back end, and `python -m raddle calibrate`.

No test looks at how fast this machine is: clocks are made up. What is made of the times is tested
in test_blend_fit.py.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import raddle
from raddle import errors, ops
from raddle.__main__ import main
from raddle.blend import CostModel, fit, measure, rig
from raddle.blend.cost import LLAMA_3_8B
from raddle.blend.rig import Chunk
from raddle.blend.shape import with_layers

from tests.blend_rig import GRID, FakeRig, surveyed
from tests.stub_driver import build_stubs, check_script

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny-llama"


def need(name):
    try:
        return __import__(name)
    except ImportError:
        pytest.skip(f"needs {name}: it is not installed")


# -- the clock ----------------------------------------------------------------------------------


class Machine:
    """Time passes when work is waited for; a launch only queues it."""

    def __init__(self, seconds, noise=()):
        self.now = self.done = 0.0
        self.seconds, self.noise, self.launches = seconds, iter(noise), 0

    def launch(self):
        self.launches += 1
        self.done = max(self.done, self.now) + self.seconds

    def finish(self):
        self.now = max(self.now, self.done) + next(self.noise, 0.0)

    def clock(self):
        return self.now


def test_median_seconds():
    machine = Machine(2e-3)
    assert rig.median_seconds(machine.launch, machine.finish, 0.05, machine.clock) == pytest.approx(
        2e-3, rel=1e-12
    )
    assert machine.launches == 1 + 1 + rig.SAMPLES * 25  # warm, to count, samples of the window
    # Two disturbed samples of five, the warm run and a slow first launch do not show.
    noise = [9.0, 0.0, 0.0, 5.0, 0.0, 7.0, 0.0]
    machine = Machine(2e-3, noise)
    found = rig.median_seconds(machine.launch, machine.finish, 0.05, machine.clock)
    assert found == pytest.approx(2e-3, rel=1e-12)
    assert next(machine.noise, None) is None  # all of it was met
    machine = Machine(1.0)  # longer than the window: one launch a sample
    assert rig.median_seconds(machine.launch, machine.finish, 0.05, machine.clock) == 1.0
    assert machine.launches == 2 + rig.SAMPLES


def test_together_seconds_alternates_launches():
    order, now = [], [0.0]

    def side(name, count):
        return (
            lambda: order.append(name),
            lambda: now.__setitem__(0, now[0] + 1.0),
            count,
        )

    found = rig.together_seconds((side("a", 2), side("b", 6)), lambda: now[0])
    assert found == 2.0  # both were waited for
    assert len(order) == 8 * (1 + rig.SAMPLES)
    assert order[:8] == ["b", "a", "b", "b", "b", "a", "b", "b"]


# -- sizes --------------------------------------------------------------------------------------


def test_layers_that_are_timed():
    assert measure.layers_to_measure(LLAMA_3_8B) == 6  # 436 MB each
    assert measure.layers_to_measure({**LLAMA_3_8B, "num_hidden_layers": 3}) == 3
    assert measure.layers_to_measure({**LLAMA_3_8B, "num_hidden_layers": 1}) == 2
    wide = {**LLAMA_3_8B, "intermediate_size": 1 << 18, "num_hidden_layers": 80}
    assert measure.layers_to_measure(wide) == 2
    kinds = {**LLAMA_3_8B, "layer_types": ["full_attention"] * 32}
    assert len(with_layers(kinds, 5)["layer_types"]) == 5


def test_bounds():
    assert measure.bounds_of((1 / 4, 1.0), 132, 132) == [(33, 0), (33, 99), (132, 0)]
    assert measure.bounds_of((1 / 4, 0.5), 264, 132) == [(66, 0), (66, 99), (132, 0), (132, 66)]
    assert measure.bounds_of((1 / 8, 1.0), 3, 2) == [(1, 0), (1, 1), (3, 0)]
    assert measure.bounds_of((1 / 2, 1.0), 2, 0) == [(1, 0), (2, 0)]  # a CPU


def test_grids_are_within_what_a_rig_and_a_model_take():
    for grid in (measure.GPU, measure.GPU_QUICK, measure.CPU, measure.CPU_QUICK):
        assert len(grid.tokens) <= 16 and list(grid.tokens) == sorted(set(grid.tokens))
        assert grid.max_batch % 8 == 0
        for batch, _, chunks in (*grid.steps, *grid.step_checks):
            assert batch + len(chunks) <= grid.max_batch
        fitted = {*grid.steps, *grid.beside}
        assert not fitted & {*grid.step_checks, *grid.beside_checks}


# -- the rig, on the CPU back end ---------------------------------------------------------------

SMALL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "vocab_size": 101,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


class Ticks:
    """A clock that goes on by a second whenever it is looked at."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def make_rig(device="cpu"):
    from raddle.engine.config import ModelConfig

    return rig.Rig(
        ModelConfig.from_dict({**SMALL, "dtype": "float32" if device == "cpu" else "bfloat16"}),
        device=device,
        max_batch=8,
        max_tokens=40,
        max_context=100,
        pool_tokens=600,
        window=0.5,
        clock=Ticks(),
    )


def test_rig_runs_every_piece(device):
    """By a clock of its own: a tick for each sample, whatever the machine does."""
    small_rig = make_rig("cpu" if device == "cpu" else "cuda:0")
    num_sms = small_rig.num_sms()
    assert small_rig.num_layers == 3 and small_rig.num_ctas() >= 1
    assert (num_sms == 0) == (device == "cpu")
    assert small_rig.pass_seconds(1) == (1.0, 1.0)
    assert small_rig.pass_seconds(40) == (1.0, 1.0)  # more tokens than rows of logits
    assert small_rig.decode_seconds(8, 60) == 1.0
    assert small_rig.prefill_seconds(Chunk(40, 60)) == 1.0
    assert small_rig.beside_seconds(30, 3, 50, (2, 3), 1, num_sms // 2) == 1.0
    assert small_rig.step_seconds(3, 30, []) == 1.0
    assert small_rig.step_seconds(0, 0, [Chunk(40)]) == 1.0
    assert small_rig.step_seconds(3, 30, [Chunk(20, 10), Chunk(9)]) == 1.0


def test_rig_places_no_page_twice():
    table = make_rig()._place([33, 1, 16, 97])
    used = [*table[0, :3], *table[1, :1], *table[2, :1], *table[3, :7]]
    assert table.shape == (4, 7) and len(set(used)) == 12
    assert all(0 <= page < 38 for page in used)


def test_steps_of_a_rig_are_the_engine_s():
    """A prompt in two chunks gives the logits that it gives in one."""
    small_rig = make_rig()
    whole = small_rig._make_step(0, 0, [Chunk(30)])
    alone = small_rig._runner.run(whole).numpy().copy()
    assert alone.shape == (1, 101) and np.isfinite(alone).all()
    small_rig._runner.run(small_rig._make_step(0, 0, [Chunk(12)]))
    both = small_rig._runner.run(small_rig._make_step(0, 0, [Chunk(18, 12)])).numpy()
    np.testing.assert_allclose(both, alone, atol=1e-4, rtol=1e-4)


def test_random_tensors_are_numbers_and_differ():
    for dtype, shape in (("float32", (70, 3)), ("bfloat16", (9, 2, 5)), ("float16", (1, 7))):
        bits = rig._random(shape, dtype, "cpu").numpy()
        assert bits.shape == shape and len(np.unique(bits)) > bits.size // 2
    values = rig._random((1000, 20), "float32", "cpu").numpy()
    assert 0.9 < values.std() < 1.1


def test_measure_on_the_cpu(tmp_path):
    lines = []
    cost = CostModel.measure(SMALL, "cpu", quick=True, progress=lines.append)
    grid = measure.CPU_QUICK
    assert len(lines) == 1 + sum(
        len(getattr(grid, name))
        for name in (
            "tokens",
            "decode",
            "prefill",
            "beside",
            "beside_checks",
            "steps",
            "step_checks",
        )
    )
    assert cost.weights_in_gemms and 0 <= cost.alpha <= 1
    assert cost.kv_bytes_per_token == 2 * 3 * 3 * 16 * 4
    measured = cost.measured
    assert measured["layers"] == 3 and measured["machine"]["device"] == "cpu"
    for name in ("gemms", "decode", "prefill", "beside", "steps", "step_checks", "beside_checks"):
        assert measured[name] and all(row["seconds"] > 0 for row in measured[name])
    path = tmp_path / "table.json"
    cost.save(path)
    assert CostModel.load(path) == cost and fit.fit(CostModel.load(path).measured) == cost
    half = CostModel.measure(SMALL, "cpu", "bfloat16", quick=True)
    assert half.kv_bytes_per_token == cost.kv_bytes_per_token / 2


@pytest.mark.gpu
def test_measure_on_a_gpu():
    """What holds on any GPU: all was timed, and the checks have what the model says of them."""
    cost = CostModel.measure(SMALL, "cuda", "bfloat16", quick=True)
    found, grid = cost.measured, measure.GPU_QUICK
    assert found["sms"] > 0 and found["machine"]["device"] != "cpu" and 0 <= cost.alpha <= 1
    pairs = measure.bounds_of(grid.shares, found["ctas"], found["sms"])
    assert len(found["beside"]) == len(pairs) * len(grid.beside)
    assert len(found["beside_checks"]) == len(grid.beside_checks)
    for row in (*found["steps"], *found["step_checks"], *found["beside_checks"]):
        assert row["seconds"] > 0
    assert all(row["predicted"] > 0 for row in (*found["step_checks"], *found["beside_checks"]))


@pytest.mark.parametrize(
    ("config", "options", "error", "words"),
    [
        (SMALL, {"dtype": "int8"}, errors.ArgumentError, "dtype: expected one of .*, got 'int8'"),
        (SMALL, {"device": "tpu"}, errors.DeviceError, "device: expected"),
        ({**SMALL, "hidden_size": 0}, {}, errors.ArgumentError, "hidden_size"),
        ({**SMALL, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4,
          "num_experts_per_tok": 2, "moe_intermediate_size": 32}, {}, errors.UnsupportedError,
         "this engine runs"),
        (TINY / "none", {}, errors.RaddleIOError, "none"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured(config, options, error, words):
    with pytest.raises(error, match=words):
        CostModel.measure(config, **{"device": "cpu", "quick": True, **options})


STUB_SCRIPT = """
from dataclasses import replace
from raddle import _core
from raddle.blend import CostModel, measure
from raddle.blend.rig import Chunk, Rig

pass_seconds = Rig.pass_seconds

def and_count(rig, tokens):  # nothing runs here, so that times are noise
    pass_seconds(rig, tokens)
    return 1e-6 * tokens, 2e-6 * tokens

Rig.pass_seconds = and_count
measure.GPU_QUICK = replace(
    measure.CPU_QUICK,
    window=1e-4,
    shares=(0.25, 1.0),
    max_batch=24,
    tokens=(1, 9, 60),
    step_checks=((9, 40, ()), (2, 90, (Chunk(30, 5), Chunk(7)))),
)
cost = CostModel.measure({config!r}, "cuda", "bfloat16", quick=True)
found = cost.measured
assert found["machine"]["device"] == "Stub GPU 0" and found["sms"] == 132, found["machine"]
pairs = {{(cell["max_ctas"], cell["max_sms"]) for cell in found["beside"]}}
assert pairs == {{(33, 0), (33, 99), (132, 0)}}, pairs
assert all(row["seconds"] > 0 for row in found["steps"] + found["step_checks"])

from raddle import Graph, Stream, empty, errors
stream = Stream(high_priority=True)
assert stream.device == "cuda:0" and stream.cuda_stream > 0
assert Stream("cuda:0").cuda_stream != stream.cuda_stream
graph = Graph(device="cuda", stream=stream)
with graph:
    assert graph.stream == stream.cuda_stream
    for call in (stream.synchronize, Stream):
        try:
            call()
        except errors.StateError as error:
            assert "stream" in str(error)
        else:
            raise AssertionError(call)
graph.launch()
stream.synchronize()
"""


def test_measure_on_the_stub_driver(tmp_path):
    """What a capture forbids, or a plan or a graph refuses, is refused there too."""
    stubs = build_stubs(tmp_path, blas=True)
    script = STUB_SCRIPT.format(config=SMALL)
    check_script(script, stubs, RADDLE_CACHE_DIR=str(tmp_path / "cache"))


def test_streams_of_the_cpu():
    stream = raddle.Stream("cpu")
    assert (stream.cuda_stream, stream.device, stream.synchronize()) == (0, "cpu", None)
    assert repr(stream) == "<raddle.Stream on cpu>"
    x = np.ones((2, 8), np.float32)
    np.testing.assert_array_equal(ops.silu_and_mul(x, stream=stream), ops.silu_and_mul(x))
    with pytest.raises(errors.DeviceError, match="device: expected"):
        raddle.Stream("tpu")


# -- the command --------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    need("matplotlib")
    config, table, plot = (tmp_path / name for name in ("config.json", "table.json", "plot.png"))
    config.write_text(json.dumps(SMALL))
    words = ["--config", str(config), "--device", "cpu", "--quick"]
    assert main(["calibrate", *words, "-o", str(table), "--plot", str(plot)]) == 0
    out, err = capsys.readouterr()
    assert "GEMMs of 16 tokens\n" in err and "GEMMs of 16 tokens" not in out
    for title in ("device cpu", "alpha", "decode attention of", "not fitted to", "CTAs at most"):
        assert title in out
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    cost = CostModel.load(table)
    trace = tmp_path / "trace.jsonl"
    row = json.dumps({"input_length": 30, "output_length": 5})
    trace.write_text(f"{row}\n" * 8)
    report = tmp_path / "report.json"
    schedule = ["schedule", str(trace), "--hardware", str(table), "--memory-bytes", "1e6"]
    for more in ([], ["--config", str(config)]):
        assert main([*schedule, *more, "--json", str(report)]) == 0
        assert CostModel(**json.loads(report.read_text())["cost_model"]) == cost
        capsys.readouterr()
    assert main([*schedule, "--config", str(TINY / "config.json")]) == 1
    assert "another model" in capsys.readouterr().err
    table.write_text(table.read_text().replace('"version": 1', '"version": 7'))
    assert main(schedule) == 1
    assert "table.json: version: expected 1, got 7" in capsys.readouterr().err


def test_report_says_what_was_measured():
    from raddle.blend.cli_calibrate import report

    cost = fit.fit(surveyed(LLAMA_3_8B, FakeRig(LLAMA_3_8B)))
    known = {**cost.measured, "machine": {"device": "a GPU"}}
    text = report(replace(cost, measured=known))
    assert "device a GPU\n4 layers were timed, of 32" in text
    assert "prefill     400 TFLOP/s" in text and "K and V     4400 GB/s" in text
    assert (
        "alpha       0.400" in text
        and "at most 66 CTAs of 132, GEMMs cut for 66 SMs of 132" in text
    )
    assert f"{2 / 1.4:.3f} times as fast" in text
    lines = text.splitlines()
    assert sum(line.startswith("step: ") for line in lines) == len(GRID.step_checks)
    assert sum(line.startswith("both at once: ") for line in lines) == len(GRID.beside_checks)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu", "--config", "no-config.json"], "no-config.json"),
        (["--device", "cpu", "-o", "no-folder/table.json"], "no-folder is no folder"),
        (["--device", "cpu", "--plot", "no-folder/plot.png"], "no-folder is no folder"),
        (["--device", "tpu"], "device: expected"),
    ],
)
def test_what_the_command_refuses(capsys, monkeypatch, words, message):
    if "--plot" in words:
        need("matplotlib")
    assert main(["calibrate", "--quick", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("raddle calibrate: ") and message in error


def test_plot_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["calibrate", "--device", "cpu", "--plot", "plot.png"]) == 1
    assert "pip install 'raddle[bench]'" in capsys.readouterr().err
