"""The ways people run a VLM around vtprune: half precision, LoRA, offloading, compiled decode steps, int8 linears."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_models import CASES, LAYERS, Case, Row
from models import LAYERS as LLAVA_LAYERS
from models import Row as LlavaRow
from models import batch, llava
from oracle import hidden_keys, masked

import vtprune

assert LLAVA_LAYERS == LAYERS
QWEN = CASES["qwen2_vl"]


def prompt(case: Case) -> dict:
    return case.batch(Row((("image", case.sizes[0]),)), Row((("image", case.sizes[1]),), 1, 4, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qwen2_vl", "llava_next"])
@torch.no_grad()
def test_half_precision_stays_close_to_its_own_oracle(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model, inputs = case.model().to(dtype), prompt(case)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with vtprune.prune(model, "fastv", 0.5) as session:
        out, report = model(**inputs), session.report
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, case.visual(inputs["input_ids"]))
    with masked(model, hidden):
        want = model(**inputs).logits
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    scale = want[seen].abs().max()
    assert (out.logits[seen] - want[seen]).abs().max() < 0.03 * scale
    assert out.logits.dtype == dtype
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 4
    held = sum(t.numel() * t.element_size() for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
    assert report.kv_bytes == held


# peft asks for a name that transformers has deprecated
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_gradients_equal_the_oracle() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = llava(), batch(LlavaRow(1, 3, 5, 0))
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]

    def gradients() -> dict[str, torch.Tensor]:
        tuned.zero_grad()
        tuned(**inputs, labels=labels, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}

    with vtprune.prune(tuned, "fastv", 0.4) as session:
        got, report = gradients(), session.report
    assert all("lora" in name for name in got)
    with masked(model, hidden_keys(report, inputs["input_ids"], LAYERS)):
        want = gradients()
    assert got.keys() == want.keys()
    for name in got:
        if "vision_tower" not in name:
            torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=1e-4)
    assert sum(g.abs().sum() for g in got.values()) > 0


@torch.no_grad()
def test_weights_offloaded_to_disk_give_the_same_answer(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    inputs = batch(LlavaRow(1, 3, 5, 0), LlavaRow(2, 1, 4, 1))
    plain = llava()
    with vtprune.prune(plain, "fastv", 0.4):
        want = plain.generate(**inputs, max_new_tokens=6, do_sample=False)
    model = llava()
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    with vtprune.prune(model, "fastv", 0.4) as session:
        got = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert session.report.average_tokens[0] < 16
    assert torch.equal(got, want)


@torch.no_grad()
def test_a_compiled_forward_decodes_the_same() -> None:
    """Traced without code generation: what counts is that no shape or state of the prefill is baked in."""
    inputs = batch(LlavaRow(1, 3, 5, 0))
    model = llava()
    with vtprune.prune(model, "fastv", 0.4):
        want = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        out = model(**inputs, use_cache=True)
        step = torch.compile(model, backend="eager", dynamic=True)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        for _ in range(5):
            ids = torch.cat([ids, token], 1)
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            out = step(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], 1)
    assert torch.equal(ids, want)


@torch.no_grad()
def test_int8_linears_equal_their_own_oracle() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model, inputs = llava(), batch(LlavaRow(1, 3, 5, 0), LlavaRow(2, 1, 4, 1))
    torchao.quantize_(model.model.language_model, torchao.Int8WeightOnlyConfig())
    with vtprune.prune(model, "fastv", 0.4) as session:
        logits, report = model(**inputs).logits, session.report
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    with masked(model, hidden):
        want = model(**inputs).logits
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], atol=1e-4, rtol=1e-4)
