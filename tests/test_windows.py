"""Sliding windows and two-way blocks: the masked oracle in the corners that the family tests do not reach."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from family_models import CASES, HOST_ENCODES_FIRST, IMAGE, LAYERS, TEXT, WINDOW, Case, Row, _weights
from oracle import hidden_keys, masked
from torch import Tensor
from transformers import DynamicCache

import vtprune

ONE = (("image", None),)
ROWS = (Row(ONE, 3, 5, 0), Row(ONE * 2, 1, 4, 1), Row((), 2, 9, 2), Row(ONE, 6, 2, 3))
GREEDY = {"max_new_tokens": 16, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
EXACT = {"atol": 1e-5, "rtol": 1e-5}
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])
METHODS = pytest.mark.parametrize("method", ["uniform", "fastv"])


def plan(*sites: tuple[str, int, int | float]) -> vtprune.Plan:
    """A plan of uniform cuts."""
    return vtprune.Plan(tuple(vtprune.Stage(vtprune.Site(kind, k), vtprune.Uniform(), n) for kind, k, n in sites))


def windowed(name: str, attention: str, text: Any) -> Any:
    """The tiny model of a family with another decoder config over the same weights."""
    case = CASES[name]
    config = copy.deepcopy(case.config())
    config.text_config = text if text is not None else config.text_config
    model = getattr(transformers, case.model_class)._from_config(config, attn_implementation=attention)
    model.load_state_dict(_weights(CASES[name]))
    model.generation_config.update(pad_token_id=0, eos_token_id=None, suppress_tokens=[IMAGE])
    return model.eval()


def check(case: Case, model: Any, method: Any, keep: Any, inputs: dict[str, Any], *, generate: bool = True) -> Any:
    """Logits and greedy steps of a pruned model equal the oracle's."""
    with vtprune.prune(model, method, keep) as session:
        logits = model(**inputs).logits
        report = session.report
        out = model.generate(**inputs, **GREEDY) if generate else None
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, case.visual(inputs["input_ids"]))
    with masked(model, hidden):
        want = model(**inputs).logits
        ref = model.generate(**inputs, **GREEDY) if generate else None
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    assert hidden[-1].any()
    torch.testing.assert_close(logits[seen], want[seen], **EXACT)
    if out is not None:
        assert torch.equal(out.sequences, ref.sequences)
        for got, wanted in zip(out.scores, ref.scores, strict=True):
            torch.testing.assert_close(got, wanted, **EXACT)
    return report


# any family whose decoder slides


@ATTENTION
@METHODS
@torch.no_grad()
def test_a_mistral_decoder_with_a_window_equals_masked_oracle(method: str, attention: str) -> None:
    model = windowed("llava", attention, transformers.MistralConfig(**TEXT, sliding_window=12))
    assert vtprune.geometry(model).windows == (12,) * LAYERS
    check(CASES["llava"], model, method, 0.5, CASES["llava"].batch(*ROWS))


@METHODS
@pytest.mark.parametrize("window", [26, 27, 30])
@torch.no_grad()
def test_a_window_that_decoding_outgrows_equals_masked_oracle(window: int, method: str) -> None:
    """The prompt of 26 tokens fits in, so that masks change on the way."""
    model = windowed("llava", "sdpa", transformers.MistralConfig(**TEXT, sliding_window=window))
    check(CASES["llava"], model, method, 0.5, CASES["llava"].batch(ROWS[0]))


@ATTENTION
@METHODS
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_qwen_decoders_that_slide_in_places_equal_masked_oracle(name: str, method: str, attention: str) -> None:
    case = CASES[name]
    text = case.config().text_config
    text.use_sliding_window, text.sliding_window, text.layer_types = True, 12, WINDOW["layer_types"]
    model = windowed(name, attention, text)
    assert vtprune.geometry(model).windows == (12, None) * (LAYERS // 2)
    first, second, third = case.sizes
    rows = (Row((("image", first),)), Row((("image", second), ("image", third)), 1, 4, 1), Row((), 2, 9, 2))
    check(case, model, method, 0.5, case.batch(*rows))


# cuts at several depths


@ATTENTION
@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2"])
@pytest.mark.parametrize(
    "stages", [[("input", 0, 9), ("layer", 2, 4)], [("layer", 1, 9), ("layer", 2, 5), ("layer", 3, 2)]], ids=["2", "3"]
)
@torch.no_grad()
def test_several_cuts_equal_masked_oracle(stages: Any, name: str, attention: str) -> None:
    case = CASES[name]
    check(case, case.model(attention), plan(*stages), None, case.batch(*ROWS))


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2"])
@METHODS
@torch.no_grad()
def test_padding_on_the_right_equals_masked_oracle(method: str, name: str) -> None:
    case = CASES[name]
    check(case, case.model(), method, 0.5, case.batch(*ROWS, left=False), generate=False)


@METHODS
@torch.no_grad()
def test_crops_that_touch_are_one_block(method: str) -> None:
    """The host starts a block where a placeholder follows another token, whatever image it belongs to."""
    case = CASES["gemma3"]
    inputs = case.batch(Row(ONE * 2, 3, 5, 0))
    keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    keep[0, 3 + 16 : 3 + 16 + 2] = False  # the text between the two images
    inputs |= {k: inputs[k][keep][None] for k in ("input_ids", "attention_mask", "token_type_ids")}
    assert inputs["input_ids"][0, 3:35].eq(IMAGE).all()
    check(case, case.model(), method, 0.5, inputs)


@ATTENTION
@METHODS
@torch.no_grad()
def test_gemma3_without_token_types_is_causal(method: str, attention: str) -> None:
    case = CASES["gemma3"]
    inputs = case.batch(*ROWS)
    del inputs["token_type_ids"]
    check(case, case.model(attention), method, 0.5, inputs)


# PaliGemma: what the host takes for the prompt


@ATTENTION
@METHODS
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["lone", "padded"])
@torch.no_grad()
def test_paligemma_without_token_types_equals_what_the_host_makes_of_it(
    rows: tuple[Row, ...], method: str, attention: str
) -> None:
    """Eager attention and padded batches are causal then, sdpa over a lone prompt looks both ways."""
    case = CASES["paligemma"]
    inputs = case.batch(*rows)
    del inputs["token_type_ids"]
    check(case, case.model(attention), method, 0.5, inputs, generate=False)


@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
@METHODS
def test_training_on_a_suffix_equals_masked_oracle(method: str, name: str) -> None:
    case = CASES[name]
    model, inputs = case.model(), case.batch(Row(ONE, 3, 6, 0), Row(ONE, 1, 4, 1), left=False)
    mask = inputs["attention_mask"]
    suffix = (mask.cumsum(1) > mask.sum(1, keepdim=True) - 3) & mask.bool()
    inputs["token_type_ids"] = suffix.long()
    inputs["labels"] = inputs["input_ids"].masked_fill(~suffix, -100)
    with vtprune.prune(model, method, 0.5) as session:
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        report = session.report
    weight = "model.language_model.layers.0.self_attn.q_proj.weight"
    got = model.get_parameter(weight).grad.clone()
    model.zero_grad()
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, case.visual(inputs["input_ids"]))
    with masked(model, hidden):
        want = model(**inputs, use_cache=False).loss
        want.backward()
    torch.testing.assert_close(loss, want, **EXACT)
    torch.testing.assert_close(got, model.get_parameter(weight).grad, atol=1e-4, rtol=1e-4)
    inputs["token_type_ids"] = torch.zeros_like(mask)
    with torch.no_grad(), masked(model, hidden):
        assert (model(**inputs, use_cache=False).loss - want).abs() > 1e-3, "the suffix must matter"


# conversations


def direct(
    case: Case, model: Any, turns: list[dict[str, Tensor]], cache: DynamicCache, how: str = "pixels"
) -> tuple[Tensor, Tensor]:
    """Calls of the model itself over one cache, then two decode steps. Returns ids, and logits of the last call.

    Args:
        how: "pixels" with token types of the whole conversation, "features" encoded before the call, or "untyped":
            token types in the first turn alone.
    """
    ids = mask = turns[0]["input_ids"][:, :0]
    steps = [{"input_ids": torch.tensor([[7]])}, {"input_ids": torch.tensor([[8]])}]
    for turn in [*turns, *steps]:
        ids = torch.cat([ids, turn["input_ids"]], 1)
        mask = torch.ones_like(ids)
        pixels = turn.get("pixel_values")
        more: dict[str, Any] = {"pixel_values": pixels}
        if pixels is not None and how == "features":
            more = {"mm_encoder_outputs": {"image": model.get_image_features(pixels)}}
        if pixels is not None and (how != "untyped" or turn is turns[0]):
            more |= case.extra(ids)
        logits = model(input_ids=turn["input_ids"], attention_mask=mask, past_key_values=cache, **more).logits
    return ids, logits


@ATTENTION
@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2"])
@pytest.mark.parametrize("knows_windows", [True, False])
@METHODS
@torch.no_grad()
def test_new_images_in_a_conversation_equal_masked_oracle(
    method: str, knows_windows: bool, name: str, attention: str
) -> None:
    """Token types of the whole conversation come with every image: the host makes blocks in later turns as well."""
    conversation_equals_masked_oracle(name, method, attention, knows_windows, "pixels")


@METHODS
@pytest.mark.parametrize("how", ["features", "untyped"])
@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
@torch.no_grad()
def test_later_images_that_paligemma_takes_causally_equal_masked_oracle(name: str, how: str, method: str) -> None:
    if how == "features" and not HOST_ENCODES_FIRST:
        pytest.skip("this transformers takes no encoded features")
    conversation_equals_masked_oracle(name, method, "sdpa", True, how)


def conversation_equals_masked_oracle(name: str, method: str, attention: str, knows_windows: bool, how: str) -> None:
    case = CASES[name]
    if not case.turns:
        pytest.skip("this transformers fails on it by itself")
    model = case.model(attention)
    text = {"input_ids": torch.randint(3, 90, (1, 4), generator=torch.Generator().manual_seed(5))}
    turns = [case.batch(ROWS[0]), text, case.batch(Row(ONE * 2, 2, 3, 20)), text, case.batch(Row(ONE, 1, 2, 30))]
    caches = {"config": model.config.text_config} if knows_windows else {}

    logged: list[vtprune.Report] = []
    with vtprune.prune(model, method, 0.4) as session:
        handle = model.register_forward_hook(
            lambda m, a, k, o: logged.append(session.report) if case.visual(k["input_ids"]).any() else None,
            with_kwargs=True,
        )
        ids, got = direct(case, model, turns, DynamicCache(**caches), how)
        handle.remove()
    assert len(logged) == 3
    hidden = [torch.zeros_like(ids, dtype=torch.bool) for _ in range(LAYERS)]
    places = case.visual(ids)[0].nonzero()[:, 0].split([r.visual_tokens[0] for r in logged])
    for report, positions in zip(logged, places, strict=True):
        here = torch.zeros_like(ids, dtype=torch.bool)
        here[0, positions] = True
        for layer, gone in enumerate(hidden_keys(report, ids, LAYERS, here)):
            hidden[layer] |= gone
    with masked(model, hidden):
        _, want = direct(case, model, turns, DynamicCache(**caches), how)
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("name", ["gemma3", "paligemma2"])
@METHODS
@torch.no_grad()
def test_turns_of_a_padded_batch_equal_each_row_alone(method: str, name: str) -> None:
    """Rows keep different numbers of tokens in turn 2, so that padding stands between what they keep."""
    case = CASES[name]
    if not case.turns:
        pytest.skip("this transformers fails on it by itself")
    model, rows = case.model(), (Row(ONE, 3, 5, 0), Row(ONE, 1, 4, 1))
    later = (Row(ONE * 2, 2, 3, 20), Row(ONE, 4, 2, 21))

    def run(first: dict[str, Any], second: dict[str, Any]) -> Tensor:
        cache, mask = DynamicCache(config=model.config.text_config), first["attention_mask"]
        model(**first, past_key_values=cache, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        both = torch.cat([mask, second["attention_mask"]], 1)
        ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
        call = {**second, "attention_mask": both, **case.extra(ids), "past_key_values": cache}
        out = model(**call, position_ids=(both.cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] :])
        return out.logits[:, -1]

    with vtprune.prune(model, method, 0.4):
        together = run(case.batch(*rows), case.batch(*later))
        for b in range(2):
            # a row alone has no padding between its turns, and the window counts the host's padding
            width = case.batch(*later)["input_ids"].shape[1]
            own = case.batch(later[b])
            pad = width - own["input_ids"].shape[1]
            own = {k: torch.nn.functional.pad(v, (pad, 0)) if k != "pixel_values" else v for k, v in own.items()}
            torch.testing.assert_close(together[b], run(case.batch(rows[b]), own)[0], **EXACT)
