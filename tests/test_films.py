"""Video methods on the real classes: each prompt keeps what a plain loop over the unpruned model's input says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_checks import batch_equals_each_alone
from family_models import CASES, LAYERS, Case, Row
from films import Spot, evs_keeps, vidcom2_keeps
from oracle import hidden_keys, masked
from torch import Tensor

import vtprune
from vtprune import EVS, Plan, Site, Stage, UniformFrames, VidCom2
from vtprune.hooks.families.base import family_of
from vtprune.tiny.exercises import exercise_questions

# the generic family takes a video for one image
FILMED = sorted(name for name, case in CASES.items() if case.videos and family_of(case.config()).name != "generic")
# families that differ in how frames reach the decoder: M-RoPE, a CLS token a frame, a newline behind the film
DIFFER = ("qwen2_vl", "video_llava", "llava_onevision")
every_family = pytest.mark.parametrize(
    "case", [pytest.param(CASES[n], id=n, marks=[] if n in DIFFER else pytest.mark.slow) for n in FILMED]
)


def rows_of(case: Case) -> tuple[Row, ...]:
    """Two films in a prompt, a film beside an image, one film; 3 moments each, or 5 where films may differ."""
    film = case.videos[0]
    longer = (5, 4, 4) if case.name in ("qwen2_vl", "qwen2_5_vl") else film
    beside = (("image", case.sizes[0]), ("video", film)) if case.mixes else (("video", film),)
    return Row((("video", film), ("video", longer)), 3, 5, 0), Row(beside, 1, 4, 1), Row((("video", film),), 2, 9, 2)


def spots_of(case: Case, row: Row, tokens: list[int]) -> list[Spot]:
    """Where the tokens of a prompt lie, from the sizes of its media: written without vtprune's layout."""
    spots: list[Spot] = []
    for number, ((kind, size), count) in enumerate(zip(row.media, tokens, strict=True)):
        frame = count
        if kind == "video":
            frame = size[1] * size[2] // 4 if isinstance(size, tuple) else {"video_llava": 17}.get(case.name, 4)
        for i in range(count):
            moment = i // frame
            # the newline behind a film goes with its last frame
            end = kind == "video" and isinstance(size, int) and moment == size
            spots.append(Spot(number, moment - int(end), "end" if end else i % frame))
    return spots


def seen(case: Case, model: Any, rows: tuple[Row, ...]) -> tuple[dict[str, Any], list[Tensor], list[list[Spot]]]:
    """The inputs, what the unpruned decoder gets of each prompt's visual tokens, and where they lie."""
    inputs, caught = case.batch(*rows), {}
    text = model.model.language_model
    hook = text.register_forward_pre_hook(lambda m, a, k: caught.update(k), with_kwargs=True)
    model(**inputs)
    hook.remove()
    visual = case.visual(inputs["input_ids"]) & inputs["attention_mask"].bool()
    states = [caught["inputs_embeds"][b, row] for b, row in enumerate(visual)]
    media = [(kind, size, 10 * row.seed + i) for row in rows for i, (kind, size) in enumerate(row.media)]
    tokens = iter(case.encode(media, [len(row.media) for row in rows])[1])
    spots = [spots_of(case, row, [next(tokens) for _ in row.media]) for row in rows]
    assert [len(s) for s in spots] == [len(s) for s in states]
    return inputs, states, spots


def opened(spots: list[Spot]) -> int:
    """Tokens that have no forerunner."""
    return len({(spot.film, spot.place) for spot in spots})


@every_family
@torch.no_grad()
def test_evs_keeps_what_the_rule_says(case: Case) -> None:
    model, rows = case.model(), rows_of(case)
    inputs, states, spots = seen(case, model, rows)
    least = max(opened(each) / len(each) for each in spots)
    keep = round((1 + 2 * least) / 3, 3)
    with vtprune.prune(model, "evs", keep) as session:
        model(**inputs)
        report = session.report
    assert report.layout.opening == tuple(opened(each) for each in spots)
    for mine, where, kept in zip(states, spots, report.kept[0].indices, strict=True):
        want = evs_keeps(where, mine, int(keep * len(where) + 0.5))
        assert kept.tolist() == want
        assert opened(where) <= len(want) < len(where)
    assert sum(len(k) for k in report.kept[0].indices) > sum(opened(each) for each in spots)


@every_family
@torch.no_grad()
def test_vidcom2_keeps_what_the_rule_says(case: Case) -> None:
    model, rows = case.model(), rows_of(case)
    inputs, states, spots = seen(case, model, rows)
    with vtprune.prune(model, "vidcom2", 0.4) as session:
        model(**inputs)
        kept = session.report.kept[0].indices
    scorer = VidCom2()
    for mine, where, got in zip(states, spots, kept, strict=True):
        want = vidcom2_keeps(where, mine, int(0.4 * len(where) + 0.5), scorer.temperature, scorer.scales)
        assert got.tolist() == want


@every_family
@torch.no_grad()
def test_uniform_frames_keep_whole_frames(case: Case) -> None:
    model, rows = case.model(), rows_of(case)[2:]
    inputs, _, (spots,) = seen(case, model, rows)
    middle = [i for i, spot in enumerate(spots) if spot.frame == 1]
    ends = [i for i, spot in enumerate(spots) if spot.frame in (0, 2)]
    for wanted in (middle, ends):
        with vtprune.prune(model, "uniform-frames", len(wanted)) as session:
            model(**inputs)
        assert session.report.kept[0].indices[0].tolist() == wanted


@every_family
@pytest.mark.parametrize("method", ["evs", "vidcom2", "uniform-frames", "random/frames"])
@torch.no_grad()
def test_films_equal_masked_oracle_and_each_prompt_alone(case: Case, method: str) -> None:
    rows = rows_of(case)
    # a film beside an image in crops has few tokens that EVS may drop
    keep = 0.95 if method == "evs" else 0.4
    model, inputs = case.model(), case.batch(*rows)
    ids, how = inputs["input_ids"], {"max_new_tokens": 8, "do_sample": False}
    with vtprune.prune(model, method, keep) as session:
        out, report = model.generate(**inputs, **how), session.report
    assert any(len(kept) < n for kept, n in zip(report.kept[0].indices, report.visual_tokens, strict=True))
    # what a DeepStack model adds to hidden positions is hidden with them
    with masked(model, hidden_keys(report, ids, LAYERS, case.visual(ids))):
        assert torch.equal(out, model.generate(**inputs, **how))
    batch_equals_each_alone(case, model, rows, method, keep)


# what cannot be done


@torch.no_grad()
def test_evs_refuses_images_and_names_what_films_need() -> None:
    case = CASES["qwen2_vl"]
    model = case.model()
    image, film = case.batch(Row((("image", (1, 8, 8)),))), case.batch(Row((("video", (3, 4, 6)),)))
    want = model(**image).logits
    with vtprune.prune(model, "evs", 0.5) as session:
        with pytest.raises(
            vtprune.BudgetError, match=r"cannot reach 8 of 16 .*at least 16\..*all of this prompt"
        ) as no:
            model(**image)
        assert no.value.floor == 16
        model(**film)
        assert len(session.report.kept[0].indices[0]) == 9
    with vtprune.prune(model, "evs", 4) as session:
        with pytest.raises(vtprune.BudgetError, match=r"cannot reach 4 of 18 .*Ask for 6 or more.* 6 tokens of this"):
            model(**film)
        assert session.plan_for(18, 5, 1, opening=3).stages[0].keep == 4
    with vtprune.prune(model, "evs", 16):
        assert torch.equal(model(**image).logits, want)
    assert torch.equal(model(**image).logits, want)
    with pytest.raises(vtprune.BudgetError, match=r"cannot reach 8 of 16 .*whole, all of this prompt"):
        vtprune.prune(CASES["llava"].model(), "evs", 8)


@torch.no_grad()
def test_a_plan_below_what_evs_needs_is_refused_for_the_prompt() -> None:
    case = CASES["qwen2_vl"]
    model, film = case.model(), case.batch(Row((("video", (3, 4, 6)),)))
    needs = r"keeps 5 of 18 visual tokens at input, but evs needs at least 6 of this prompt. Raise the stage's keep=5"
    plan = Plan((Stage(Site("input"), EVS(), 5),))
    with vtprune.prune(model, plan), pytest.raises(vtprune.BudgetError, match=needs):
        model(**film)
    with vtprune.prune(model, Plan((Stage(Site("layer", 2), EVS(), 6),))) as session:
        model(**film)
        assert session.report.kept[0].indices[0].tolist() == list(range(6))


@torch.no_grad()
def test_frames_that_come_as_images_are_images() -> None:
    """InternVL's processor hands frames over one by one: nothing tells them from images, and nothing pretends to."""
    case = CASES["internvl"]
    model, frames = case.model(), case.batch(Row((("image", 3),)))
    with vtprune.prune(model, "evs", 0.5), pytest.raises(vtprune.BudgetError, match=r"at least 48\."):
        model(**frames)
    with vtprune.prune(model, VidCom2(), 0.5) as session:
        model(**frames)
        assert [int(((i // 16) == n).sum()) for i in session.report.kept[0].indices for n in range(3)] == [8, 8, 8]


@torch.no_grad()
def test_the_generic_family_knows_no_frames() -> None:
    case = CASES["perception_lm"]
    model, film = case.model(), case.batch(Row((("video", case.videos[0]),)))
    with vtprune.prune(model, "evs", 0.5), pytest.raises(vtprune.BudgetError, match=r"at least 48\b.*all of this"):
        model(**film)


@torch.no_grad()
def test_films_come_behind_another_method() -> None:
    case = CASES["qwen2_vl"]
    model, film = case.model(), case.batch(Row((("video", (5, 4, 6)),)))
    with vtprune.prune(model, ["fastervlm", "evs"], [0.8, 0.4]) as session:
        model(**film)
        first, last = session.report.kept[-2].indices[0], session.report.kept[-1].indices[0]
    assert (len(first), len(last)) == (24, 12)
    assert set(last.tolist()) < set(first.tolist())
    places = {int(t) % 6: int(t) for t in reversed(first)}
    assert set(places.values()) <= set(last.tolist())
    with vtprune.prune(model, [VidCom2(), UniformFrames()], [0.8, 0.4]) as session:
        model(**film)
        assert len(session.report.kept[-1].indices[0]) == 12


@pytest.mark.slow
@torch.no_grad()
def test_films_are_answered_better_than_with_random_tokens() -> None:
    """300 questions about generated films to the embedded model that was trained for them, at two moderate budgets."""
    model, processor = vtprune.load_tiny("qwen2_vl_plus")
    exercises = exercise_questions("films", "dev", 150, seed=11, per_image=2)
    asked = [(frames, item) for frames, questions in exercises for item in questions]
    batches = []
    for start in range(0, len(asked), 25):
        part = asked[start : start + 25]
        content = [[{"type": "video"}, {"type": "text", "text": item.question}] for _, item in part]
        texts = [
            processor.apply_chat_template([{"role": "user", "content": c}], add_generation_prompt=True) for c in content
        ]
        inputs = processor(
            text=texts, videos=[frames for frames, _ in part], padding=True, padding_side="left", return_tensors="pt"
        )
        batches.append((dict(inputs), [item.answer for _, item in part]))

    def right() -> int:
        number = 0
        for inputs, answers in batches:
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            said = processor.batch_decode(ids, skip_special_tokens=True)
            number += sum(text.strip() == answer for text, answer in zip(said, answers, strict=True))
        return number

    def pruned(method: str) -> float:
        number = 0
        for keep in (0.5, 0.35):
            with vtprune.prune(model, method, keep):
                number += right()
        return number / 600

    assert len(asked) == 300
    full, chance = right() / 300, (pruned("random") + pruned("random(seed=1)")) / 2
    shares = {method: pruned(method) for method in ("evs", "vidcom2", "uniform-frames")}
    assert chance + 0.03 < full, "random pruning costs nothing here, so that the test shows nothing"
    assert all(share > chance + 0.01 for share in shares.values()), (full, chance, shares)
    assert shares["evs"] > chance + 0.03, (full, chance, shares)
