"""GemFilter's second pass on any tokens, text too, as its authors have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from family_checks import batch_equals_each_alone
from family_models import CASES, LAYERS, Case, Row
from oracle import hidden_keys, masked
from torch import Tensor

import vtprune
from vtprune.hooks.probe import attach_probe
from vtprune.scorers.gemfilter import GemFilter, filter_scores

GREEDY = {"max_new_tokens": 12, "do_sample": False}
EXACT = {"atol": 1e-5, "rtol": 1e-5}
CHAIN = [GemFilter(layer=1, tokens="any"), vtprune.TransPrune(layers=(1, 2, 3))]


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def ragged(case: Case) -> tuple[Row, ...]:
    """Another size in every prompt, two images in one, none in another; more text than a question needs."""
    first, second, third = case.sizes
    return (
        Row((("image", first),), 9, 8, 0),
        Row((("image", second), ("image", third)), 4, 7, 1),
        Row((), 2, 9, 2),
        Row((("image", third),), 6, 12, 3),
    )


def gone(case: Case, report: vtprune.Report, inputs: dict[str, Any]) -> list[Tensor]:
    ids = inputs["input_ids"]
    return hidden_keys(report, ids, LAYERS, case.visual(ids), inputs["attention_mask"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_equals_masked_oracle(case: Case, attention: str) -> None:
    model, inputs = case.model(attention), case.batch(*ragged(case))
    with vtprune.prune(model, CHAIN, [0.6, 0.45]) as session:
        logits, out, report = model(**inputs).logits, model.generate(**inputs, **GREEDY), session.report
    text, left = report.text_tokens, report.text_kept
    assert all(a >= b for a, b in zip(text, left, strict=True))
    assert left[2] == text[2], "nothing can leave a prompt without an image"
    assert sum(left) < sum(text)
    hidden = gone(case, report, inputs)
    with masked(model, hidden):
        want, ref = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], **EXACT)
    assert torch.equal(out, ref)
    visual = case.visual(inputs["input_ids"])
    with masked(model, [h & visual for h in hidden]):
        off = (model(**inputs).logits[seen] - logits[seen]).abs().max()
    assert off > 1e-3, "the oracle must notice when text that left is shown"


@torch.no_grad()
def test_knows_no_batch_mates(case: Case) -> None:
    batch_equals_each_alone(case, case.model(), ragged(case), CHAIN, [0.6, 0.45])


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
@torch.no_grad()
def test_the_best_tokens_of_the_prompt_stay(name: str) -> None:
    """By hand, from queries and keys of the unpruned model: as many as all text and `keep` visual tokens."""
    case = CASES[name]
    model, plain, inputs = case.model(), case.model(), case.batch(ragged(case)[0], ragged(case)[3])
    with vtprune.prune(model, GemFilter(layer=2, tokens="any"), 5, basis="final") as session:
        out = model(**inputs)
        report = session.report
    seen: list[tuple[Tensor, Tensor]] = []
    undo = attach_probe(plain.model.language_model.layers[2].self_attn, lambda q, k, *rest: seen.append((q, k)))
    plain(**inputs)
    undo()
    (record,) = report.kept
    assert record.text is not None
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    for b, visual in enumerate(case.visual(ids)):
        inside = real[b].nonzero()[:, 0]
        key, query = seen[0][1][b : b + 1, :, inside], seen[0][0][b : b + 1, :, -1:]
        if name == "gemma3":
            # the layer slides: keys outside the window of the last token are not seen
            near = inside > inside[-1] - 12
            key = key * near[None, None, :, None]
        score = filter_scores(query, key)[0]
        score[-1] = float("inf")
        places = int((~visual & real[b]).sum()) + 5
        best = inside[score.argsort(descending=True, stable=True)[:places]].sort().values
        found = torch.cat(
            [visual.nonzero()[:, 0][record.indices[b]], (~visual & real[b]).nonzero()[:, 0][record.text[b]]]
        )
        assert found.sort().values.tolist() == best.tolist()
        assert report.text_kept[b] == len(record.text[b]) < report.text_tokens[b]
        assert report.tokens_per_layer[b] == (places - report.text_kept[b],) * LAYERS
    # the cost is that of a second pass with all text and 5 visual tokens
    held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert max(held) == max(report.text_tokens) + 5
    assert len(set(held)) == 1 or name == "gemma3"  # whose sliding layers hold a window
    with vtprune.prune(model, GemFilter(layer=2), 5, basis="final") as session:
        model(**inputs)
    assert session.report.flops == report.flops
    assert session.report.text_kept == session.report.text_tokens == report.text_tokens
    assert report.to_dict()["text_kept"] == list(report.text_kept)
    assert report.to_dict()["kept"][0]["text"] == [t.tolist() for t in record.text]
    assert f"{report.text_kept[1]} of {report.text_tokens[1]} text tokens" in report.summary()
    assert "text tokens" not in session.report.summary()


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
@torch.no_grad()
def test_beams_equal_masked_oracle(name: str) -> None:
    case = CASES[name]
    rows = ragged(case)
    # before 5.19 the host mixes up the beams of a prompt with two images
    model, inputs = case.model(), case.batch(*(rows if case.beams_keep_order else (rows[0], *rows[2:])))
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "do_sample": False}
    with vtprune.prune(model, CHAIN[0], 0.5) as session:
        out, report = model.generate(**inputs, **beams), session.report
    wide = {name: inputs[name].repeat_interleave(3, 0) for name in ("input_ids", "attention_mask")}
    with masked(model, gone(case, report, wide)):
        assert torch.equal(out, model.generate(**inputs, **beams))


@torch.no_grad()
def test_a_later_turn_equals_masked_oracle() -> None:
    """Only the turn with the image loses text; what an earlier turn left in the cache is not asked again."""
    case = CASES["llava"]
    model, first = case.model(), case.batch(ragged(case)[0])
    words = torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(5))
    picture = case.batch(Row((("image", None),), 2, 3, 20))

    def converse(session: Any = None) -> tuple[Tensor, list[tuple[Any, int]]]:
        cache, ids, reports = transformers.DynamicCache(config=model.config.text_config), None, []
        for turn in ({**first}, {"input_ids": words}, {**picture}):
            start = 0 if ids is None else ids.shape[1]
            ids = turn["input_ids"] if ids is None else torch.cat([ids, turn["input_ids"]], 1)
            given = {**turn, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            ids = model.generate(**given, past_key_values=cache, max_new_tokens=4, do_sample=False)
            if session is not None and "pixel_values" in turn:
                # a call starts at the last token of the turn before, which had not been run yet
                reports.append((session.report, max(0, start - 1)))
        return ids, reports

    with vtprune.prune(model, CHAIN[0], 0.5) as session:
        out, reports = converse(session)
    assert len(reports) == 2
    hidden = [torch.zeros_like(out, dtype=torch.bool) for _ in range(LAYERS)]
    for report, start in reports:
        assert report.text_kept[0] < report.text_tokens[0]
        stop = start + report.visual_tokens[0] + report.text_tokens[0]
        here = out[:, start:stop]
        for layer, h in enumerate(hidden_keys(report, here, LAYERS, case.visual(here))):
            hidden[layer][:, start:stop] |= h
    with masked(model, hidden):
        assert torch.equal(out, converse()[0])


@torch.no_grad()
def test_compact_positions_equal_a_prompt_that_never_held_the_tokens() -> None:
    case = CASES["llava"]
    model, inputs = case.model(), case.batch(ragged(case)[0])
    with vtprune.prune(model, GemFilter(layer=2, tokens="any", positions="compact"), 6, basis="final") as session:
        got, report = model.generate(**inputs, **GREEDY), session.report
    hidden = gone(case, report, inputs)[0][0]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[case.visual(inputs["input_ids"])] = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    want = model.generate(inputs_embeds=embeds[:, ~hidden], **GREEDY)
    assert torch.equal(got[0, -12:], want[0, -12:])


@torch.no_grad()
def test_all_visual_tokens_may_leave() -> None:
    """Text that wins everywhere: visual keys that point away from the query. Later stages have nothing to cut."""
    case = CASES["llava"]
    model, inputs = case.model(), case.batch(ragged(case)[0], ragged(case)[3])
    visual = case.visual(inputs["input_ids"])

    class Text(GemFilter):
        def score_rows(self, view: Any) -> Tensor:
            scores = torch.ones(len(view.key), view.key.shape[2])
            return scores.scatter(1, view.column, 0.0)

    with vtprune.prune(model, [Text(layer=1, tokens="any", pool=1), "fastv"], [3, 2], basis="final") as session:
        logits, out, report = model(**inputs).logits, model.generate(**inputs, **GREEDY), session.report
    # text fills its own places; the first three visual tokens fill the others
    assert report.text_kept == report.text_tokens
    assert [len(i) for i in report.kept[0].indices] == [3, 3]

    class Crowded(Text):
        def score_rows(self, view: Any) -> Tensor:
            return -super().score_rows(view)

    with vtprune.prune(model, [Crowded(layer=1, tokens="any", pool=1)], [3], basis="final") as session:
        model(**inputs)
        crowded = session.report
    # visual tokens fill all places but the last token's
    for b, total in enumerate(crowded.visual_tokens):
        places = crowded.text_tokens[b] + 3
        assert crowded.text_kept[b] == max(1, places - total)
        assert len(crowded.kept[0].indices[b]) == min(total, places - 1)
    hidden = gone(case, report, inputs)
    with masked(model, hidden):
        seen = inputs["attention_mask"].bool() & ~hidden[-1]
        torch.testing.assert_close(logits[seen], model(**inputs).logits[seen], **EXACT)
        assert torch.equal(out, model.generate(**inputs, **GREEDY))
    assert int(visual.sum()) == sum(report.visual_tokens)


def test_keep_all_runs_the_model_as_it_is() -> None:
    case = CASES["llava"]
    model, inputs = case.model(), case.batch(*ragged(case))
    with torch.no_grad():
        base = model(**inputs).logits
        with vtprune.prune(model, GemFilter(tokens="any"), 1.0) as session:
            assert torch.equal(model(**inputs).logits, base)
    assert session.report.text_kept == session.report.text_tokens
    assert session.report.kept == ()


def test_bad_tokens_knob_and_plans_on_disk() -> None:
    with pytest.raises(vtprune.PlanError, match="tokens must be 'visual' or 'any', got 'text'"):
        GemFilter(tokens="text")  # type: ignore[arg-type]
    plan = GemFilter(tokens="any", layer=1).plan(vtprune.geometry(CASES["llava"].model()), vtprune.Budget(0.5))
    assert vtprune.Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("method", ["uniform", "gemfilter"])
def test_a_prompt_that_ends_with_an_image_is_refused(method: str) -> None:
    case = CASES["llava"]
    model, inputs = case.model(), case.batch(ragged(case)[0], Row((("image", None),), 6, 2, 3))
    stop = int(case.visual(inputs["input_ids"])[1].nonzero()[-1]) + 1
    inputs |= {name: inputs[name][:, :stop] for name in ("input_ids", "attention_mask")}
    with vtprune.prune(model, method, 0.6), pytest.raises(vtprune.InputError, match="sample 1 ends with a visual"):
        model(**inputs)
    padded = {name: torch.nn.functional.pad(inputs[name], (0, 2)) for name in ("input_ids", "attention_mask")}
    with vtprune.prune(model, method, 0.6), pytest.raises(vtprune.InputError, match="sample 1 ends with a visual"):
        model(**{**inputs, **padded})
    with vtprune.prune(model, method, 1.0), torch.no_grad():
        model(**inputs)
