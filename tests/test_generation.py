"""The ways of `generate` and `forward`: images of one size, crops, M-RoPE, windows with two-way blocks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from family_models import CASES, LAYERS, VOCAB, Case, Row
from oracle import hidden_keys, masked
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import vtprune
from vtprune.scorers.transprune import TransPrune

NAMES = ["llava", "llava_next", "qwen2_vl", "gemma3"]
METHODS = ["uniform", "fastv"]
EXACT = {"atol": 1e-5, "rtol": 1e-5}
GREEDY = {"do_sample": False}
LATE = vtprune.Plan((vtprune.Stage(vtprune.Site("layer", 2), vtprune.Uniform(), 0.3),))


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def single(case: Case, tail: tuple[int, ...] = ()) -> dict[str, Any]:
    """A prompt with one image; `tail` follows its text."""
    inputs = case.batch(Row((("image", case.sizes[0]),)))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tail], dtype=torch.long)], 1)
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"]), **case.extra(inputs["input_ids"])}


def pair(case: Case) -> dict[str, Any]:
    """Two prompts with images of different sizes, padded."""
    return case.batch(Row((("image", case.sizes[0]),)), Row((("image", case.sizes[1]),), 1, 3, 1))


def hidden_of(case: Case, report: vtprune.Report, ids: Tensor) -> list[Tensor]:
    return hidden_keys(report, ids, LAYERS, case.visual(ids))


@torch.no_grad()
def test_sampled_sequences_are_those_of_the_oracle(case: Case) -> None:
    model, inputs = case.model(), pair(case)
    sampling = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8, "top_k": 0}
    with vtprune.prune(model, "fastv", 0.5) as session:
        torch.manual_seed(3)
        out, report = model.generate(**inputs, **sampling), session.report
    with masked(model, hidden_of(case, report, inputs["input_ids"].repeat_interleave(3, 0))):
        torch.manual_seed(3)
        want = model.generate(**inputs, **sampling)
    assert torch.equal(out, want)
    assert len({tuple(row.tolist()) for row in out}) == 6


def later_calls(model: Any, prompt: int) -> list[int]:
    """Fills up with the lengths of the decoder's calls after the prompt; over 1 where drafts were tried."""
    lengths: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["inputs_embeds"].shape[1] < prompt // 2:
            lengths.append(kwargs["inputs_embeds"].shape[1])

    model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    return lengths


@pytest.mark.parametrize("method", ["divprune", LATE], ids=["input", "layer"])
@torch.no_grad()
def test_prompt_lookup_decoding_gives_the_greedy_answer(case: Case, method: Any) -> None:
    """A prompt in which look-up finds candidates, some of which the model rejects."""
    model, inputs = case.model(), single(case, (7, 8, 9, 7, 8, 9, 7, 8))
    lengths = later_calls(model, inputs["input_ids"].shape[1])
    with vtprune.prune(model, method, None if method is LATE else 0.5):
        greedy = model.generate(**inputs, max_new_tokens=20, **GREEDY)
        assert set(lengths) == {1}
        looked_up = model.generate(**inputs, max_new_tokens=20, **GREEDY, prompt_lookup_num_tokens=3)
    assert max(lengths) > 1, "no candidates were tried, so the test shows nothing"
    assert torch.equal(looked_up, greedy)


@torch.no_grad()
def test_an_assistant_gives_the_greedy_answer(case: Case) -> None:
    """The unpruned model drafts for the pruned one; a pruned assistant is refused."""
    if not case.turns:
        pytest.skip("this transformers fails on it by itself")
    model, whole = case.model(), case.model()
    # a prompt to which the two do not answer alike
    inputs = case.batch(Row((("image", case.sizes[0]),), seed=3 if case.name == "gemma3" else 0))
    want_whole = whole.generate(**inputs, max_new_tokens=12, **GREEDY)
    lengths = later_calls(model, inputs["input_ids"].shape[1])
    tokens = int(case.visual(inputs["input_ids"]).sum())
    with vtprune.prune(model, "uniform", 0.5):
        want = model.generate(**inputs, max_new_tokens=12, **GREEDY)
        got = model.generate(**inputs, max_new_tokens=12, **GREEDY, assistant_model=whole)
        assert max(lengths) > 1
        # the host keeps images from an assistant, so that a pruned one has nothing to prune
        with pytest.raises(vtprune.InputError, match=f"{tokens} image tokens but the call carries no image"):
            whole.generate(**inputs, max_new_tokens=12, **GREEDY, assistant_model=model)
    assert not torch.equal(want, want_whole), "every draft would be accepted, so the test shows nothing"
    assert torch.equal(got, want)


_BY_TRANSITIONS = TransPrune(layers=(1,), ratios=(0.5,), signals="ttv")


@pytest.mark.parametrize(
    ("method", "name"), [("random", "random"), ("fastv", "fastv"), (_BY_TRANSITIONS, "transprune")]
)
def test_draft_tokens_behind_the_prompt_are_refused_by_methods_that_read_it(case: Case, method: Any, name: str) -> None:
    model, inputs = case.model(), single(case, (7, 8, 9, 7, 8, 9, 7, 8))
    with vtprune.prune(model, method, 0.75), pytest.raises(vtprune.InputError, match=f"logits_to_keep=4.*{name}"):
        model.generate(**inputs, max_new_tokens=20, **GREEDY, prompt_lookup_num_tokens=3)


class Collect(BaseStreamer):
    """Keeps what it is sent; VOCAB marks the end."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(VOCAB)


@torch.no_grad()
def test_streaming_sees_the_same_tokens(case: Case) -> None:
    model, inputs, streamer = case.model(), single(case), Collect()
    with vtprune.prune(model, "fastv", 0.5):
        want = model.generate(**inputs, max_new_tokens=6, **GREEDY)
        model.generate(**inputs, max_new_tokens=6, **GREEDY, streamer=streamer)
    assert streamer.tokens == [*want[0].tolist(), VOCAB]


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_embeddings_with_placeholders_take_the_same_way_as_ids(case: Case, method: str) -> None:
    model, inputs = case.model(), pair(case)
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    # M-RoPE is counted from ids, so a call without them brings its positions
    positions = {"position_ids": model.model.get_rope_index(ids, **inputs)[0]} if "image_grid_thw" in inputs else {}
    with vtprune.prune(model, method, 0.5) as session:
        want = model(input_ids=ids, **inputs, **positions)
        kept = session.report.kept
        got = model(inputs_embeds=embeds, **inputs, **positions)
        assert torch.equal(got.logits, want.logits)
        for mine, theirs in zip(session.report.kept, kept, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine.indices, theirs.indices, strict=True))
        if "inputs_embeds" not in inspect.signature(model.prepare_inputs_for_generation).parameters:
            return  # generate() of this host takes ids alone
        answer = model.generate(input_ids=ids, **inputs, **positions, max_new_tokens=6, **GREEDY)
        new = model.generate(inputs_embeds=embeds, **inputs, **positions, max_new_tokens=6, **GREEDY)
    assert torch.equal(new, answer[:, ids.shape[1] :])


@torch.no_grad()
def test_embeddings_that_hold_the_features_already_run_unpruned(case: Case) -> None:
    """Nobody can tell features from text there; the report says that nothing was pruned."""
    model, inputs = case.model(), single(case)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[case.visual(inputs["input_ids"])] = 0.1
    want = model(inputs_embeds=embeds).logits
    with vtprune.prune(model, "fastv", 0.5) as session:
        assert torch.equal(model(inputs_embeds=embeds).logits, want)
        assert "no visual tokens in the last call" in session.report.summary()


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_later_calls_without_positions_equal_the_oracle(case: Case, method: str) -> None:
    """A forward call leaves position_ids to the host, which asks the cache: a step, a text, and another image.

    M-RoPE models lay such an image out in a line; that is theirs, and pruning changes nothing about it.
    """
    if not case.turns:
        pytest.skip("this transformers fails on it by itself")
    model, inputs = case.model(), single(case)
    image = case.batch(Row((("image", case.sizes[1]),), 2, 3, 20))
    del image["attention_mask"]
    calls = [{"input_ids": torch.tensor([ids])} for ids in ([5], [6, 7, 8])] + [image]

    def run(reports: list[vtprune.Report], session: Any) -> list[Tensor]:
        cache, logits = None, []
        for call in (inputs, *calls):
            out = model(**call, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
            if session is not None and "pixel_values" in call:
                reports.append(session.report)
        return logits

    reports: list[vtprune.Report] = []
    with vtprune.prune(model, method, 0.5) as session:
        got = run(reports, session)
    parts = [hidden_of(case, r, i["input_ids"]) for r, i in zip(reports, (inputs, image), strict=True)]
    between = torch.zeros(1, 4, dtype=torch.bool)
    with masked(model, [torch.cat([first, between, second], 1) for first, second in zip(*parts, strict=True)]):
        want = run([], None)
    for mine, theirs in zip(got[1:3], want[1:3], strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    seen = ~parts[1][-1]
    torch.testing.assert_close(got[3][seen], want[3][seen], **EXACT)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_positions_of_another_length_are_refused(method: str) -> None:
    """M-RoPE models count positions of the whole conversation from a 2-D mask; cutting would pick the wrong ones."""
    case = CASES["qwen2_vl"]
    model, inputs = case.model(), single(case)
    length = inputs["input_ids"].shape[1]
    image = case.batch(Row((("image", case.sizes[1]),), 2, 3, 20))
    for call in ({"input_ids": torch.tensor([[5]])}, image):
        new = call["input_ids"].shape[1]
        with vtprune.prune(model, method, 0.5):
            cache = model(**inputs).past_key_values
            call["attention_mask"] = torch.ones(1, length + new, dtype=torch.long)
            message = rf"position_ids hold {length + new} positions for the {new} token\(s\)"
            with pytest.raises(vtprune.InputError, match=message):
                model(**call, past_key_values=cache)
