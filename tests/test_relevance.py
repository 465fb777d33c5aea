"""The relevance net against plain loops, and the method against eager attention."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import CASES
from family_models import Row as FamilyRow
from learned import ready
from models import LAYERS, TOKENS, Row, batch, llava
from oracle import hidden_keys, masked
from scorer_views import LLAVA, Sample, seen, token_view
from torch import Tensor

import vtprune
from vtprune.budget import Budget
from vtprune.errors import CheckpointError, PlanError, ShapeError, UntrainedError
from vtprune.predictors import Fingerprint, RelevanceNet, load_predictor
from vtprune.predictors.relevance import relative_attention
from vtprune.scorers.instruction import instruction_attention
from vtprune.scorers.relevance import Relevance

NOBODY = Fingerprint("nobody", 4, 16).to_dict()
LENGTHS = (9, 1, 2, 23, 4)


def net(channels: tuple[int, ...] = (3, 5, 2), kernel: int = 5) -> RelevanceNet:
    torch.manual_seed(3)
    return RelevanceNet(NOBODY, channels, kernel).eval()


def ragged(lengths: tuple[int, ...] = LENGTHS, fill: float = math.nan) -> tuple[Tensor, Tensor]:
    """Attention of samples with so many tokens, padded with `fill`, and what is valid."""
    generator = torch.Generator().manual_seed(5)
    attention = torch.full((len(lengths), max(lengths)), fill)
    for row, length in enumerate(lengths):
        attention[row, :length] = torch.rand(length, generator=generator) ** 4
    return attention, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def by_loops(module: RelevanceNet, attention: Tensor) -> Tensor:
    """Logits of one sample [V], number by number, float64."""
    weights = {name: value.double() for name, value in module.state_dict().items()}
    length, mean = len(attention), float(attention.double().mean())
    states = [[math.log((float(a) / mean + 1e-3) / 1.001)] for a in attention]
    for layer in range(len(module.depthwise)):
        depth, depth_bias = weights[f"depthwise.{layer}.weight"], weights[f"depthwise.{layer}.bias"]
        point, point_bias = weights[f"pointwise.{layer}.weight"], weights[f"pointwise.{layer}.bias"]
        kernel, entering = depth.shape[2], depth.shape[0]
        made = []
        for v in range(length):
            mixed = []
            for c in range(entering):
                near = [(k, v + k - kernel // 2) for k in range(kernel)]
                mixed.append(depth_bias[c] + sum(depth[c, 0, k] * states[at][c] for k, at in near if 0 <= at < length))
            outs = [point_bias[o] + sum(point[o, c, 0] * mixed[c] for c in range(entering)) for o in range(len(point))]
            made.append([0.5 * float(x) * (1 + math.erf(float(x) / math.sqrt(2))) for x in outs])
        states = made
    head, bias = weights["head.weight"][0, :, 0], weights["head.bias"][0]
    return torch.stack([bias + sum(h * s for h, s in zip(head, state, strict=True)) for state in states])


@pytest.mark.parametrize(("channels", "kernel"), [((3, 5, 2), 5), ((4,), 1), ((2, 3, 4, 5, 6), 3), ((2, 2), 9)])
@torch.no_grad()
def test_logits_equal_plain_loops_whatever_the_padding(channels: tuple[int, ...], kernel: int) -> None:
    module = net(channels, kernel)
    for fill in (0.0, math.nan, 1e4):
        attention, valid = ragged(fill=fill)
        logits = module(attention, valid)
        assert torch.equal(logits == float("-inf"), ~valid)
        for row, length in enumerate(LENGTHS):
            want = by_loops(module, attention[row, :length]).float()
            torch.testing.assert_close(logits[row, :length], want, atol=1e-5, rtol=1e-5)
            alone = module(attention[row : row + 1, :length], valid[row : row + 1, :length])[0]
            torch.testing.assert_close(alone, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_scale_of_attention_does_not_matter() -> None:
    attention, valid = ragged()
    want = net()(attention, valid)
    for scale in (1e-6, 1e3):
        torch.testing.assert_close(net()(attention * scale, valid), want, atol=1e-4, rtol=1e-4)
    assert (want[0, :9].diff().abs() > 1e-4).all()


def test_relative_attention_is_zero_at_an_even_share() -> None:
    attention = torch.tensor([[0.2, 0.2, 0.2], [0.0, 0.0, 9.0], [0.0, 3.0, 1.0]])
    valid = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    got = relative_attention(attention, valid)
    torch.testing.assert_close(got[:2], torch.zeros(2, 3))
    floor = math.log(1e-3 / 1.001)
    torch.testing.assert_close(got[2], torch.tensor([floor, math.log(2.251 / 1.001), math.log(0.751 / 1.001)]))


@torch.no_grad()
def test_a_batch_without_visual_tokens() -> None:
    assert net()(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)


def test_the_published_net_and_its_checkpoint(tmp_path: Path) -> None:
    published = RelevanceNet(NOBODY)
    channels = [1, 32, 64, 128, 256, 512]
    want = sum((5 + 1) * c + (c + 1) * out for c, out in itertools.pairwise(channels)) + 513
    assert sum(p.numel() for p in published.parameters()) == want == 178_503
    small = net((3, 4), 3)
    small.save_pretrained(tmp_path)
    loaded = load_predictor(RelevanceNet, str(tmp_path))
    assert [tuple(conv.weight.shape) for conv in loaded.depthwise] == [(1, 1, 3), (3, 1, 3)]
    attention, valid = ragged()
    torch.testing.assert_close(loaded(attention, valid), small(attention, valid))
    small.half().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 1500
    halved = load_predictor(RelevanceNet, str(tmp_path))
    assert {p.dtype for p in halved.parameters()} == {torch.float32}
    with pytest.raises(CheckpointError, match="holds weights of 'relevance', expected those of 'dyvte'"):
        vtprune.predictors.ExitGates.from_pretrained(tmp_path)


@pytest.mark.parametrize(("channels", "kernel"), [((), 3), ((4, 0), 3), ((4,), 2), ((4,), -1)])
def test_shapes_out_of_range(channels: tuple[int, ...], kernel: int) -> None:
    with pytest.raises(ShapeError, match=r"needs channels >= 1 and an odd kernel >= 1, got \("):
        RelevanceNet(NOBODY, channels, kernel)


# the method


def test_knobs_and_plan() -> None:
    with pytest.raises(PlanError, match=r"relevance positions must be 'keep' or 'compact', got 'shift'"):
        Relevance(positions="shift")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="relevance weights must be a folder"):
        Relevance(weights="")
    for positions in ("keep", "compact"):
        (stage,) = Relevance(positions=positions).plan(LLAVA, Budget(64)).stages  # type: ignore[arg-type]
        assert (str(stage.site), stage.keep, stage.positions) == ("restart[0]", 64, positions)
    with pytest.raises(UntrainedError, match="relevance is learned, and has no weights for this model"):
        vtprune.prune(llava(), "relevance", 8)


@torch.no_grad()
def test_the_best_logits_survive() -> None:
    samples = (Sample(((3, 4),), seed=1), Sample(((2, 3),), seed=2, text=9))
    scorer: Any = ready("relevance")
    view = seen(scorer, samples, (5, 2))
    module = load_predictor(RelevanceNet, scorer.weights)
    for b, (sample, keep) in enumerate(zip(samples, (5, 2), strict=True)):
        logits = by_loops(module, view.memory["attention"][b, : sample.total])
        torch.testing.assert_close(scorer.score(view)[b, : sample.total], logits.float(), atol=1e-5, rtol=1e-5)
        assert scorer.select(view)[b].nonzero()[:, 0].tolist() == logits.topk(keep).indices.sort().values.tolist()
    with pytest.raises(UntrainedError, match=r"relevance has not been given weights; vtprune.prune\(\) finds"):
        Relevance().score(token_view(samples, (5, 2)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
@torch.no_grad()
def test_the_net_reads_the_first_layers_instruction_rows(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    rows = (
        FamilyRow((("image", case.sizes[0]),), 1, 9, 0),
        FamilyRow((("image", case.sizes[1]), ("image", case.sizes[2])), 1, 2, 1),
    )
    inputs = case.batch(*rows)
    eager = case.model("eager")
    with vtprune.prune(eager, "uniform", 1.0) as session:
        first = eager(**inputs, output_attentions=True).attentions[0].mean(1)
        layout = session.report.layout
    assert layout is not None
    found = []

    def note(view: Any) -> Tensor:
        found.append((view.block, instruction_attention(view)))
        return found[-1][1]

    monkeypatch.setattr("vtprune.scorers.relevance.instruction_attention", note)
    model = case.model(attention)
    with vtprune.prune(model, ready("relevance", model), 0.5):
        model(**inputs)
    ((block, got),) = found
    assert block == 0
    for b, count in enumerate(layout.counts):
        at, real = layout.position[b, :count], layout.real[b].nonzero()[:, 0]
        asking = real[real > at[-1]]
        torch.testing.assert_close(got[b, :count], first[b][asking][:, at].mean(0), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_pruned_run_equals_the_masked_oracle(attention: str) -> None:
    model, inputs = llava(attention), batch(Row(1, 3, 5, 0), Row(2, 1, 4, 1))
    greedy = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with vtprune.prune(model, ready("relevance", model), 0.3) as session:
        out = model.generate(**inputs, **greedy)
        report = session.report
    assert [str(record.site) for record in report.kept] == ["restart[0]"]
    assert report.asked == ((0, inputs["input_ids"].shape[1]),)
    assert [len(kept) for kept in report.kept[0].indices] == [5, 10]
    assert report.average_tokens == (5, 10)
    with masked(model, hidden_keys(report, inputs["input_ids"], LAYERS)):
        want = model.generate(**inputs, **greedy)
    assert torch.equal(out.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(want.logits), atol=2e-5, rtol=2e-5)
    assert report.visual_tokens == (TOKENS, 2 * TOKENS)
