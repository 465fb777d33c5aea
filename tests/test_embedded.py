"""The invariants on the embedded, trained models: identity, masked oracle, ragged batch, beams, multi-turn."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from learned import BUDGETED, IN_STILLS, ready
from oracle import hidden_keys, masked
from transformers import DynamicCache

import vtprune
from vtprune.tiny import vocabulary
from vtprune.tiny.scenes import scene_questions

LAYERS = 12
GREEDY = {"min_new_tokens": 16, "max_new_tokens": 16, "do_sample": False, "output_scores": True}


@lru_cache
def loaded(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    return vtprune.load_tiny(name, dtype=dtype)


@lru_cache
def prompts() -> tuple[tuple[Any, str], ...]:
    """Four dev scenes and a question of another length about each."""
    scenes = scene_questions("dev", 4, 0, 3)
    return tuple((image, questions[i % len(questions)].question) for i, (image, questions) in enumerate(scenes))


class Tiny:
    """An embedded model on one attention backend, with its processor."""

    def __init__(self, name: str, attention: str) -> None:
        self.name, self.attention = name, attention
        self.model, self.processor = loaded(name)
        self.model.set_attn_implementation(attention)
        self.tokens = 256 if name == "llava" else 81
        # marks around a picture are never an answer: their logits are equal, and which is the largest is chance
        marks = range(len(vocabulary.WORDS), self.model.get_input_embeddings().num_embeddings)
        self.words_only = {"suppress_tokens": list(marks)} if marks else {}

    def in_double(self, *numbers: int) -> tuple[Any, dict[str, torch.Tensor]]:
        """The model and these prompts in fp64.

        In fp32 a processor's order of sums moves some logits of these trained models by up to 1.5e-4. Eager attention
        stays in fp32: it takes its softmax there, where the mask of fp64 is infinite.
        """
        if self.attention == "eager":
            return self.model, self.encode(*numbers)
        model, _ = loaded(self.name, torch.float64)
        model.set_attn_implementation(self.attention)
        inputs = self.encode(*numbers)
        return model, {**inputs, "pixel_values": inputs["pixel_values"].double()}

    def encode(self, *numbers: int) -> dict[str, torch.Tensor]:
        """Padded inputs of these prompts."""
        texts, images = [], []
        for image, question in (prompts()[number] for number in numbers):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            message = {"role": "user", "content": content}
            texts.append(self.processor.apply_chat_template([message], add_generation_prompt=True))
            images.append(image)
        return dict(self.processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt"))


@pytest.fixture(params=["llava-sdpa", "llava-eager", "qwen2_vl-sdpa", "qwen2_vl-eager", "internvl-sdpa"])
def tiny(request: pytest.FixtureRequest) -> Any:
    """The embedded models on the attention backends."""
    name, attention = request.param.split("-")
    tiny = Tiny(name, attention)
    yield tiny
    tiny.model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("method", BUDGETED)
@torch.no_grad()
def test_keep_all_is_bit_identical(tiny: Tiny, method: str) -> None:
    model, inputs = tiny.model, tiny.encode(0, 1, 2)
    logits, ids = model(**inputs).logits, model.generate(**inputs, max_new_tokens=8, do_sample=False)
    for keep in (1.0, tiny.tokens):
        with vtprune.prune(model, ready(method, model), keep):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), ids)


@pytest.mark.parametrize("method", ["random", "uniform", "divprune", "fastv"])
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_pruned_run_equals_masked_oracle(tiny: Tiny, method: str, count: int) -> None:
    model, inputs = tiny.in_double(*range(count))
    with vtprune.prune(model, method, 1 / 9) as session:
        out = model.generate(**inputs, **GREEDY, **tiny.words_only, return_dict_in_generate=True)
        beams = model.generate(**inputs, **tiny.words_only, num_beams=3, max_new_tokens=8, do_sample=False)
        report = session.report
    rows = inputs["input_ids"].repeat_interleave(3, 0)
    hidden = [h[::3] for h in hidden_keys(report, image_as_99(model, rows), LAYERS)]
    with masked(model, hidden):
        ref = model.generate(**inputs, **GREEDY, **tiny.words_only, return_dict_in_generate=True)
        wanted = model.generate(**inputs, **tiny.words_only, num_beams=3, max_new_tokens=8, do_sample=False)
    assert torch.equal(out.sequences, ref.sequences)
    for got, want in zip(out.scores, ref.scores, strict=True):
        finite = want.isfinite()
        torch.testing.assert_close(got[finite], want[finite], atol=2e-5, rtol=2e-5)
    assert torch.equal(beams, wanted)


def image_as_99(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The oracle knows image placeholders as token 99, which the embedded vocabulary does not have."""
    return torch.where(ids == model.config.image_token_id, 99, 0)


@pytest.mark.parametrize("method", IN_STILLS)
@torch.no_grad()
def test_batch_equals_each_sample_alone(tiny: Tiny, method: str) -> None:
    model, together = tiny.model, tiny.encode(0, 1, 2, 3)
    assert (together["attention_mask"] == 0).any(), "no padding, so the test shows nothing"
    keep = (
        0.5 if method in ("atp", "gemfilter", "pyramiddrop", "sparsevlm", "spatten", "transprune") else 1 / 9
    )  # the first layers of these see every token
    with vtprune.prune(model, ready(method, model), keep) as session:
        longer = {"min_new_tokens": 16, "max_new_tokens": 16, "do_sample": False, **tiny.words_only}
        out = model.generate(**together, **longer)
        kept = session.report.kept[-1].indices
        for b in range(len(prompts())):
            alone = model.generate(**tiny.encode(b), **longer)
            assert torch.equal(out[b, -16:], alone[0, -16:])
            assert torch.equal(kept[b], session.report.kept[-1].indices[0])


@pytest.mark.parametrize("method", ["uniform", "fastv", "flowcut"])
@torch.no_grad()
def test_a_second_question_about_the_same_image_reuses_the_cache(tiny: Tiny, method: str) -> None:
    """Two turns over one cache give what one call over the whole dialogue gives, once turn 1 has chosen."""
    model, inputs = tiny.model, tiny.encode(0)
    tail = tiny.processor.tokenizer(" user : how many red objects are there ? assistant :", return_tensors="pt")
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
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in inputs:
            kinds = inputs["mm_token_type_ids"]
            whole["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, length - kinds.shape[1]))
        want = model.generate(**whole, max_new_tokens=6, do_sample=False)
    assert torch.equal(out, want)
