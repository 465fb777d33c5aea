"""Bad input: what was given, what is legal, what to do; raised before the decoder runs, and the session lives on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from models import IMAGE, TOKENS, Row, batch, llava
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

import vtprune
from vtprune.contract import Scorer, TokenView
from vtprune.errors import HostContractError, SessionError, UnknownNameError


@pytest.fixture
def model() -> Iterator[LlavaForConditionalGeneration]:
    """A model that notes how often its first decoder layer ran."""
    model = llava()
    model.ran = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: model.ran.append(1))
    yield model
    handle.remove()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, r"keep must be an int >= 1.*got 0\."),
        (-3, r"got -3\."),
        (0.0, r"got 0\.0\."),
        (1.5, r"got 1\.5\. For 1 tokens write the int 1"),
        (64.0, r"For 64 tokens write the int 64"),
        (float("nan"), "got nan"),
        (True, r"got True \(bool\)"),
        ("many", "got 'many'"),
        ("250%", "got '250%'"),
        ("1/0", "got '1/0'"),
        (None, "uniform needs a budget: pass keep=64"),
        ([0.5, 0.25], r"got 2 \(\[0\.5, 0\.25\]\) for 1 method"),
    ],
)
def test_wrong_keep(model: LlavaForConditionalGeneration, keep: object, message: str) -> None:
    with pytest.raises(vtprune.BudgetError, match=message):
        vtprune.prune(model, "uniform", keep)
    assert not model.model._forward_pre_hooks


def test_keep_and_flops_exclude_each_other(model: LlavaForConditionalGeneration) -> None:
    with pytest.raises(vtprune.BudgetError, match=r"got keep=5 and flops=0\.3"):
        vtprune.prune(model, "uniform", 5, flops=0.3)
    with pytest.raises(vtprune.BudgetError, match=r"basis must be 'average' or 'final'.*got 'middle'"):
        vtprune.prune(model, "uniform", 5, basis="middle")
    with pytest.raises(vtprune.BudgetError, match=r"flops must be a share in \(0, 1\].*got 30"):
        vtprune.prune(model, "uniform", flops=30)
    with pytest.raises(vtprune.BudgetError, match=r"flops must be a share in \(0, 1\].*got '0\.3'"):
        vtprune.prune(model, "uniform", flops="0.3")


def test_several_methods_need_several_budgets(model: LlavaForConditionalGeneration) -> None:
    with pytest.raises(vtprune.BudgetError, match=r"2 methods need a list of budgets.*got keep=0\.5"):
        vtprune.prune(model, ["uniform", "fastv"], 0.5)
    with pytest.raises(vtprune.PlanError, match=r"got input \(uniform\) after layer\[1\] \(fastv\)"):
        vtprune.prune(model, ["fastv", "uniform"], [0.5, 0.4])
    with pytest.raises(vtprune.PlanError, match="got \\[\\]"):
        vtprune.prune(model, [], 0.5)


def test_impossible_budget_names_the_floor_and_the_knob(model: LlavaForConditionalGeneration) -> None:
    with pytest.raises(vtprune.BudgetError, match=r"fastv cannot reach 2 of 16.*at least 4\.75.*'layer'") as caught:
        vtprune.prune(model, "fastv", 2)
    assert caught.value.floor == 4.75


def test_unknown_method_suggests(model: LlavaForConditionalGeneration) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown method 'fastvv'. Did you mean 'fastv'\? Available: .*flowcut"):
        vtprune.prune(model, "fastvv", 5)
    with pytest.raises(vtprune.PlanError, match="got 7"):
        vtprune.prune(model, 7, 5)


def test_unsupported_models() -> None:
    text = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    )
    with pytest.raises(
        vtprune.UnsupportedModelError, match=r"no family serves model_type 'llama'. Supported: .*llava: Llava"
    ):
        vtprune.prune(text, "uniform", 5)
    with pytest.raises(vtprune.UnsupportedModelError, match="got str"):
        vtprune.prune("llava-hf/llava-1.5-7b-hf", "uniform", 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [-2, -3]}, r"got \[-2, -3\]"),
        ({"vision_feature_select_strategy": "full"}, "'full' with a clip_vision_model"),
        ({"text_config": {"model_type": "gemma"}}, "'gemma' decoder"),
        (
            {"text_config": {"model_type": "qwen2", "num_hidden_layers": 2, "layer_types": ["chunked_attention"] * 2}},
            "llava with decoder layers of the kind chunked_attention .* full_attention, sliding_attention",
        ),
        ({"vision_config": {"model_type": "pixtral"}}, "'pixtral' tower"),
    ],
)
def test_refused_variants(change: dict, message: str) -> None:
    base = LlavaConfig(
        vision_config=CLIPVisionConfig().to_dict(), text_config={"model_type": "llama"}, image_token_id=IMAGE
    ).to_dict()
    with pytest.raises(vtprune.UnsupportedModelError, match=message):
        vtprune.geometry(LlavaConfig(**{**base, **change}))


def run(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], message: str) -> None:
    """The call fails with this message before the decoder runs, and the next good call works."""
    with vtprune.prune(model, "uniform", 5) as session:
        with pytest.raises(vtprune.InputError, match=message):
            model(**inputs)
        assert not model.ran
        model(**batch(Row()))
        assert session.report.visual_tokens == (TOKENS,)


def test_image_tokens_without_an_image(model: LlavaForConditionalGeneration) -> None:
    inputs = batch(Row())
    inputs.pop("pixel_values")
    run(model, inputs, "has 16 image tokens but the call carries no image")


def test_image_without_image_tokens(model: LlavaForConditionalGeneration) -> None:
    inputs = batch(Row(0))
    run(
        model, {**inputs, "pixel_values": Row(1).pixels()}, r"have 0 image tokens in all \(\[0\] a sample\) but 1 image"
    )


def test_image_token_count_mismatch(model: LlavaForConditionalGeneration) -> None:
    inputs = batch(Row(2))
    run(model, {**inputs, "pixel_values": Row(1).pixels()}, r"32 image tokens in all .* 1 image\(s\) give 16.*needs 16")


def test_image_split_between_prompts(model: LlavaForConditionalGeneration) -> None:
    inputs = batch(Row(1), Row(1, seed=1))
    ids = inputs["input_ids"]
    first = (ids[0] == IMAGE).nonzero()[0, 0]
    ids[0, first] = 5
    ids[1, -1] = IMAGE
    run(model, inputs, r"sample 0 has 15 image tokens, which do not make whole .*next image has 16")


def test_empty_batch(model: LlavaForConditionalGeneration) -> None:
    run(
        model,
        {"input_ids": torch.zeros(0, 12, dtype=torch.long)},
        r"at least one sample, got an input of shape \(0, 12\)",
    )


def test_keep_larger_than_the_image(model: LlavaForConditionalGeneration) -> None:
    with pytest.raises(vtprune.BudgetError, match=r"keep must be in \[1, 16\], got 17 \(16 visual tokens"):
        vtprune.prune(model, "uniform", 17)
    plan = vtprune.Plan((vtprune.Stage(vtprune.Site("input"), vtprune.Uniform(), 20),))
    with vtprune.prune(model, plan), pytest.raises(vtprune.PlanError, match=r"keep must be in \[1, 16\], got 20"):
        model(**batch(Row()))
    assert not model.ran
    with vtprune.prune(model, plan) as session:
        model(**batch(Row(2)))  # 32 tokens: legal there
        assert session.report.average_tokens == (20.0,)


def test_masks_with_more_axes(model: LlavaForConditionalGeneration) -> None:
    inputs = batch(Row())
    n = inputs["input_ids"].shape[1]
    run(model, {**inputs, "attention_mask": torch.ones(1, 1, n, n)}, rf"must be 2-D .* got shape \(1, 1, {n}, {n}\)")


def test_another_feature_layer_at_call_time(model: LlavaForConditionalGeneration) -> None:
    run(model, {**batch(Row()), "vision_feature_layer": -3}, "vision_feature_layer=-3 differs from the config's -2")


def test_text_only_call_runs_unchanged_and_the_report_says_so(model: LlavaForConditionalGeneration) -> None:
    inputs = batch(Row(0))
    base = model(**inputs).logits
    with vtprune.prune(model, "fastv", 0.4) as session:
        assert torch.equal(model(**inputs).logits, base)
        assert "no visual tokens in the last call (8 text tokens in 1 sample(s))" in session.report.summary()
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(ids, model.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_gradient_checkpointing_is_refused(model: LlavaForConditionalGeneration) -> None:
    # the name changed within the supported transformers releases
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.train()
    run_training = pytest.raises(vtprune.InputError, match="activation_checkpointing_disable")
    with vtprune.prune(model, "uniform", 5), run_training:
        model(**batch(Row()))
    assert not model.ran


def test_nested_sessions_and_reports_too_early(model: LlavaForConditionalGeneration) -> None:
    other = llava()
    with vtprune.prune(model, "uniform", 5) as session:
        with pytest.raises(
            SessionError, match=r"already pruned by Session\(LlavaForConditionalGeneration: uniform at input"
        ):
            vtprune.prune(model, "fastv", 0.4)
        with pytest.raises(SessionError, match="already pruned"):
            vtprune.prune(model.model, "fastv", 0.4)
        with pytest.raises(SessionError, match="no report yet"):
            _ = session.report
        with vtprune.prune(other, "random", 3) as second:
            model(**batch(Row()))
            other(**batch(Row()))
            assert (session.report.average_tokens, second.report.average_tokens) == ((5.0,), (3.0,))
    vtprune.prune(model, "fastv", 0.4).remove()


def test_another_batch_size_over_a_pruned_cache(model: LlavaForConditionalGeneration) -> None:
    with vtprune.prune(model, "uniform", 5):
        cache = model(**batch(Row())).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(vtprune.InputError, match=r"conversation of 1 row\(s\), but the call has 2"):
            model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)


def test_unknown_per_token_argument_names_itself(model: LlavaForConditionalGeneration) -> None:
    inputs = batch(Row())
    extra = torch.zeros(1, inputs["input_ids"].shape[1])
    with (
        vtprune.prune(model, "uniform", 5),
        pytest.raises(HostContractError, match="was passed 'token_colour' of shape"),
    ):
        model(**inputs, token_colour=extra)


@pytest.mark.parametrize(
    ("site", "scorer", "message"),
    [
        (vtprune.Site("layer", 4), vtprune.Uniform(), r"layer\[4\] is outside the decoder, which has layers 0 to 3"),
        (vtprune.Site("vision", 6), vtprune.Uniform(), r"vision\[6\] is too late.*last cut is vision\[5\]"),
        (vtprune.Site("input"), vtprune.FastV(), "fastv reads attention, which does not exist yet at 'input'"),
        (vtprune.Site("layer", 2), vtprune.FlowCut(), r"flowcut reads the 'cls' query .* cannot cut at layer\[2\]"),
        (
            vtprune.Site("vision", 1),
            vtprune.FastV(),
            r"fastv reads the prompt; it cannot cut at vision\[1\]",
        ),
    ],
)
def test_plans_that_cannot_run(
    model: LlavaForConditionalGeneration, site: vtprune.Site, scorer: Scorer, message: str
) -> None:
    with pytest.raises(vtprune.PlanError, match=message):
        vtprune.prune(model, vtprune.Plan((vtprune.Stage(site, scorer, 0.5),)))
    assert not model.model._forward_pre_hooks


def test_a_scorer_that_keeps_the_wrong_number_is_caught(model: LlavaForConditionalGeneration) -> None:
    class Greedy(vtprune.Uniform):
        def select(self, view: TokenView) -> Tensor:
            return view.valid

    plan = vtprune.Plan((vtprune.Stage(vtprune.Site("input"), Greedy(), 5),))
    with (
        vtprune.prune(model, plan),
        pytest.raises(vtprune.PlanError, match=r"kept \[16\] tokens .* but \[5\] were asked"),
    ):
        model(**batch(Row()))


def test_plan_takes_no_budget_beside_it(model: LlavaForConditionalGeneration) -> None:
    plan = vtprune.Plan((vtprune.Stage(vtprune.Site("input"), vtprune.Uniform(), 5),))
    with pytest.raises(vtprune.BudgetError, match="leave out keep=5"):
        vtprune.prune(model, plan, 5)


@pytest.mark.parametrize("method", ["fastv", "flowcut"])
def test_an_attached_session_does_not_keep_the_model_alive(method: str) -> None:
    pruned = llava()
    alive = weakref.ref(pruned.model.language_model)
    session = vtprune.prune(pruned, method, 0.4)
    pruned(**batch(Row()))
    del pruned, session
    gc.collect()
    assert alive() is None
