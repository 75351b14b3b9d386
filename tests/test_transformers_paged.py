"""Continuous batching of transformers through raddle, against that of sdpa and eager.

Needs: torch, transformers; a GPU for device cuda.
"""

import contextlib
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")

from raddle.integrations import (  # noqa: E402
    transformers_paged,
)
from raddle.integrations.transformers import clear, disable, enable  # noqa: E402

from tests.transformers_cases import (  # noqa: E402
    EAGER,
    MODELS,
    WINDOWS,
    assert_same_text,
    batch_options,
    count,
    count_plans,
    generate,
    generate_batch,
    make_model,
    make_prompts,
)


@pytest.fixture(autouse=True)
def no_plans_left():
    yield
    clear()


@pytest.fixture(scope="module")
def models():
    """(name, device) -> a model in float32 on the CPU, float16 on CUDA."""
    made = {}

    def get(name, device):
        if (name, device) not in made:
            made[name, device] = make_model(name).to(device)
            if device == "cuda":
                made[name, device].half()
        return made[name, device]

    return get


# ------------------------------------------------------------------ continuous batching


@pytest.fixture(autouse=True)
def memory_to_report(monkeypatch, request):
    """Some versions cannot size a cache on the CPU, or not without psutil."""
    name = "get_device_and_memory_breakdown"
    if "cuda" not in request.node.name:
        with contextlib.suppress(ImportError):
            from transformers.generation.continuous_batching import cache

            monkeypatch.setattr(cache, name, lambda: (torch.device("cpu"), 2**30, 0, 0))


def test_readme_program(models):
    """The README's own lines."""
    readme = Path(__file__).resolve().parents[1] / "README.md"
    lines = re.search(r"```py\n(from raddle.integrations.transf.*?)```", readme.read_text(), re.S)
    model = models("llama", "cpu")
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    given = dict(model=model, prompts=prompts, ids=torch.tensor(prompts[:1]))
    exec(lines[1], given | dict(options=batch_options(5)))
    assert model.config._attn_implementation == "sdpa"


@pytest.fixture
def their_paging():
    """Name of transformers' own paged implementation where its windows differ from generate(), as
    those of 4.5x and 5.0 do; else None."""
    reason = "needs transformers 4.57: an earlier one has another continuous batching"
    continuous_api = pytest.importorskip(
        "transformers.generation.continuous_batching.continuous_api", reason=reason
    )
    manager = continuous_api.ContinuousBatchingManager
    if hasattr(manager, "switch_to_cb_friendly_attn"):
        return None
    names = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()
    return "paged|sdpa" if "paged|sdpa" in names else "sdpa_paged"


@pytest.mark.parametrize("name", MODELS)
def test_continuous_batching(models, device, name, their_paging, monkeypatch):
    model = models(name, device)
    prompts = [make_prompts("cpu", lengths=(n,), seed=n)[0][0].tolist() for n in (5, 17, 33, 2, 60)]
    if name in WINDOWS and their_paging:
        if name in EAGER:
            pytest.skip("needs transformers 5.17: paged windows with caps or sinks in earlier ones")
        model.set_attn_implementation(their_paging)
        want = generate_batch(model, prompts)
        model.set_attn_implementation("sdpa")
    else:
        want = [generate(model, torch.tensor([p], device=device), tokens=20)[0] for p in prompts]
    runs, plans = count(monkeypatch, transformers_paged, "run"), count_plans(monkeypatch)
    steps = count(monkeypatch, type(model), "forward")
    enable(model)
    got = generate_batch(model, prompts)
    disable(model)
    assert_same_text(model, prompts, want, got)
    # K and V stay in the cache; planned once per step and kind of layer, not for each layer (but
    # anew when the thread that prepares the next step writes to the offsets of this one).
    kinds = 2 if name in WINDOWS and name != "mistral" else 1
    assert len(plans) <= kinds * len(steps) + 2
    assert (len(runs) > 0) == (name != "mistral")
