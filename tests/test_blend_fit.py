"""Cost models from times: what is known of a machine is found; files, and what they refuse.

The machine is made up (tests/blend_rig.py): no test looks at how fast this one is.
"""

import json
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import raddle
from raddle import errors
from raddle.blend import CostModel, fit
from raddle.blend.cost import LLAMA_3_8B
from raddle.blend.rig import Chunk

from tests.blend_rig import GRID, FakeRig, surveyed


@pytest.mark.parametrize("layers", [2, 4])
def test_what_is_known_is_found(layers):
    fake = FakeRig(LLAMA_3_8B, layers)
    cost = fit.fit(surveyed(LLAMA_3_8B, fake))
    assert cost.read_rate == pytest.approx(fake.read_rate, rel=1e-9)
    assert cost.attention_flops_rate == pytest.approx(fake.flops_rate, rel=1e-9)
    assert cost.overhead == pytest.approx(fake.host + 32 * fake.start, rel=1e-6)
    assert cost.alpha == pytest.approx(0.4, abs=1e-9)
    best = cost.measured["best"]
    assert (best["max_ctas"], best["max_sms"]) == (66, 66)
    for tokens in GRID.tokens:
        assert cost.compute_seconds(tokens) == pytest.approx(fake.gemms(tokens, 32), rel=1e-9)
    assert cost.weights_in_gemms and cost.weight_bytes == 2 * 8_030_261_248
    assert cost.kv_bytes_per_token == 131_072 and cost.flops_per_score == 4 * 32 * 128 * 32
    bounds = {(row["max_ctas"], row["max_sms"]): row["alpha"] for row in cost.measured["bounds"]}
    assert bounds == pytest.approx({(66, 0): 0.9, (66, 66): 0.4, (132, 0): 0.7}, abs=1e-9)
    assert cost.measured["picked"]["alpha"] == pytest.approx(0.4, abs=1e-9)
    # What was not fitted to. Between two numbers of tokens the table is a line, the layer is not.
    checks = [*cost.measured["step_checks"], *cost.measured["beside_checks"]]
    assert len(checks) == len(GRID.step_checks) + len(GRID.beside_checks)
    assert all(abs(row["error"]) < 0.02 for row in checks)
    assert {row["max_sms"] for row in cost.measured["beside_checks"]} == {66}
    assert fit.fit(cost.measured) == cost  # again from what it keeps


def test_bounds_that_are_picked_for_each_load():
    """Fewer CTAs are better where there is little to read: either pair alone loses more."""
    measured = surveyed(LLAMA_3_8B, FakeRig(LLAMA_3_8B))
    by_hand = {}
    for cell in measured["beside"]:
        is_long = cell["reads"] > cell["gemms"]
        if cell["max_sms"] == 66 and is_long or cell["max_ctas"] == 132 and not is_long:
            cell["seconds"] = 0.99 * (cell["gemms"] + cell["reads"])
        key = cell["gemms"], cell["reads"]
        by_hand[key] = min(by_hand.get(key, 9.0), cell["seconds"] / sum(key))
    cost = fit.fit(measured)
    shares = [row["share"] for row in cost.measured["bounds"]]
    picked = cost.measured["picked"]["share"]
    assert picked == pytest.approx(np.mean(list(by_hand.values()))) and picked < min(shares)
    assert cost.measured["best"]["share"] == min(shares)


@pytest.mark.parametrize("alpha", [0.0, 0.15, 1.0])
def test_alpha(alpha):
    fake = FakeRig(LLAMA_3_8B, alphas=dict.fromkeys([(66, 0), (66, 66), (132, 0)], alpha))
    cost = fit.fit(surveyed(LLAMA_3_8B, fake))
    assert cost.alpha == pytest.approx(alpha, abs=1e-9)
    # More than one after the other, or less than the longer: at the ends of what a model takes.
    for beyond, kept in ((1.5, 1.0), (-0.2, 0.0)):
        fake.alphas = dict.fromkeys(fake.alphas, beyond)
        assert fit.fit(surveyed(LLAMA_3_8B, fake)).alpha == kept


def test_the_predicted_time_of_a_mixed_step():
    """By hand: 100 decodes of 1,000 tokens beside 1,948 tokens of a prompt, on 32 layers."""
    cost = fit.fit(surveyed(LLAMA_3_8B, FakeRig(LLAMA_3_8B)))
    chunk = Chunk(1948, 500)
    assert chunk.scores == sum(500 + i + 1 for i in range(1948))
    reads = 100 * 1001 * 131_072 / 4.4e12
    compute = FakeRig(LLAMA_3_8B).gemms(2048, 32) + chunk.scores * 4 * 32 * 128 * 32 / 400e12
    weights = cost.weight_bytes / 4.4e12
    overhead = 2e-4 + 32 * 5e-6
    found = cost.step_seconds(2048, chunk.scores, 100 * 1001)
    assert compute - weights > reads
    assert found == pytest.approx(compute + 0.4 * reads + overhead, rel=1e-9)
    alone = replace(cost, alpha=1.0).step_seconds(2048, chunk.scores, 100 * 1001)
    assert alone == pytest.approx(compute + reads + overhead, rel=1e-9)


def test_bumps_are_cut_to_a_convex_hull():
    """Numbers of tokens that fill tiles badly, and a first one that is slower than the second."""
    bumps = {1: 1.3, 128: 1.5, 384: 1.2, 768: 1.4, 8192: 1.6}
    fake = FakeRig(LLAMA_3_8B, bumps=bumps)
    cost = fit.fit(surveyed(LLAMA_3_8B, fake))
    times = [cost.compute_seconds(n) for n in range(1, 8193)]
    slopes = np.diff(times)
    assert (slopes >= -1e-15).all() and (np.diff(slopes) >= -1e-12).all()
    for tokens, seconds in fit.scaled_gemms(cost.measured, 32):
        assert cost.compute_seconds(tokens) <= seconds * (1 + 1e-9)
        if tokens not in bumps:
            assert cost.compute_seconds(tokens) == pytest.approx(seconds, rel=1e-9)
    assert cost.compute_seconds(1) == pytest.approx(fake.gemms(8, 32), rel=1e-9)
    assert cost.compute_seconds(8192) == pytest.approx(1.6 * fake.gemms(8192, 32), rel=1e-9)


def test_noise_and_a_disturbed_step():
    """Three per cent of noise everywhere, and one step of five that took ten times as long."""
    for seed in range(5):
        rng = random.Random(seed)
        fake = FakeRig(LLAMA_3_8B, noise=partial(rng.uniform, 0.97, 1.03))
        measured = surveyed(LLAMA_3_8B, fake)
        measured["steps"][seed]["seconds"] *= 10
        cost = fit.fit(measured)
        assert cost.read_rate == pytest.approx(fake.read_rate, rel=0.05)
        assert cost.attention_flops_rate == pytest.approx(fake.flops_rate, rel=0.05)
        assert cost.alpha == pytest.approx(0.4, abs=0.1)
        assert 0 <= cost.overhead < 5e-3
        raddle._core.blend_check_cost(cost.to_dict())


def test_more_tokens_that_take_less_time():
    measured = surveyed(LLAMA_3_8B, FakeRig(LLAMA_3_8B))
    for row in measured["gemms"]:
        row["one_layer"], row["seconds"] = 1 / row["tokens"], 2 / row["tokens"]
    with pytest.raises(errors.ArgumentError, match="gemms: expected more tokens to take longer"):
        fit.fit(measured)


def test_lower_hull():
    assert fit.lower_hull([(1, 5.0), (2, 4.0), (4, 4.0), (8, 9.0)]) == ([4, 8], [4.0, 9.0])
    assert fit.lower_hull([(1, 1.0), (2, 9.0), (3, 3.0)]) == ([1, 3], [1.0, 3.0])
    assert fit.lower_hull([(1, 1.0), (2, 1.5), (4, 4.0)]) == ([1, 2, 4], [1.0, 1.5, 4.0])
    assert fit.lower_hull([(1, 1.0), (2, 2.0), (3, 3.0)]) == ([1, 3], [1.0, 3.0])
    rng = random.Random(3)
    for _ in range(200):
        points = sorted({rng.randrange(1, 60): rng.uniform(1, 3) for _ in range(14)}.items())
        tokens, seconds = fit.lower_hull(points)
        line = np.interp([n for n, _ in points], tokens, seconds)
        assert all(y <= s + 1e-12 for (_, s), y in zip(points, line, strict=True))
        slopes = np.diff(seconds) / np.diff(tokens)
        assert (slopes > 0).all() and (np.diff(slopes) > 0).all()


def test_fit_line():
    start, slope = fit.fit_line([(x, 3.0 + 2.0 * x) for x in (1, 10, 100, 1e6)])
    assert (start, slope) == pytest.approx((3.0, 2.0), rel=1e-9)
    assert fit.fit_line([(1, 1.0), (2, 3.0)]) == pytest.approx(
        (0.0, 1.4 / 1.64 * 5 / 6 * 1.6), rel=1
    )
    start, slope = fit.fit_line([(1, 1.0), (2, 3.0), (3, 5.0)])  # would start at -1
    assert start == 0.0
    worse = [sum((x * k / y - 1) ** 2 for x, y in ((1, 1.0), (2, 3.0), (3, 5.0))) for k in
             (slope, slope * 1.001, slope * 0.999)]  # fmt: skip
    assert worse[0] < min(worse[1:])
    assert fit.fit_line([(1, 5.0), (2, 4.0)])[1] > 0  # falling: through the origin


def test_nothing_to_hide():
    measured = surveyed(LLAMA_3_8B, FakeRig(LLAMA_3_8B))
    for cell in measured["beside"]:
        cell["gemms"] = 1e-9  # less than the weights' read
    with pytest.raises(errors.ArgumentError, match="beside: .*measure more tokens"):
        fit.fit(measured)


# -- files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cost():
    return fit.fit(surveyed(LLAMA_3_8B, FakeRig(LLAMA_3_8B)))


def test_round_trip(cost, tmp_path):
    path = tmp_path / "table.json"
    cost.save(path)
    loaded = CostModel.load(path)
    assert loaded == cost and loaded.measured == cost.measured
    assert fit.fit(loaded.measured) == cost
    content = json.loads(path.read_text())
    assert (content["format"], content["version"]) == ("raddle cost model", 1)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_3_8B))
    assert CostModel.from_config(config, path) == cost
    assert CostModel.from_config(LLAMA_3_8B, str(path)).measured == cost.measured
    plain = CostModel.from_config(LLAMA_3_8B, "a100")
    plain.save(path)
    assert CostModel.load(path) == plain and CostModel.load(path).measured is None


def change(content, where, value):
    *path, last = where
    for name in path:
        content = content[name]
    if value is KeyError:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (["format"], "another", r"format: expected 'raddle cost model', got 'another'; save\(\)"),
        (["format"], KeyError, "format: expected 'raddle cost model', got nothing"),
        (["version"], 2, "version: expected 1, got 2"),
        (["version"], KeyError, "version: expected 1, got nothing"),
        (["cost_model"], KeyError, "cost_model: is missing"),
        (["cost_model"], [], "cost_model: expected a JSON object, got list"),
        (["measured"], KeyError, "measured: is missing"),
        (["measured"], 3, "measured: expected a JSON object, got int"),
        (["extra"], 3, "extra: unknown; expected format, version"),
        (["cost_model", "alpha"], KeyError, "alpha: is missing"),
        (["cost_model", "alpha"], 1.5, r"alpha: expected 0 .* to 1 .*, got 1.5"),
        (["cost_model", "alpha"], "0.4", "alpha"),
        (["cost_model", "speed"], 1, "speed: unknown"),
        (["cost_model", "read_rate"], float("nan"), "read_rate: expected a positive number, got"),
        (["cost_model", "read_rate"], -1, "read_rate: expected a positive number, got -1"),
        (["cost_model", "weights_in_gemms"], 1, "weights_in_gemms: expected True or False, got"),
        (["cost_model", "gemm_rate"], [1e12], "gemm_rate, 1, got"),
        (["cost_model", "gemm_rate", 0], None, "gemm_rate"),
        (["cost_model", "gemm_rate", 2], 1e15, "gemm_rate: a token more .* convex hull"),
        (["cost_model", "rate_tokens", 1], 1e9, "rate_tokens: expected ascending numbers"),
        (["cost_model", "rate_tokens"], 5.0, "rate_tokens"),
    ],
)
def test_damaged_files(cost, tmp_path, where, value, words):
    path = tmp_path / "table.json"
    cost.save(path)
    content = json.loads(path.read_text())
    change(content, where, value)
    path.write_text(json.dumps(content))
    with pytest.raises((errors.ArgumentError, errors.DTypeError), match=f"table.json: .*{words}"):
        CostModel.load(path)


def test_files_that_are_none(cost, tmp_path):
    path = tmp_path / "table.json"
    cost.save(path)
    whole = path.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(errors.RaddleIOError, match="table.json: not JSON"):
            CostModel.load(path)
    path.write_bytes(b"\xff" + whole)
    with pytest.raises(errors.RaddleIOError, match="table.json: not JSON"):
        CostModel.load(path)
    with pytest.raises(errors.RaddleIOError, match="none.json: cannot be read"):
        CostModel.load(tmp_path / "none.json")
    with pytest.raises(errors.RaddleIOError, match="none.*cannot be written"):
        cost.save(tmp_path / "none" / "table.json")


def test_a_table_of_another_model(cost, tmp_path):
    path = tmp_path / "table.json"
    cost.save(path)
    for other in (
        {**LLAMA_3_8B, "num_hidden_layers": 31},
        {**LLAMA_3_8B, "dtype": "float32"},
        {**LLAMA_3_8B, "num_key_value_heads": 4},
    ):
        with pytest.raises(errors.ArgumentError, match="table.json: .*another model.*calibrate"):
            CostModel.from_config(other, path)


# -- seconds ------------------------------------------------------------------------------------


def test_step_seconds(cost):
    plain = CostModel.from_config(LLAMA_3_8B, "a100")
    weights, tokens = 16_060_522_496 / 1.73e12, 2048 * 16_060_522_496 / 225e12
    assert plain.compute_seconds(2048) == pytest.approx(tokens)
    assert plain.compute_seconds(0, 1e6) == pytest.approx(1e6 * 524_288 / 225e12)
    assert plain.read_seconds(0) == pytest.approx(weights)
    assert plain.read_seconds(1e5) == pytest.approx(weights + 1e5 * 131_072 / 1.73e12)
    assert plain.step_seconds(2048) == pytest.approx(tokens + 0.45 * weights)
    for work in ((-1, 0, 0), (1, float("nan"), 0), (1, 0, -5)):
        with pytest.raises(errors.ArgumentError, match="expected 0 or more"):
            plain.step_seconds(*work)
    with pytest.raises(errors.DTypeError, match="tokens"):
        plain.step_seconds("many")


def test_convex_and_rising_in_all_that_a_step_does(cost):
    rng = random.Random(1)
    for _ in range(500):
        a, b = ((rng.uniform(1, 9000), rng.uniform(0, 1e8), rng.uniform(0, 6e5)) for _ in range(2))
        middle = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
        both = (cost.step_seconds(*a) + cost.step_seconds(*b)) / 2
        assert cost.step_seconds(*middle) <= both * (1 + 1e-12)
        for i in range(3):
            more = [x + (k == i) * 10 for k, x in enumerate(a)]
            assert cost.step_seconds(*more) >= cost.step_seconds(*a)
