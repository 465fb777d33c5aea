"""Cuts in the vision tower against the masked tower, ragged images, features made before or outside the call."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from family_models import HOST_ENCODES_FIRST
from models import LAYERS, TOKENS, Row, batch, llava
from oracle import hidden_keys, masked, tower_features, tower_hidden

import vtprune

ROWS = (Row(1, 3, 5, 0), Row(0, 2, 9, 2), Row(1, 1, 4, 1), Row(1, 6, 2, 3))
BLOCKS = 7


def plan_of(*cuts: tuple[int, int]) -> vtprune.Plan:
    """Cuts by a rule that needs no attention, at chosen blocks."""
    return vtprune.Plan(tuple(vtprune.Stage(vtprune.Site("vision", k), vtprune.Uniform(), n) for k, n in cuts))


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("method", "keep"),
    [("flowcut", 5), ("flowcut", 0.5), (["flowcut", "fastv"], [0.6, 0.4]), (plan_of((0, 11), (4, 6)), None)],
    ids=["flowcut-5", "flowcut-50%", "flowcut+fastv", "two cuts"],
)
@torch.no_grad()
def test_tower_cut_equals_masked_tower(method: object, keep: object, attention: str, tower: str) -> None:
    model, inputs = llava(attention, tower), batch(*ROWS)
    greedy = {"max_new_tokens": 16, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    with vtprune.prune(model, method, keep) as session:
        logits, forward = model(**inputs).logits, session.report
        out, report = model.generate(**inputs, **greedy), session.report
    assert [str(k.site) for k in report.kept] == [str(k.site) for k in forward.kept]
    for a, b in zip(report.kept, forward.kept, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.indices, b.indices, strict=True))

    hidden = hidden_keys(report, inputs["input_ids"], LAYERS)
    gone = tower_hidden(report, BLOCKS)
    features = tower_features(model, inputs["pixel_values"], gone, has_cls=tower == "clip")
    with masked(model, hidden, features):
        want, ref = model(**inputs).logits, model.generate(**inputs, **greedy)
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], atol=1e-5, rtol=1e-5)
    assert torch.equal(out.sequences, ref.sequences)
    for got, expected in zip(out.scores, ref.scores, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    wrong = [[row.roll(1) for row in block] for block in gone]
    off = tower_features(model, inputs["pixel_values"], wrong, has_cls=tower == "clip")
    assert (off - features)[:, :].abs().max() > 1e-2, "the oracle must notice when other patches are hidden"


@torch.no_grad()
def test_flowcut_drops_another_number_from_each_image_on_the_way() -> None:
    """The adaptive schedule makes the tower's batch ragged; each image must still get what it gets alone."""
    model, inputs = llava(), batch(*[Row(1, 3, 5, s) for s in range(6)])
    scale = torch.tensor([0.05, 0.5, 1.0, 3.0, 6.0, 12.0])[:, None, None, None]
    inputs["pixel_values"] = inputs["pixel_values"] * scale
    with vtprune.prune(model, "flowcut", 3) as session:
        logits = model(**inputs).logits
        sites = {str(k.site): [len(i) for i in k.indices] for k in session.report.kept}
        assert list(sites) == ["vision[2]", "vision[4]"]
        assert len(set(sites["vision[2]"])) > 1, "no raggedness, so the test shows nothing"
        assert sites["vision[4]"] == [3] * 6
        kept = session.report.kept
        for b in range(6):
            one = {k: v[b : b + 1] for k, v in inputs.items()}
            alone = model(**one).logits
            torch.testing.assert_close(logits[b, -5:], alone[0, -5:], atol=1e-5, rtol=1e-5)
            for whole, single in zip(kept, session.report.kept, strict=True):
                assert torch.equal(whole.indices[b], single.indices[0])


@torch.no_grad()
@pytest.mark.skipif(not HOST_ENCODES_FIRST, reason="this transformers takes no encoded features")
def test_features_encoded_by_hand_take_the_same_way() -> None:
    model, inputs = llava(), batch(*ROWS)
    pixels = inputs.pop("pixel_values")
    with vtprune.prune(model, "flowcut", 5) as session:
        encoded = model.get_image_features(pixels)
        a = model(**inputs, mm_encoder_outputs={"image": encoded}).logits
        kept = session.report.kept
        b = model(**inputs, pixel_values=pixels).logits
        assert torch.equal(a, b)
        for x, y in zip(kept, session.report.kept, strict=True):
            assert all(torch.equal(i, j) for i, j in zip(x.indices, y.indices, strict=True))


@torch.no_grad()
def test_features_encoded_before_prune_are_refused() -> None:
    model, inputs = llava(), batch(Row())
    encoded = model.get_image_features(inputs.pop("pixel_values"))
    with (
        vtprune.prune(model, "flowcut", 5),
        pytest.raises(vtprune.InputError, match=r"hold \[16\] tokens a sample instead of \[5\]"),
    ):
        model(**inputs, mm_encoder_outputs={"image": encoded})


@torch.no_grad()
def test_fraction_gives_each_image_of_a_prompt_its_share() -> None:
    model, inputs = llava(), batch(Row(3, 2, 3, 0), Row(1, 2, 3, 1))
    with vtprune.prune(model, "flowcut", 0.25) as session:
        model.generate(**inputs, max_new_tokens=2)
        last = session.report.kept[-1]
    assert [len(i) for i in last.indices] == [12, 4]
    assert [int(((last.indices[0] // TOKENS) == i).sum()) for i in range(3)] == [4, 4, 4]


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_count_with_several_images_a_prompt_is_refused(call: str) -> None:
    model, inputs = llava(), batch(Row(3, 2, 3, 0), Row(1, 2, 3, 1))
    run = model if call == "forward" else partial(model.generate, max_new_tokens=2)
    with (
        vtprune.prune(model, "flowcut", 5),
        pytest.raises(vtprune.InputError, match=r"keep=5 .* 4 images .* 2 prompts"),
    ):
        run(**inputs)


def test_departure_marks_survive_half_precision() -> None:
    from vtprune.hooks.departures import read_departures

    for dtype in (torch.float16, torch.bfloat16):
        features = torch.randn(2, 40, 8).to(dtype)
        features[0, 3:] = 0
        features[0, 3:, 0] = torch.arange(1, 38).to(dtype)
        features[0, 3:, 1] = 1
        features[0, 3:, 2:4] = torch.stack([torch.arange(37), -torch.arange(37)], 1).to(dtype)
        left = read_departures(features, torch.ones(2, 40, dtype=torch.bool))
        assert left[0].tolist() == [[0] * 4] * 3 + [[i + 1, 1, i, -i] for i in range(37)]
        assert not left[1].any()


@torch.no_grad()
def test_gaps_of_the_tower_close_whether_or_not_a_batch_mate_loses_tokens_at_the_input() -> None:
    """Compact positions before the decoder, where only the prompt of two images loses another token: 10 to 9."""
    cut, close = vtprune.Site("vision", 2), vtprune.Site("input")
    stages = (
        vtprune.Stage(cut, vtprune.Random(), 0.3),
        vtprune.Stage(close, vtprune.Uniform(), 0.285, positions="compact"),
    )
    model, rows = llava(), (Row(1, 3, 5, 0), Row(2, 1, 4, 1))
    with vtprune.prune(model, vtprune.Plan(stages)) as session:
        together = model(**batch(*rows)).logits
        assert [tokens[0] for tokens in session.report.tokens_per_layer] == [5, 9]
        assert [len(kept) for kept in session.report.kept[0].indices] == [5, 10]
        for b, row in enumerate(rows):
            alone = model(**batch(row)).logits[0]
            torch.testing.assert_close(together[b, -len(alone) :], alone, atol=1e-5, rtol=1e-5)
