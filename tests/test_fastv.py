"""FastV against the softmax written out, and its plan against the published conversions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scorer_views import LLAVA, Sample, attention_view, seen

from vtprune.budget import Budget
from vtprune.cost import plan_cost
from vtprune.errors import BudgetError, PlanError
from vtprune.scorers.fastv import FastV

SAMPLES = (Sample(((3, 4),), seed=1), Sample(((2, 3),), seed=2, text=9))


def test_score_is_the_last_rows_softmax_over_all_keys() -> None:
    view = seen(FastV(), SAMPLES, (5, 2))
    signals = attention_view(SAMPLES, block=0)
    for b, sample in enumerate(SAMPLES):
        weights = []
        for head in range(4):
            key = signals.key[b, head // 2][signals.real[b]]  # type: ignore[index]
            exp = (key @ signals.query[b, head, 0] / 8**0.5).exp()
            weights.append(exp / exp.sum())
        mean = sum(weights)[: sample.total] / 4  # type: ignore[index]
        torch.testing.assert_close(FastV().score(view)[b, : sample.total], mean)
        kept = FastV().select(view)[b].nonzero()[:, 0]
        assert kept.tolist() == mean.topk((5, 2)[b]).indices.sort().values.tolist()
        assert mean.sum() < 1


@pytest.mark.parametrize(("layer", "counts"), [(None, (166, 98, 30)), (3, (152, 82, 11))])
def test_plan_meets_the_published_conversions(layer: int | None, counts: tuple[int, ...]) -> None:
    # LLaVA-1.5-7B, average of 192, 128 and 64 tokens; PEERS 2.1 quotes the counts rounded down, up to one off
    for keep, count in zip((192, 128, 64), counts, strict=True):
        (stage,) = FastV(layer=layer).plan(LLAVA, Budget(keep)).stages
        assert str(stage.site) == f"layer[{layer or 2}]"
        assert isinstance(stage.keep, int)
        assert abs(stage.keep - count) <= 1
        assert not stage.adaptive


def test_default_layer_scales_with_depth() -> None:
    for depth, layer in ((32, 2), (28, 2), (4, 1), (64, 4)):
        model = dataclasses.replace(LLAVA, layers=depth, entering=())
        assert FastV().plan(model, Budget(0.6)).stages[0].site.index == layer


def test_plan_below_the_floor_says_the_floor_and_the_knob() -> None:
    # (3 * 576 + 29) / 32
    with pytest.raises(BudgetError, match=r"cannot reach 40 .* at least 54.91.* change the knob 'layer'") as error:
        FastV(layer=3).plan(LLAVA, Budget(40))
    assert error.value.floor == pytest.approx(1757 / 32)
    assert plan_cost(FastV(layer=1).plan(LLAVA, Budget(40)), LLAVA, "average") == pytest.approx(40, abs=1)


def test_plan_passes_positions_on() -> None:
    assert FastV().plan(LLAVA, Budget(192)).stages[0].positions == "keep"
    assert FastV(positions="compact").plan(LLAVA, Budget(192)).stages[0].positions == "compact"


def test_knobs_out_of_range() -> None:
    for layer in (0, -1, True, 2.0):
        with pytest.raises(PlanError, match=rf"fastv layer must be an int >= 1 or None, got {layer!r}"):
            FastV(layer=layer)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match=r"positions must be 'keep' or 'compact', got 'shift'"):
        FastV(positions="shift")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PlanError, match=r"fastv layer must be in \[1, 31\] \(32 decoder layers\), got 32"):
        FastV(layer=32).plan(LLAVA, Budget(192))
