"""The ways people run a VLM around vtprune: half precision, LoRA, dispatched weights, compiled decode steps, int8."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import CASES, LAYERS, Case, Row
from oracle import hidden_keys, masked
from torch import Tensor, nn

import vtprune

NAMES = ["llava", "llava_next", "qwen2_vl"]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def prompt(case: Case) -> dict[str, Any]:
    return case.batch(Row((("image", case.sizes[0]),)), Row((("image", case.sizes[1]),), 1, 4, 1))


def logits_and_oracle(case: Case, model: Any, inputs: dict[str, Any], method: Any, keep: Any) -> tuple[Tensor, Tensor]:
    """Logits of the pruned model and of its oracle, each [rows that count, vocabulary]."""
    with vtprune.prune(model, method, keep) as session:
        got, report = model(**inputs).logits, session.report
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, case.visual(inputs["input_ids"]))
    with masked(model, hidden):
        want = model(**inputs).logits
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    return got[seen], want[seen]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_stays_close_to_its_own_oracle(case: Case, dtype: torch.dtype) -> None:
    model, inputs = case.model().to(dtype), prompt(case)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    got, want = logits_and_oracle(case, model, inputs, "fastv", 0.5)
    assert got.dtype == dtype
    assert (got - want).abs().max() < 0.03 * want.abs().max()
    with vtprune.prune(model, "fastv", 0.5) as session:
        out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        first = model(**inputs).past_key_values
        assert session.report.kv_bytes == sum(
            t.numel() * t.element_size() for layer in first.layers for t in (layer.keys, layer.values)
        )
    assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + 6


# peft asks for a name that transformers has deprecated
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["uniform", "fastv"])
def test_lora_gradients_equal_the_oracle(case: Case, method: str) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = case.model(), prompt(case)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]

    def gradients() -> dict[str, Tensor]:
        tuned.zero_grad()
        tuned(**inputs, labels=labels, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}

    with vtprune.prune(tuned, method, 0.5) as session:
        got, report = gradients(), session.report
    assert all("lora" in name for name in got)
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, case.visual(inputs["input_ids"]))
    with masked(model, hidden):
        want = gradients()
    assert got.keys() == want.keys()
    for name in got:
        torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=1e-4)
    assert sum(g.abs().sum() for g in got.values()) > 0


def state(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


# generate() of transformers 5.23 cannot offload the newline of LLaVA-NeXT: it encodes images before any hook fetches it
DISPATCHED = [*[(name, "cpu and disk") for name in NAMES], ("llava", "disk"), ("qwen2_vl", "disk")]


# a parameter of the root itself has to be named, and is then said to be no module
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules:UserWarning")
@pytest.mark.parametrize(("name", "where"), DISPATCHED)
@torch.no_grad()
def test_dispatched_weights_give_the_same_answer(name: str, where: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    case = CASES[name]
    inputs, plain, model = prompt(case), case.model(), case.model()
    with vtprune.prune(plain, "fastv", 0.5) as session:
        want, kept = plain.generate(**inputs, **GREEDY), session.report.kept
    if where == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        assert next(model.parameters()).device.type == "meta"
    else:
        parts = [*model.model._modules, *model.model._parameters]
        places = {part: "cpu" for part in parts if part != "language_model"}
        places |= {f"language_model.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")}
        places |= {f"language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(LAYERS)}
        places = {f"model.{part}": place for part, place in places.items()}
        accelerate.dispatch_model(model, {**places, "lm_head": "cpu"}, main_device="cpu", offload_dir=str(tmp_path))
        devices = [next(layer.parameters()).device.type for layer in model.model.language_model.layers]
        assert devices == ["cpu", "meta", "cpu", "meta"]
    base = model.generate(**inputs, **GREEDY)
    before = state(model)
    with vtprune.prune(model, "fastv", 0.5) as session:
        got = model.generate(**inputs, **GREEDY)
        for mine, theirs in zip(session.report.kept, kept, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine.indices, theirs.indices, strict=True))
    assert torch.equal(got, want)
    assert state(model) == before
    assert torch.equal(model.generate(**inputs, **GREEDY), base)
    assert not torch.equal(base, want)


@torch.no_grad()
def test_compiled_decode_steps_give_the_same_answer(case: Case) -> None:
    """Traced without code generation: what counts is that no shape or state of the prefill is baked in."""
    model, inputs = case.model(), prompt(case)
    plain, compiled = model.forward, torch.compile(model.forward, backend="eager", dynamic=True)
    steps = []

    @functools.wraps(plain)
    def forward(**arguments: Any) -> Any:
        if arguments["input_ids"].shape[1] > 1:
            return plain(**arguments)
        steps.append(1)
        return compiled(**arguments)

    with vtprune.prune(model, "fastv", 0.5):
        want = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        model.forward = forward
        got = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert len(steps) == 2
    assert torch.equal(got, want)


@torch.no_grad()
def test_int8_weights_equal_their_own_oracle(case: Case) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model, inputs = case.model(), prompt(case)
    whole = model(**inputs).logits
    torchao.quantize_(model.model.language_model, torchao.Int8WeightOnlyConfig())
    assert (model(**inputs).logits - whole).abs().max() > 1e-2
    for method in ("uniform", "fastv"):
        got, want = logits_and_oracle(case, model, inputs, method, 0.5)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_int8_activations_with_a_scale_a_token_are_exact_but_for_edges_of_rounding(case: Case) -> None:
    """What a token turns into depends on no other token; 1e-7 from the attention may still tip a value over an edge."""
    torchao = pytest.importorskip("torchao.quantization")
    model, inputs = case.model(), prompt(case)
    torchao.quantize_(model.model.language_model, torchao.Int8DynamicActivationInt8WeightConfig())
    linear, tokens = model.model.language_model.layers[0].mlp.up_proj, torch.randn(1, 9, 64)
    assert torch.equal(linear(tokens)[:, ::2], linear(tokens[:, ::2]))
    # in the last layer a token passes too few roundings to meet many edges
    late = vtprune.Plan((vtprune.Stage(vtprune.Site("layer", LAYERS - 1), vtprune.Uniform(), 0.5),))
    got, want = logits_and_oracle(case, model, inputs, late, None)
    off = (got - want).abs().amax(-1)
    assert (off < 1e-5).float().mean() > 0.8
    assert off.max() < 0.1 * want.abs().max()


def test_int8_activations_with_one_scale_for_all_tokens_are_refused() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    case = CASES["qwen2_vl"]
    model = case.model()
    shared = torchao.Int8DynamicActivationInt8WeightConfig(granularity=torchao.PerTensor())
    torchao.quantize_(model.model.language_model, shared)
    message = r"language_model.layers.0.self_attn.q_proj \(Linear\) quantises its inputs with one scale for all tokens"
    with pytest.raises(vtprune.UnsupportedModelError, match=message):
        vtprune.prune(model, "uniform", 0.5)
    inputs = prompt(case)
    whole = model(**inputs).logits
    with vtprune.prune(model, "uniform", 1.0):
        assert torch.equal(model(**inputs).logits, whole)


# torch says that this will go; the models that people have made with it will not
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*torch.quantize_per_tensor.*:UserWarning")
def test_dynamic_int8_of_torch_itself_is_refused() -> None:
    model = CASES["llava"].model()
    torch.ao.quantization.quantize_dynamic(model.model.language_model, {nn.Linear}, inplace=True)
    with pytest.raises(vtprune.UnsupportedModelError, match=r"q_proj \(Linear\) quantises its inputs"):
        vtprune.prune(model, "uniform", 0.5)
