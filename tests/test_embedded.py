"""The invariants on the embedded, trained model: identity, masked oracle, ragged batch, beams, multi-turn."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from oracle import hidden_keys, masked
from transformers import DynamicCache

import vtprune
from vtprune.contract import METHODS
from vtprune.tiny.scenes import scene_questions

LAYERS = 12
GREEDY = {"min_new_tokens": 16, "max_new_tokens": 16, "do_sample": False, "output_scores": True}


@lru_cache
def loaded() -> tuple[Any, Any]:
    return vtprune.load_tiny("llava")


@lru_cache
def prompts() -> tuple[tuple[Any, str], ...]:
    """Four dev scenes and a question of another length about each."""
    scenes = scene_questions("dev", 4, 0, 3)
    return tuple((image, questions[i % len(questions)].question) for i, (image, questions) in enumerate(scenes))


def encode(count: int) -> dict[str, torch.Tensor]:
    _, processor = loaded()
    texts, images = [], []
    for image, question in prompts()[:count]:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        images.append(image)
    return dict(processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt"))


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Any:
    """The embedded model on each attention backend."""
    model, _ = loaded()
    model.set_attn_implementation(request.param)
    yield model
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("method", sorted(METHODS))
@torch.no_grad()
def test_keep_all_is_bit_identical(model: Any, method: str) -> None:
    inputs = encode(3)
    logits, ids = model(**inputs).logits, model.generate(**inputs, max_new_tokens=8, do_sample=False)
    for keep in (1.0, 256):
        with vtprune.prune(model, method, keep):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), ids)


@pytest.mark.parametrize("method", ["random", "uniform", "divprune", "fastv"])
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_pruned_run_equals_masked_oracle(model: Any, method: str, count: int) -> None:
    inputs = encode(count)
    with vtprune.prune(model, method, 1 / 9) as session:
        out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        beams = model.generate(**inputs, num_beams=3, max_new_tokens=8, do_sample=False)
        report = session.report
    rows = inputs["input_ids"].repeat_interleave(3, 0)
    hidden = [h[::3] for h in hidden_keys(report, image_as_99(model, rows), LAYERS)]
    with masked(model, hidden):
        ref = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        wanted = model.generate(**inputs, num_beams=3, max_new_tokens=8, do_sample=False)
    assert torch.equal(out.sequences, ref.sequences)
    for got, want in zip(out.scores, ref.scores, strict=True):
        finite = want.isfinite()
        torch.testing.assert_close(got[finite], want[finite], atol=2e-5, rtol=2e-5)
    assert torch.equal(beams, wanted)


def image_as_99(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The oracle knows image placeholders as token 99, which the embedded vocabulary does not have."""
    return torch.where(ids == model.config.image_token_id, 99, 0)


@pytest.mark.parametrize("method", sorted(METHODS))
@torch.no_grad()
def test_batch_equals_each_sample_alone(model: Any, method: str) -> None:
    together = encode(4)
    assert (together["attention_mask"] == 0).any(), "no padding, so the test shows nothing"
    with vtprune.prune(model, method, 1 / 9) as session:
        out = model.generate(**together, min_new_tokens=16, max_new_tokens=16, do_sample=False)
        kept = session.report.kept[-1].indices
        for b in range(len(prompts())):
            real = together["attention_mask"][b].bool()
            one = {
                "input_ids": together["input_ids"][b][real][None],
                "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long),
                "pixel_values": together["pixel_values"][b : b + 1],
            }
            alone = model.generate(**one, min_new_tokens=16, max_new_tokens=16, do_sample=False)
            assert torch.equal(out[b, -16:], alone[0, -16:])
            assert torch.equal(kept[b], session.report.kept[-1].indices[0])


@pytest.mark.parametrize("method", ["uniform", "fastv", "flowcut"])
@torch.no_grad()
def test_a_second_question_about_the_same_image_reuses_the_cache(model: Any, method: str) -> None:
    """Two turns over one cache give what one call over the whole dialogue gives, once turn 1 has chosen."""
    _, processor = loaded()
    inputs = encode(1)
    tail = processor.tokenizer(" user : how many red objects are there ? assistant :", return_tensors="pt")
    tail_ids = tail["input_ids"][:, -11:]
    with vtprune.prune(model, method, 0.25) as session:
        cache = DynamicCache(config=model.config.text_config)
        model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
        report = session.report
        ids = torch.cat([inputs["input_ids"], tail_ids], 1)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=6, do_sample=False
        )
    if method == "flowcut":
        assert out.shape[1] > ids.shape[1]
        return
    length = ids.shape[1]
    hidden = [
        torch.nn.functional.pad(h, (0, length - h.shape[1]))
        for h in hidden_keys(report, image_as_99(model, inputs["input_ids"]), LAYERS)
    ]
    with masked(model, hidden):
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}
        want = model.generate(**whole, max_new_tokens=6, do_sample=False)
    assert torch.equal(out, want)
