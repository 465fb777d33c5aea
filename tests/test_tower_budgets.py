"""What towers keep and what it costs: budgets, FLOPs, precisions, refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from family_models import CASES, IMAGE, Case, Row
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tower_cases import NAMES, one_picture_each, pictures, ragged

import vtprune

EXACT = {"atol": 1e-5, "rtol": 1e-5}
TOWER = vtprune.FlowCut(text_cut=False)


def _cpu_sdpa(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# the counter knows the CUDA attention operators; this is the CPU one
CPU_SDPA = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_sdpa}


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("text_cut", [False, True])
@pytest.mark.parametrize("keep", [9, 0.3, 0.8])
@torch.no_grad()
def test_every_picture_keeps_what_the_budget_says(case: Case, keep: Any, text_cut: bool) -> None:
    rows = ragged(case) if isinstance(keep, float) else one_picture_each(case)
    model, inputs = case.model(), case.batch(*rows)
    with vtprune.prune(model, vtprune.FlowCut(text_cut=text_cut), keep) as session:
        model(**inputs)
        report = session.report
    for total, average, number in zip(report.visual_tokens, report.average_tokens, map(pictures, rows), strict=True):
        wanted = keep * total if isinstance(keep, float) else min(keep, total)
        # a count is solved in steps of one token of the text cut, and two of the tower: 5/4 on average
        assert abs(average - wanted) <= (0.625 if text_cut and isinstance(keep, int) else 0.5 * number)
    for sample in range(len(rows)):
        stages = [record.indices[sample].tolist() for record in report.kept]
        assert all(stage == sorted(set(stage)) for stage in stages)
        for before, after in itertools.pairwise(stages):
            assert set(after) <= set(before)


@torch.no_grad()
def test_keeping_every_token_by_count_is_bit_identical(case: Case) -> None:
    model, inputs = case.model(), case.batch(one_picture_each(case)[1])
    base = model(**inputs)
    with vtprune.prune(model, "flowcut", int(case.visual(inputs["input_ids"]).sum())) as session:
        out = model(**inputs)
        report = session.report
    assert torch.equal(base.logits, out.logits)
    assert report.vision_flops == report.vision_flops_full > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["flowcut", "uniform"])
@torch.no_grad()
def test_tower_flops_agree_with_the_counter(case: Case, method: str, attention: str) -> None:
    media = tuple(("video", size) for size in case.videos[:1] if case.mixes and case.name != "llava_onevision")
    rows = (*ragged(case), Row(media, 2, 3, 5))
    model, inputs = case.model(attention), case.batch(*rows)

    def counted() -> int:
        with FlopCounterMode(display=False, custom_mapping=CPU_SDPA) as counter:
            model(**inputs)
        counts = {name.partition(".")[2]: sum(by.values()) for name, by in counter.get_flop_counts().items()}
        return counts["model"] - counts.get("model.language_model", counts.get("model.text_model", 0))

    full = counted()
    with vtprune.prune(model, method, 0.4) as session:
        part, report = counted(), session.report
    # Pixtral embeds pixels that are padded to the largest image: much in models as tiny as these, and not counted
    near = 0.02 if case.name == "mistral3" else 0.01
    assert report.vision_flops_full == pytest.approx(full, rel=near)
    assert report.vision_flops == pytest.approx(part, rel=near)
    assert (part < full) == (method == "flowcut")


@torch.no_grad()
def test_a_count_that_an_image_does_not_hold_is_refused() -> None:
    case = CASES["internvl"]
    model, inputs = case.model(), case.batch(one_picture_each(case)[0])
    with (
        vtprune.prune(model, TOWER, 40),
        pytest.raises(vtprune.BudgetError, match=r"in \[1, 16\], got 40"),
    ):
        model.generate(**inputs, max_new_tokens=1)
    tiles = case.batch(Row((("image", 3),)))
    with vtprune.prune(model, TOWER, 9), pytest.raises(vtprune.InputError, match=r"3 images .*tiles and crops"):
        model(**tiles)


@torch.no_grad()
def test_newlines_stay_whatever_the_tower_drops() -> None:
    case = CASES["llava_next"]
    model, inputs = case.model(), case.batch(*one_picture_each(case)[:1])
    with (
        vtprune.prune(model, TOWER, 5),
        pytest.raises(vtprune.BudgetError, match=r"its 8 newline or CLS tokens .* stay"),
    ):
        model(**inputs)
    with vtprune.prune(model, TOWER, 9) as session:
        model(**inputs)
    newlines = {16 + 9 * row + 8 for row in range(8)}
    assert newlines < set(session.report.kept[-1].indices[0].tolist())


@torch.no_grad()
def test_mixtures_of_patches_are_refused() -> None:
    case = CASES["llava_onevision"]
    model = case.model()
    large = case.batch(Row((("image", (64, 64)),)))
    film = case.batch(Row((("video", 3),)))
    with vtprune.prune(model, TOWER, 0.5) as session:
        with pytest.raises(vtprune.InputError, match=r"interpolates the 8 x 8 patches of an image of 64 x 64.*smaller"):
            model.generate(**large, max_new_tokens=1)
        with pytest.raises(vtprune.InputError, match=r"pools the frames of a video by interpolation.*at 'input'"):
            model(**film)
        # a refusal leaves nothing behind
        fine = case.batch(*ragged(case))
        model(**fine)
        assert session.report.vision_flops < session.report.vision_flops_full


@torch.no_grad()
def test_crops_that_a_mask_hides_in_part_are_refused() -> None:
    case = CASES["idefics3"]
    model, inputs = case.model(), case.batch(*one_picture_each(case)[:1])
    shown = torch.ones(inputs["pixel_values"].shape[:2] + inputs["pixel_values"].shape[3:], dtype=torch.long)
    with vtprune.prune(model, TOWER, 0.5) as session:
        model(**inputs, pixel_attention_mask=shown)
        assert session.report.vision_flops < session.report.vision_flops_full
        shown[:, 0, :16] = 0
        with pytest.raises(vtprune.InputError, match=r"hides part of a crop .* at 'input' or later"):
            model(**inputs, pixel_attention_mask=shown)


@torch.no_grad()
def test_a_crop_of_nothing_but_padding() -> None:
    """A square image on a strip of three crops fills the middle one; the others hold no token."""
    case = CASES["llava_next"]
    model = case.model()
    model.config.image_grid_pinpoints = model.model.config.image_grid_pinpoints = [[32, 96]]
    sizes, pixels = torch.tensor([[32, 32]]), torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    number = len(model.get_image_features(pixels, sizes).pooler_output[0])
    ids = torch.tensor([[5, 6, *[IMAGE] * number, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_sizes": sizes}
    with vtprune.prune(model, TOWER, 0.5) as session:
        logits = model(**inputs).logits
        kept = session.report.kept[-1].indices[0]
    assert number == 16 + 4 * 5
    assert len(kept) == number // 2
    assert torch.isfinite(logits).all()
    # the same crops without the empty ones
    model.config.image_grid_pinpoints = model.model.config.image_grid_pinpoints = [[32, 32]]
    with vtprune.prune(model, TOWER, 0.5) as session:
        alone = model(**(inputs | {"pixel_values": pixels[:, [0, 2]]})).logits
    assert torch.equal(kept, session.report.kept[-1].indices[0])
    torch.testing.assert_close(logits, alone, **EXACT)


@torch.no_grad()
def test_budgets_are_solved_for_each_image() -> None:
    """The example of Qwen2-VL has 256 tokens; a count beyond it, and a share of FLOPs, fit the image that comes."""
    case = CASES["qwen2_vl"]
    model, inputs = case.model(), case.batch(Row((("image", (1, 36, 36)),)), Row((("image", (1, 40, 40)),), 2, 5, 1))
    with vtprune.prune(model, TOWER, 300) as session:
        model.generate(**inputs, max_new_tokens=1)
        assert session.report.visual_tokens == (324, 400)
        assert session.report.average_tokens == (300.0, 300.0)
    lone = case.batch(Row((("image", (1, 40, 40)),), 32, 32, 1))
    with vtprune.prune(model, TOWER, flops=0.3) as session:
        model(**lone)
        report = session.report
    assert report.flops / report.flops_full == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_keeps_the_same_number(case: Case, dtype: torch.dtype) -> None:
    model, inputs = case.model().to(dtype), case.batch(*ragged(case))
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with vtprune.prune(model, TOWER, 0.4) as session:
        logits = model(**inputs).logits
        report = session.report
    assert torch.isfinite(logits[inputs["attention_mask"].bool()]).all()
    for total, kept, row in zip(report.visual_tokens, report.kept[-1].indices, ragged(case), strict=True):
        assert abs(len(kept) - 0.4 * total) <= 0.5 * pictures(row)
