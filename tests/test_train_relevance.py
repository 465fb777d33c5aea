"""Labels of the relevance net against the written rule, and its training."""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_models import CASES
from family_models import Row as FamilyRow
from models import IMAGE, TOKENS, Row, batch, llava
from safetensors.torch import load_file
from torch import Tensor

import vtprune
from vtprune.errors import InputError, SessionError, UnsupportedModelError
from vtprune.predictors import RelevanceNet, load_predictor
from vtprune.train.data import Example, encode, read_data
from vtprune.train.loop import LoopConfig, LoopResult
from vtprune.train.relevance import RelevanceConfig, net_inputs, train_relevance
from vtprune.train.relevance_labels import relevance_labels, relevance_loss, relevance_target, relevant_row

pytest.importorskip("accelerate")
STEPS = 3


def prompts() -> tuple[dict[str, Tensor], Tensor]:
    """A ragged batch, and its last 3, 2 and 3 tokens as answers."""
    inputs = batch(Row(1, 3, 7, 0), Row(2, 1, 6, 1), Row(1, 6, 9, 2))
    width = inputs["input_ids"].shape[1]
    return inputs, torch.arange(width) >= width - torch.tensor([[3], [2], [3]])


def by_hand(model: Any, inputs: dict[str, Tensor], answer: list[int], of: str) -> list[Tensor]:
    """R [N, N] of each answer token of one sample: whole matrices, gradients kept on the attention itself."""
    found = []
    for position in answer:
        # each token from its own prefix, as a model that writes would see it
        part = {**inputs, "input_ids": inputs["input_ids"][:, :position]}
        part["attention_mask"] = inputs["attention_mask"][:, :position]
        out = model(**part, output_attentions=True)
        for weights in out.attentions:
            weights.retain_grad()
        token = int(inputs["input_ids"][0, position])
        last = out.logits[0, -1]
        (last[token] if of == "logit" else last.log_softmax(0)[token]).backward()
        relevance = torch.eye(position)
        for weights in out.attentions:
            relevance = relevance + (weights.grad * weights).clamp(min=0)[0].mean(0).detach() @ relevance
        found.append(relevance)
    model.zero_grad()
    return found


@pytest.mark.parametrize("of", ["log_prob", "logit"])
@pytest.mark.parametrize("end", [False, True])
def test_labels_equal_the_rule_by_hand(of: Any, end: bool) -> None:
    model, plain = llava("sdpa"), llava("eager")
    inputs, answer = prompts()
    got = relevance_labels(model, inputs, answer, of=of, end=end)
    assert got.relevance.shape == (3, 2 * TOKENS)
    assert got.valid.sum(1).tolist() == [TOKENS, 2 * TOKENS, TOKENS]
    images = 0
    for b, row in enumerate((Row(1, 3, 7, 0), Row(2, 1, 6, 1), Row(1, 6, 9, 2))):
        alone = batch(row)
        ids = alone["input_ids"][0]
        last = len(ids) - int(answer[b].sum())
        matrices = by_hand(plain, alone, list(range(last, len(ids) - (not end))), of)
        visual = (ids == IMAGE).nonzero()[:, 0]
        want = torch.stack([matrix[-1, visual] for matrix in matrices]).mean(0)
        torch.testing.assert_close(got.relevance[b, : len(visual)], want, atol=1e-8, rtol=1e-3)
        assert (got.relevance[b, len(visual) :] == 0).all()
        for matrix in matrices:
            assert (matrix >= 0).all()
            assert (matrix.diagonal() >= 1).all()
        images += row.images
    assert images == len(inputs["pixel_values"])


def test_a_row_equals_the_whole_matrices_and_heads_may_change_places() -> None:
    torch.manual_seed(0)
    maps = [torch.rand(2, 4, 7, 7).softmax(-1) for _ in range(3)]
    gradients = [torch.randn(2, 4, 7, 7) for _ in range(3)]
    want = torch.eye(7).expand(2, 7, 7)
    for weights, gradient in zip(maps, gradients, strict=True):
        want = want + (weights * gradient).clamp(min=0).mean(1) @ want
    row = torch.nn.functional.one_hot(torch.tensor([6, 3]), 7)
    got = relevant_row(maps, gradients, row)
    torch.testing.assert_close(got, torch.stack([want[0, 6], want[1, 3]]))
    heads = [torch.randperm(4) for _ in range(3)]
    mixed = relevant_row(
        [w[:, h] for w, h in zip(maps, heads, strict=True)],
        [g[:, h] for g, h in zip(gradients, heads, strict=True)],
        row,
    )
    torch.testing.assert_close(mixed, got)
    others = [w.roll(1, 1) for w in maps]
    assert not torch.allclose(relevant_row(others, gradients, row), got)


# prompts of these see themselves in both directions
SEE_ALL = ("paligemma", "paligemma2")
QUICK = ("qwen2_vl", "internvl", "gemma3")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES if name not in SEE_ALL],
)
def test_a_batch_equals_each_sample_alone(name: str) -> None:
    case = CASES[name]
    rows = (
        FamilyRow((("image", case.sizes[0]),), 1, 9, 0),
        FamilyRow((("image", case.sizes[1]), ("image", case.sizes[2])), 1, 5, 1),
    )
    model = case.model()
    found = []
    for part in ((rows[0],), (rows[1],), rows):
        inputs = case.batch(*part)
        answer = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        answer[:, -STEPS:] = True
        found.append(relevance_labels(model, inputs, answer))
    for b, alone in enumerate(found[:2]):
        n = alone.relevance.shape[1]
        assert (alone.relevance > 0).any()
        torch.testing.assert_close(found[2].relevance[b, :n], alone.relevance[0], atol=1e-8, rtol=1e-3)
        assert found[2].correct[b] == alone.correct[0]


def test_the_models_own_answers_are_correct_and_others_are_not() -> None:
    model, inputs = llava(), batch(Row(1, 3, 5, 0), Row(1, 2, 5, 3))
    written = model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    width = inputs["input_ids"].shape[1]
    answer = torch.arange(width + STEPS) >= torch.full((2, 1), width)
    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS), value=1)
    for place, want in ((None, [True, True]), (0, [False, True]), (STEPS - 1, [False, True])):
        ids = written.clone()
        if place is not None:
            ids[0, width + place] = 5 + (ids[0, width + place] == 5)
        labels = relevance_labels(model, {**inputs, "input_ids": ids}, answer)
        assert labels.correct.tolist() == want
    # the last token of a random prompt is not what the model would say, and counts where it is asked for
    answer[0, width - 1] = True
    labels = relevance_labels(model, {**inputs, "input_ids": written}, answer)
    assert labels.correct.tolist() == [False, True]


def test_the_model_is_left_as_it_was() -> None:
    model = llava("sdpa")
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    frozen = model.model.language_model.layers[1].mlp.up_proj.weight
    frozen.requires_grad_(False)
    inputs, answer = prompts()

    def state() -> list[Any]:
        configs = [m.config for m in model.modules() if hasattr(m, "config")]
        # the host leaves hooks of its own on what it has once watched
        hooks = list(model.get_input_embeddings()._forward_hooks)
        backends = [config._attn_implementation for config in (*configs, model.config.vision_config)]
        return [backends, hooks, [p.requires_grad for p in model.parameters()], torch.is_grad_enabled()]

    with torch.no_grad():
        want = model(**inputs).logits
        before = state()
        relevance_labels(model, inputs, answer)
        assert state() == before
        assert before[0][-1] == "eager"
        assert "sdpa" in before[0]
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(model(**inputs).logits, want)
        broken = {**inputs, "pixel_values": inputs["pixel_values"][:1]}
        with pytest.raises(ValueError, match="image"):
            relevance_labels(model, broken, answer)
        assert state() == before


def test_what_cannot_be_explained_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llava()
    inputs, answer = prompts()
    with pytest.raises(InputError, match=r"of must be one of log_prob, logit, got 'loss'"):
        relevance_labels(model, inputs, answer, of="loss")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"needs 2 token\(s\) or more behind its prompt, got \[1, 1, 1\]"):
        relevance_labels(model, inputs, torch.arange(answer.shape[1]) >= torch.full((3, 1), answer.shape[1] - 1))
    with pytest.raises(InputError, match=r"needs 1 token\(s\) or more"):
        relevance_labels(model, inputs, torch.zeros_like(answer), end=True)
    with pytest.raises(InputError, match=r"behind its prompt"):
        relevance_labels(model, inputs, torch.ones_like(answer))
    with pytest.raises(InputError, match="in eval mode, where nothing is dropped"):
        relevance_labels(model.train(), inputs, answer)
    model.eval()
    with vtprune.prune(model, "uniform", 4), pytest.raises(SessionError, match="already pruned"):
        relevance_labels(model, inputs, answer)
    real = type(model).forward

    def keeps_to_itself(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = real(self, *args, **kwargs)
        return SimpleNamespace(logits=out.logits, attentions=out.attentions[1:])

    monkeypatch.setattr(model, "forward", lambda **kwargs: keeps_to_itself(model, **kwargs))
    with pytest.raises(UnsupportedModelError, match="handed out the attention of 3 of its 4 decoder layers"):
        relevance_labels(model, inputs, answer)


@pytest.mark.parametrize("name", SEE_ALL)
def test_a_model_that_sees_the_answer_at_once_is_refused(name: str) -> None:
    case = CASES[name]
    inputs = case.batch(FamilyRow((("image", case.sizes[0]),), 1, 9, 0))
    answer = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    answer[:, -STEPS:] = True
    with pytest.raises(UnsupportedModelError, match="see the answer that is forced behind the prompt before"):
        relevance_labels(case.model(), inputs, answer)


# target and loss


def test_target_keeps_the_better_half_and_ties_go_to_the_earlier() -> None:
    relevance = torch.tensor([[0.1, 0.3, 0.2, 0.4, 9.0], [0.5, 0.5, 0.5, 0.5, 0.5], [2.0, 9.0, 9.0, 9.0, 9.0]])
    valid = torch.arange(5) < torch.tensor([[4], [5], [1]])
    want = [[0, 3 / 7, 0, 4 / 7, 0], [1 / 3, 1 / 3, 1 / 3, 0, 0], [1, 0, 0, 0, 0]]
    torch.testing.assert_close(relevance_target(relevance, valid), torch.tensor(want))
    torch.manual_seed(0)
    for tokens in (1, 2, 7, 30):
        target = relevance_target(torch.rand(4, tokens), torch.ones(4, tokens, dtype=torch.bool))
        assert (target == 0).sum(1).tolist() == [tokens // 2] * 4
        torch.testing.assert_close(target.sum(1), torch.ones(4))
    nothing = relevance_target(torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool))
    torch.testing.assert_close(nothing, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0, 0]]))


def test_loss_is_the_divergence_and_flows_back_through_padding() -> None:
    target = torch.tensor([[0.25, 0.75, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5]])
    logits = torch.tensor([[0.0, 1.0, 2.0, float("-inf")], [1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    loss = relevance_loss(logits, target)
    total = math.log(1 + math.e + math.e**2)
    want = 0.25 * (math.log(0.25) + total) + 0.75 * (math.log(0.75) - 1 + total)
    torch.testing.assert_close(loss, torch.tensor([want, math.log(2)]))
    loss.sum().backward()
    got = torch.nn.functional.kl_div(logits.detach()[1].log_softmax(0), target[1], reduction="sum")
    torch.testing.assert_close(loss.detach()[1], got)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(logits.grad[1], 0.25 - target[1])


# training


CONFIG = RelevanceConfig(
    channels=(4, 8),
    kernel=3,
    label_batch=8,
    loop=LoopConfig(epochs=40, batch_size=8, lr=0.01, weight_decay=0.0, patience=None),
)


@dataclass(frozen=True)
class Trained:
    """A net of the quickest embedded model, and what made it."""

    model: Any
    processor: Any
    train: list[Example]
    held_out: list[Example]
    out: Path
    result: LoopResult

    def again(self, **options: Any) -> LoopResult:
        """Call the trainer with the same arguments, or others."""
        given: dict[str, Any] = {"train": self.train, "held_out": self.held_out, "out": self.out, "config": CONFIG}
        given |= options
        return train_relevance(self.model, self.processor, **given)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Questions on shapes, one of them with a wrong answer."""
    model, processor = vtprune.load_tiny("qwen2_vl")
    train, held_out = read_data("scenes", "train", 32), read_data("scenes", "held-out", 10)
    train[3] = dataclasses.replace(train[3], answer="seven red stars")
    out = tmp_path_factory.mktemp("net")
    result = train_relevance(model, processor, train, held_out, out, CONFIG)
    return Trained(model, processor, train, held_out, out, result)


def test_training_lowers_the_held_out_divergence(trained: Trained) -> None:
    first, best = trained.result.history[0], trained.result.history[trained.result.best_epoch]
    assert best["held_out_loss"] == trained.result.best_loss
    assert best["held_out_loss"] < first["held_out_loss"] - 0.01
    assert best["held_out_loss"] < best["held_out_uniform"] - 0.01
    assert best["held_out_uniform"] == first["held_out_uniform"]
    assert 0.25 < best["held_out_quarter"] < 1
    net = load_predictor(RelevanceNet, str(trained.out))
    assert [tuple(conv.weight.shape) for conv in net.depthwise] == [(1, 1, 3), (4, 1, 3)]
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in trained.model.parameters())
    assert all(p.grad is None for p in trained.model.parameters())


def test_figures_are_those_of_the_formulas(trained: Trained) -> None:
    found = label_batch(trained, trained.held_out)
    net, losses, uniform, quarter = load_predictor(RelevanceNet, str(trained.out)), [], [], []
    for correct, read, relevance in zip(found["correct"], found["attention"], found["relevance"], strict=True):
        if not correct:
            continue
        order = relevance.argsort(descending=True, stable=True)
        target = torch.zeros_like(relevance)
        target[order[: 81 - 40]] = relevance[order[: 81 - 40]]
        target /= target.sum()
        with torch.no_grad():
            logits = net(read[None], torch.ones(1, 81, dtype=torch.bool))[0]
        for values, guess in ((losses, logits.log_softmax(0)), (uniform, torch.full((81,), -math.log(81)))):
            values.append(sum(float(t) * (math.log(t) - float(g)) for t, g in zip(target, guess, strict=True) if t))
        quarter.append(float(target[logits.topk(21).indices].sum()))
    best = trained.result.history[trained.result.best_epoch]
    for name, values in (("loss", losses), ("uniform", uniform), ("quarter", quarter)):
        assert best[f"held_out_{name}"] == pytest.approx(sum(values) / len(values), abs=1e-5)


def label_batch(trained: Trained, batch_of: list[Example]) -> dict[str, Any]:
    """Labels of these examples, made anew."""
    inputs = encode(trained.processor, batch_of, "cpu", answers=True)
    assert inputs.answer is not None
    labels = relevance_labels(trained.model, inputs.inputs, inputs.answer)
    attention = net_inputs(trained.model, encode(trained.processor, batch_of, "cpu", answers=False))
    return {"correct": labels.correct, "relevance": labels.relevance, "attention": attention}


@torch.no_grad()
def test_the_net_is_fitted_on_what_it_reads_at_inference(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []
    real = RelevanceNet.forward

    def note(self: RelevanceNet, attention: Tensor, valid: Tensor) -> Tensor:
        read.extend(row[inside] for row, inside in zip(attention, valid, strict=True))
        return real(self, attention, valid)

    model, batch_of = trained.model, trained.train[:8]
    with monkeypatch.context() as patch:
        patch.setattr(RelevanceNet, "forward", note)
        with vtprune.prune(model, f"relevance(weights='{trained.out}')", 0.25) as session:
            model(**encode(trained.processor, batch_of, "cpu", answers=False).inputs)
            assert [len(kept) for kept in session.report.kept[0].indices] == [20] * 8
    assert len(read) == 8
    folder = trained.out / "run" / "labels"
    kept = [
        tensors for tensors in map(load_file, folder.glob("000000-*")) if torch.equal(tensors["attention/0"], read[0])
    ]
    assert len(kept) == 1
    assert all(torch.equal(kept[0][f"attention/{row}"], attention) for row, attention in enumerate(read))


def test_a_second_run_labels_nothing_and_ends_the_same(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load_file(trained.out / "model.safetensors")

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("labelled again")

    monkeypatch.setattr("vtprune.train.relevance.relevance_labels", never)
    assert trained.again() == trained.result
    again = load_file(trained.out / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in again.items())
    # other labels are other files, and another run
    for changed in ({"of": "logit"}, {"end": True}, {"label_batch": 7}):
        with pytest.raises(AssertionError, match="labelled again"):
            trained.again(config=dataclasses.replace(CONFIG, **changed))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"with other settings \(config.kernel 3, now 5"):
        trained.again(config=dataclasses.replace(CONFIG, kernel=5))


def test_wrong_answers_explain_nothing(trained: Trained, tmp_path: Path) -> None:
    wrong = [dataclasses.replace(example, answer="seven red stars") for example in trained.train[:2]]
    with pytest.raises(InputError, match=r"the model gives none of 2 answers by itself .*: 'seven red stars'\)"):
        trained.again(train=wrong, out=tmp_path)


def test_prompts_without_a_picture_are_left_out(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def never_wrong(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        labels = relevance_labels(*args, **kwargs)
        return dataclasses.replace(labels, correct=torch.ones_like(labels.correct))

    monkeypatch.setattr("vtprune.train.relevance.relevance_labels", never_wrong)
    blind = [Example(f"blind {number}", (), "what color is the star ?", "red") for number in range(3)]
    config = dataclasses.replace(CONFIG, label_batch=2, of="logit", end=True)
    sizes = []
    monkeypatch.setattr("vtprune.train.relevance.train_loop", lambda net, size, *a, **k: sizes.append(size))
    trained.again(train=[*blind[:2], trained.train[0], blind[2]], out=tmp_path, config=config)
    assert sizes == [1]
    assert asked[0] == {"of": "logit", "end": True}


def test_half_precision_weights_and_settings_out_of_range(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.out, tmp_path / "copy")
    full, half = tmp_path / "copy", tmp_path / "copy" / "model.safetensors"
    want = load_file(half)
    trained.again(out=full, dtype=torch.float16)
    assert {value.dtype for value in load_file(half).values()} == {torch.float16}
    for name, value in load_predictor(RelevanceNet, str(full)).state_dict().items():
        torch.testing.assert_close(value, want[name].half().float())
    for knob, value, message in (
        ("channels", (), r"channels must be ints >= 1, one a layer, got \(\)"),
        ("channels", (4, 0), r"got \(4, 0\)"),
        ("channels", 4, "got 4"),
        ("kernel", 4, "kernel must be an odd int >= 1, got 4"),
        ("of", "loss", "of must be one of log_prob, logit, got 'loss'"),
        ("end", 1, "end must be True or False, got 1"),
        ("label_batch", 0, "label_batch must be an int >= 1, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            RelevanceConfig(**{knob: value})  # type: ignore[arg-type]
