"""Cuts inside the vision towers of every family that opens one."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from family_models import CASES, HOST_ENCODES_FIRST, IMAGE, LAYERS, Case, Row
from oracle import hidden_keys, masked
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tower_oracle import gone, tower_masked, tower_of

import vtprune
from vtprune.contract import TokenView

NAMES = [name for name in sorted(CASES) if vtprune.geometry(CASES[name].config()).vision is not None]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def cuts(*wanted: tuple[int, float]) -> vtprune.Plan:
    """Cuts by a rule that reads no attention, at chosen blocks."""
    return vtprune.Plan(tuple(vtprune.Stage(vtprune.Site("vision", k), vtprune.Random(), n) for k, n in wanted))


@dataclass(frozen=True)
class Uneven(vtprune.Random):
    """Cuts another number of tokens from every picture, crop or frame, and none from every third."""

    name: ClassVar[str] = "uneven"

    def count(self, view: TokenView) -> Tensor:
        number, alive = torch.arange(len(view.keep)), view.valid.sum(1)
        return torch.where(number % 3 == 0, alive, (view.keep + number).minimum(alive))


UNEVEN = vtprune.Plan(
    (
        vtprune.Stage(vtprune.Site("vision", 0), Uneven(), 0.3, adaptive=True),
        vtprune.Stage(vtprune.Site("vision", 2), vtprune.Random(), 0.3),
    )
)
METHODS = [
    ("flowcut", 0.4),
    (["flowcut", "fastv"], [0.6, 0.4]),
    (cuts((0, 0.7), (2, 0.3)), None),
    (UNEVEN, None),
]
IDS = ["flowcut", "flowcut+fastv", "two cuts", "uneven"]


def _cpu_sdpa(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# the counter knows the CUDA attention operators; this is the CPU one
CPU_SDPA = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_sdpa}


def one_picture_each(case: Case) -> tuple[Row, ...]:
    """Prompts with a single unit of the host each, so that a count of tokens has a meaning."""
    sizes = [1, 1] if isinstance(case.sizes[0], int) else (case.tower_sizes or case.sizes)[:2]
    return tuple(Row((("image", size),), 3, 5, seed) for seed, size in enumerate(sizes))


def pictures(row: Row) -> int:
    """What the tower takes for an image of its own; it does not know which of them make a prompt."""
    return sum(size if isinstance(size, int) else 1 for _, size in row.media)


def ragged(case: Case) -> tuple[Row, ...]:
    """Another size in every prompt, two images in one, none in another."""
    first, second, third = case.tower_sizes or case.sizes
    return (
        Row((("image", first),), 3, 5, 0),
        Row((("image", second), ("image", third)), 1, 4, 1),
        Row((), 2, 9, 2),
        Row((("image", third),), 6, 2, 3),
    )


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def blocks_of(case: Case) -> tuple[int, int]:
    vision = vtprune.geometry(case.config()).vision
    assert vision is not None
    return vision.blocks, int(vision.has_cls)


def check_oracle(case: Case, rows: tuple[Row, ...], method: Any, keep: Any, attention: str = "sdpa") -> None:
    model, inputs = case.model(attention), case.batch(*rows)
    with vtprune.prune(model, method, keep) as session:
        logits, forward = model(**inputs).logits, session.report
        out, report = model.generate(**inputs, **GREEDY), session.report
    for a, b in zip(report.kept, forward.kept, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.indices, b.indices, strict=True))
    assert report.kept[0].site.kind == "vision"
    blocks, lead = blocks_of(case)
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, case.visual(inputs["input_ids"]))
    lost = gone(case, rows, report, blocks)
    with tower_masked(model, lost, lead), masked(model, hidden):
        want, ref = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], want[seen], **EXACT)
    assert torch.equal(out.sequences, ref.sequences)
    for got, wanted in zip(out.scores, ref.scores, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)

    with masked(model, hidden):
        off = (model(**inputs).logits[seen] - logits[seen]).abs().max()
    assert off > 1e-3, "the oracle must notice when nothing is hidden in the tower"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("method", "keep"), METHODS, ids=IDS)
@torch.no_grad()
def test_tower_cut_equals_masked_tower(case: Case, method: Any, keep: Any, attention: str) -> None:
    check_oracle(case, ragged(case), method, keep, attention)


@torch.no_grad()
def test_videos_equal_masked_tower(case: Case) -> None:
    if not case.videos:
        pytest.skip("no videos of their own kind")
    if case.name == "llava_onevision":
        pytest.skip("refused: see test_mixtures_of_patches_are_refused")
    rows = (
        Row((("video", case.videos[0]),), 3, 5, 0),
        Row((("image", ragged(case)[3].media[0][1]) if case.mixes else ("video", case.videos[1]),), 1, 3, 4),
    )
    check_oracle(case, rows, "flowcut", 0.4)


@torch.no_grad()
def test_batch_and_neighbours_change_nothing(case: Case) -> None:
    model, rows = case.model(), ragged(case)
    inputs = case.batch(*rows)
    width = inputs["input_ids"].shape[1]
    with vtprune.prune(model, "flowcut", 0.4) as session:
        together = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        kept = session.report.kept
        for b, row in enumerate(rows):
            alone = case.batch(row)
            ids = model.generate(**alone, max_new_tokens=6, do_sample=False)
            assert torch.equal(ids[0, alone["input_ids"].shape[1] :], together[b, width:])
            if row.media:
                for mine, all_rows in zip(session.report.kept, kept, strict=True):
                    assert torch.equal(mine.indices[0], all_rows.indices[b])


@torch.no_grad()
def test_neighbours_in_a_prompt_change_nothing(case: Case) -> None:
    if case.name == "llava_onevision":
        pytest.skip("the host cuts an image into crops if it is alone, and not if it is one of several")
    model, (first, second, _) = case.model(), case.tower_sizes or case.sizes
    pair = case.batch(Row((("image", first), ("image", second)), seed=1))
    # the same picture (seed 11), alone
    lone = case.batch(Row((("image", second),), seed=2)) | case.encode([("image", second, 11)], [1])[0]
    with vtprune.prune(model, "flowcut", 0.4) as session:
        model(**pair)
        both = session.report
        model(**lone)
        start = both.visual_tokens[0] - session.report.visual_tokens[0]
        for alone, beside in zip(session.report.kept, both.kept, strict=True):
            mine = beside.indices[0][beside.indices[0] >= start] - start
            assert torch.equal(mine, alone.indices[0])


@torch.no_grad()
def test_beams_equal_masked_tower(case: Case) -> None:
    rows = ragged(case)
    if not case.beams_keep_order:
        rows = (rows[0], rows[2], Row(rows[0].media, 6, 2, 3))
    model, inputs = case.model(), case.batch(*rows)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    with vtprune.prune(model, "flowcut", 0.4) as session:
        out, report = model.generate(**inputs, **beams), session.report
    # beams repeat every sample; the tower runs on each picture once where the host encodes first
    blocks, lead = blocks_of(case)
    single = dataclasses.replace(
        report, kept=tuple(dataclasses.replace(k, indices=k.indices[::3]) for k in report.kept)
    )
    lost = gone(case, rows, single, blocks)
    if not HOST_ENCODES_FIRST:
        lost = gone(case, tuple(row for row in rows for _ in range(3)), report, blocks)
    wide = inputs["input_ids"].repeat_interleave(3, 0)
    with tower_masked(model, lost, lead), masked(model, hidden_keys(report, wide, LAYERS, case.visual(wide))):
        assert torch.equal(out, model.generate(**inputs, **beams))


@pytest.mark.parametrize("keep", [9, 0.3, 0.8])
@torch.no_grad()
def test_every_picture_keeps_what_the_budget_says(case: Case, keep: Any) -> None:
    rows = ragged(case) if isinstance(keep, float) else one_picture_each(case)
    model, inputs = case.model(), case.batch(*rows)
    with vtprune.prune(model, "flowcut", keep) as session:
        model(**inputs)
        report = session.report
    for total, average, number in zip(report.visual_tokens, report.average_tokens, map(pictures, rows), strict=True):
        wanted = keep * total if isinstance(keep, float) else min(keep, total)
        assert abs(average - wanted) <= 0.5 * number
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


def test_gradients_equal_masked_tower(case: Case) -> None:
    rows = ragged(case)[:2]
    model, inputs = case.model(), case.batch(*rows)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    tower, modules = tower_of(model)
    last = next(p for n, p in modules[-1].named_parameters() if n.endswith("proj.weight"))
    weights = [next(tower.parameters()), last]

    def step() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach(), [w.grad.clone() for w in weights if w.grad is not None]

    with vtprune.prune(model, "flowcut", 0.4) as session:
        loss, got = step()
        report = session.report
    blocks, lead = blocks_of(case)
    hidden = hidden_keys(report, inputs["input_ids"], LAYERS, case.visual(inputs["input_ids"]))
    with tower_masked(model, gone(case, rows, report, blocks), lead), masked(model, hidden):
        want, reference = step()
    torch.testing.assert_close(loss, want, **EXACT)
    assert len(got) == len(reference) > 0
    for mine, theirs in zip(got, reference, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_remove_leaves_nothing_on_the_tower(case: Case) -> None:
    model, inputs = case.model(), case.batch(*ragged(case))
    base = model(**inputs).logits
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    configs = {name: id(m.config) for name, m in model.named_modules() if hasattr(m, "config")}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    with vtprune.prune(model, "flowcut", 0.4):
        assert not torch.equal(model(**inputs).logits, base)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert {name: id(m.config) for name, m in model.named_modules() if hasattr(m, "config")} == configs
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()} == hooks
    assert torch.equal(model(**inputs).logits, base)


@torch.no_grad()
def test_a_count_that_an_image_does_not_hold_is_refused() -> None:
    case = CASES["internvl"]
    model, inputs = case.model(), case.batch(one_picture_each(case)[0])
    with (
        vtprune.prune(model, "flowcut", 40),
        pytest.raises(vtprune.BudgetError, match=r"in \[1, 16\], got 40"),
    ):
        model.generate(**inputs, max_new_tokens=1)
    tiles = case.batch(Row((("image", 3),)))
    with vtprune.prune(model, "flowcut", 9), pytest.raises(vtprune.InputError, match=r"3 images .*tiles and crops"):
        model(**tiles)


@torch.no_grad()
def test_newlines_stay_whatever_the_tower_drops() -> None:
    case = CASES["llava_next"]
    model, inputs = case.model(), case.batch(*one_picture_each(case)[:1])
    with vtprune.prune(model, "flowcut", 5), pytest.raises(vtprune.BudgetError, match=r"its 8 newline tokens .* stay"):
        model(**inputs)
    with vtprune.prune(model, "flowcut", 9) as session:
        model(**inputs)
    newlines = {16 + 9 * row + 8 for row in range(8)}
    assert newlines < set(session.report.kept[-1].indices[0].tolist())


@torch.no_grad()
def test_mixtures_of_patches_are_refused() -> None:
    case = CASES["llava_onevision"]
    model = case.model()
    large = case.batch(Row((("image", (64, 64)),)))
    film = case.batch(Row((("video", 3),)))
    with vtprune.prune(model, "flowcut", 0.5) as session:
        with pytest.raises(vtprune.InputError, match=r"interpolates the 8 x 8 patches of an image of 64 x 64.*smaller"):
            model.generate(**large, max_new_tokens=1)
        with pytest.raises(vtprune.InputError, match=r"pools the frames of a video by interpolation.*at 'input'"):
            model(**film)
        # a refusal leaves nothing behind
        fine = case.batch(*ragged(case))
        model(**fine)
        assert session.report.vision_flops < session.report.vision_flops_full


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
    with vtprune.prune(model, "flowcut", 0.5) as session:
        logits = model(**inputs).logits
        kept = session.report.kept[-1].indices[0]
    assert number == 16 + 4 * 5
    assert len(kept) == number // 2
    assert torch.isfinite(logits).all()
    # the same crops without the empty ones
    model.config.image_grid_pinpoints = model.model.config.image_grid_pinpoints = [[32, 32]]
    with vtprune.prune(model, "flowcut", 0.5) as session:
        alone = model(**(inputs | {"pixel_values": pixels[:, [0, 2]]})).logits
    assert torch.equal(kept, session.report.kept[-1].indices[0])
    torch.testing.assert_close(logits, alone, **EXACT)


@torch.no_grad()
def test_budgets_are_solved_for_each_image() -> None:
    """The example of Qwen2-VL has 256 tokens; a count beyond it, and a share of FLOPs, fit the image that comes."""
    case = CASES["qwen2_vl"]
    model, inputs = case.model(), case.batch(Row((("image", (1, 36, 36)),)), Row((("image", (1, 40, 40)),), 2, 5, 1))
    with vtprune.prune(model, "flowcut", 300) as session:
        model.generate(**inputs, max_new_tokens=1)
        assert session.report.visual_tokens == (324, 400)
        assert session.report.average_tokens == (300.0, 300.0)
    lone = case.batch(Row((("image", (1, 40, 40)),), 32, 32, 1))
    with vtprune.prune(model, "flowcut", flops=0.3) as session:
        model(**lone)
        report = session.report
    assert report.flops / report.flops_full == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_keeps_the_same_number(case: Case, dtype: torch.dtype) -> None:
    model, inputs = case.model().to(dtype), case.batch(*ragged(case))
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with vtprune.prune(model, "flowcut", 0.4) as session:
        logits = model(**inputs).logits
        report = session.report
    assert torch.isfinite(logits[inputs["attention_mask"].bool()]).all()
    for total, kept, row in zip(report.visual_tokens, report.kept[-1].indices, ragged(case), strict=True):
        assert abs(len(kept) - 0.4 * total) <= 0.5 * pictures(row)


@pytest.mark.parametrize("name", ["internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "idefics3"])
@torch.no_grad()
def test_a_spatial_rule_keeps_in_the_tower_what_it_keeps_behind_it(name: str) -> None:
    """Uniform reads rows and columns alone: also windows and merged patches must not move a token."""
    case = CASES[name]
    model, inputs = case.model(), case.batch(*one_picture_each(case))
    kept = []
    for site in (vtprune.Site("vision", 1), vtprune.Site("input")):
        with vtprune.prune(model, vtprune.Plan((vtprune.Stage(site, vtprune.Uniform(), 0.4),))) as session:
            model(**inputs)
            kept.append(session.report.kept[0].indices)
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
