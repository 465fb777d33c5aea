"""`vtprune tune`: the search space, budgets that land at the limit, the search and its resumption, what it writes."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import eval_helpers
import family_models
import models
import pytest
import torch
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.contract import Scorer
from vtprune.errors import BudgetError, InputError, VtpruneError
from vtprune.eval import task_data
from vtprune.eval.stats import Interval
from vtprune.plan import Plan, Site, Stage
from vtprune.tune.budgets import Costs, behind, solve_chain
from vtprune.tune.choose import Compared, Point, choose, compare, equal_cost, finalists, front_points, mark_front
from vtprune.tune.goal import Goal
from vtprune.tune.knobs import Choice, Schedule, Span, knobs_of
from vtprune.tune.questions import Answered, Portion, Questions, join
from vtprune.tune.report import show, write
from vtprune.tune.runner import Result, Settings, run_tune
from vtprune.tune.search import Found, Search, found_of, open_study, require_optuna
from vtprune.tune.space import Candidate, Space, method_text

require_optuna()
ROWS = (models.Row(after=0), models.Row(after=4, seed=1), models.Row(after=2, seed=2))
LIMIT = 0.6
TUNED = Path(__file__).resolve().parent.parent / "benchmarks" / "tuned"
PARTS = tuple(Portion("dev", 0, first, 8) for first in range(0, 32, 8))


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    """Each of a trial's twenty writes would wait for it; what a kill leaves is the same."""
    from sqlalchemy import Engine, event

    def hurry(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", hurry)
    yield
    event.remove(Engine, "connect", hurry)


@pytest.fixture(scope="module")
def model() -> Any:
    return models.llava()


def attach(model: Any, plan: Plan) -> None:
    vtprune.prune(model, plan).remove()


def costs_of(model: Any) -> Costs:
    batch = tuple((len(row.ids()) - models.TOKENS, models.TOKENS) for row in ROWS)
    return Costs(vtprune.geometry(model), [batch])


def space_of(model: Any, names: Sequence[str], low: float = LIMIT, high: float = LIMIT) -> Space:
    geometry = costs_of(model).geometry
    return Space(names, geometry, lambda m: m.bind(model), lambda plan: attach(model, plan), low, high)


class Fixed:
    """A trial that draws what it is told, else the first value; notes what was asked."""

    def __init__(self, **told: Any) -> None:
        self.told, self.seen = told, {}

    def _take(self, name: str, legal: Any, default: Any) -> Any:
        self.seen[name] = legal
        return self.told.get(name, default)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._take(name, tuple(choices), choices[0])

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return self._take(name, (low, high), low)

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        return self._take(name, (low, high), low)


# knobs


def knobs(model: Any, name: str) -> dict[str, Any]:
    """Without fields of the knob beside its values, for comparing."""
    return {knob.field: knob for knob in space_of(model, [name])._knobs[name]}


def test_knobs_are_read_off_the_fields_and_the_model(model: Any) -> None:
    assert knobs(model, "fastv") == {
        "layer": Span("layer", 1, models.LAYERS - 1),
        "positions": Choice("positions", ("keep", "compact")),
    }
    found = knobs(model, "gemfilter")
    assert found["layer"] == Span("layer", 0, models.LAYERS - 1)
    assert found["pool"] == Choice("pool", (1, 3, 5, 7, 9))
    assert found["count_include_pad"] == Choice("count_include_pad", (False, True))
    found = knobs(model, "flowcut")
    assert found["history"] == Span("history", 0.0, 1.0)
    assert found["tower_factor"] == Span("tower_factor", 1.0, 4.0)
    assert found["every"] == Choice("every", (1, 2, 3))
    # what has no scale, and what `plan` sets itself
    assert "remaining" not in found
    assert knobs(model, "random") == {}
    # three cuts before layers 1, 2 and 3: a decoder of four layers has room for no other
    assert "layers" not in knobs(model, "transprune")


def test_a_deeper_decoder_has_room_for_schedules() -> None:
    def check(method: Scorer) -> bool:
        return bool(method.plan(deep, vtprune.Budget(8, "final")).stages)

    deep = dataclasses.replace(vtprune.geometry(models.llava()), layers=12, entering=())
    found = {knob.field: knob for knob in knobs_of(vtprune.TransPrune(), 12, check)}
    assert found["layers"] == Schedule("layers", 3, 1, 9, 11)
    trial = Fixed(**{"transprune.layers.first": 5, "transprune.layers.gap": 2})
    assert found["layers"].draw(trial, "transprune") == (5, 7, 9)
    # what would not fit is pushed together
    trial = Fixed(**{"transprune.layers.first": 8, "transprune.layers.gap": 3})
    assert found["layers"].draw(trial, "transprune") == (8, 9, 10)
    trial = Fixed(**{"transprune.alpha": 0.15000000000000002})
    assert found["alpha"].draw(trial, "transprune") == 0.15


def test_values_that_this_model_refuses_are_not_searched() -> None:
    """M-RoPE has no compacted positions."""
    model = family_models.CASES["qwen2_vl"].model()
    geometry = vtprune.geometry(model).for_prompt(16, 8, 1)
    space = Space(["fastv"], geometry, lambda m: m, lambda plan: attach(model, plan), 0.5, 0.5)
    assert "positions" not in {knob.field for knob in space._knobs["fastv"]}


def test_a_space_draws_singles_and_chains(model: Any) -> None:
    space = space_of(model, ["uniform", "fastv", "gemfilter", "relevance"])
    assert set(space.singles) == {"uniform", "fastv", "gemfilter"}
    assert "relevance is learned, and has no weights" in space.skipped["relevance"]
    assert (space.early, space.late) == (["uniform", "gemfilter"], ["fastv", "gemfilter"])
    drawn = [space.draw(Fixed(**fixed)) for fixed in space.stock(LIMIT)]
    assert [c.methods for c in drawn] == [(vtprune.Uniform(),), (vtprune.FastV(),), (vtprune.GemFilter(),)]
    trial = Fixed(first="uniform", second="fastv", split=0.25, **{"fastv.stock": False, "fastv.layer": 2})
    assert space.draw(trial) == Candidate((vtprune.Uniform(), vtprune.FastV(layer=2)), 0.25, LIMIT)
    assert "share" not in trial.seen
    assert trial.seen["second"] == ("none", "fastv", "gemfilter")
    # nothing comes behind a cut inside the decoder
    assert "second" not in space.stock(LIMIT)[1]
    # a method behind itself is the method
    same = Fixed(first="gemfilter", second="gemfilter")
    assert space.draw(same).methods == (vtprune.GemFilter(),)
    wide = Fixed(share=0.4)
    assert space_of(model, ["uniform", "fastv"], 0.3, 0.9).draw(wide).share == 0.4
    assert wide.seen["share"] == (0.3, 0.9)
    with pytest.raises(InputError, match="none of the methods runs on this model"):
        space_of(model, ["relevance"])


def test_methods_as_text() -> None:
    assert method_text(vtprune.FastV()) == "fastv"
    assert method_text(vtprune.FastV(layer=2, positions="compact")) == "fastv(layer=2, positions='compact')"
    assert method_text(vtprune.Relevance(weights="folder")) == "relevance"


# budgets


CHAINS = [
    (vtprune.Uniform(),),
    (vtprune.FastV(),),
    (vtprune.FlowCut(),),
    (vtprune.GemFilter(layer=1),),
    (vtprune.Uniform(), vtprune.FastV(layer=2)),
    (vtprune.FlowCut(), vtprune.TransPrune()),
    (vtprune.DivPrune(), vtprune.GemFilter(layer=1)),
    (vtprune.Pool(), vtprune.DyVTE(exit_layer=1)),
]


@pytest.mark.parametrize("methods", CHAINS, ids=lambda chain: "+".join(m.name for m in chain))
def test_what_is_counted_is_what_a_batch_costs(model: Any, methods: tuple[Scorer, ...]) -> None:
    """And it lies within the limit, with less than one token a layer to spare."""
    costs = costs_of(model)
    limit = 0.8
    plan = solve_chain(costs, methods, 0.5, limit)
    with vtprune.prune(model, plan) as session, torch.no_grad():
        model(**models.batch(*ROWS))
        measured = session.report.flops / session.report.flops_full
    assert measured == pytest.approx(costs.share(plan), abs=1e-12)
    assert measured <= limit
    if methods[-1].takes_budget:
        one_token = 1 / (models.TOKENS + 5)
        assert costs.share(plan) > limit - 1.3 * one_token


def test_a_split_moves_the_cut_from_the_first_method_to_the_second(model: Any) -> None:
    costs, methods = costs_of(model), (vtprune.Uniform(), vtprune.FastV(layer=2))
    firsts, lasts = [], []
    for split in (0.0, 0.5, 1.0):
        first, last = solve_chain(costs, methods, split, LIMIT).stages
        firsts.append(first.count(models.TOKENS))
        lasts.append(last.count(models.TOKENS))
    assert firsts == sorted(set(firsts))
    assert lasts == sorted(set(lasts), reverse=True)
    # 0 leaves the whole cut to the first
    (alone,) = solve_chain(costs, methods[:1], 0.0, LIMIT).stages
    assert firsts[0] == alone.count(models.TOKENS)


def test_plans_hold_shares_so_that_any_image_fits(model: Any) -> None:
    plan = solve_chain(costs_of(model), (vtprune.FlowCut(), vtprune.FastV(layer=3)), 0.5, LIMIT)
    assert all(isinstance(stage.keep, float) for stage in plan.stages)
    gone = solve_chain(costs_of(model), (vtprune.DyVTE(exit_layer=1),), 0.0, LIMIT)
    assert gone.stages[0].keep == 0


def test_a_budget_out_of_reach_names_the_floor(model: Any) -> None:
    with pytest.raises(BudgetError, match=r"transprune costs at least 89\.\d % .* more than 20\.0 %"):
        solve_chain(costs_of(model), (vtprune.TransPrune(),), 0.0, 0.2)
    with pytest.raises(BudgetError, match=r"uniform\+gemfilter costs at least \d+\.\d % .* more than 20\.0 %"):
        solve_chain(costs_of(model), (vtprune.Uniform(), vtprune.GemFilter(layer=3)), 0.5, 0.2)


def test_equal_cost_is_never_less_than_asked(model: Any) -> None:
    costs = costs_of(model)
    spent = costs.share(solve_chain(costs, (vtprune.Uniform(), vtprune.FastV(layer=2)), 0.5, LIMIT))
    for method in (vtprune.Uniform(), vtprune.FastV(), vtprune.FlowCut()):
        plan = equal_cost(method, costs, spent)
        assert spent <= costs.share(plan)
        fewer = max(1, plan.stages[-1].count(models.TOKENS) - 1)
        assert costs.share(behind(costs, method)(fewer)) < spent
    with pytest.raises(VtpruneError, match="transprune costs at least"):
        equal_cost(vtprune.TransPrune(), costs, 0.2)


# goals


def test_within_the_limit_is_always_better_than_beyond_it() -> None:
    flops = Goal("flops", 0.3)
    assert flops.value(0.9, 1.0, 0.3, None) == 0.9
    assert flops.value(0.0, 1.0, 0.2, None) > flops.value(1.0, 1.0, 0.31, None) == pytest.approx(-0.01)
    latency = Goal("latency", 0.5)
    assert latency.value(0.8, 1.0, 0.9, 0.5) == 0.8
    assert latency.value(0.8, 1.0, 0.1, 0.75) == -0.25
    accuracy = Goal("accuracy", 0.9)
    assert accuracy.value(0.72, 0.8, 0.4, None) == pytest.approx(0.6)
    assert accuracy.value(0.71, 0.8, 0.1, None) == pytest.approx(-0.01)
    # every candidate that holds the accuracy so far is as good as the others
    assert accuracy.so_far(0.9, 0.8) == accuracy.so_far(0.75, 0.8) == 0.0 > accuracy.so_far(0.7, 0.8)
    assert flops.so_far(0.7, 0.8) == 0.7


def test_exactly_one_limit() -> None:
    assert Goal.read(None, 0.5, None) == Goal("latency", 0.5)
    with pytest.raises(InputError, match=r"exactly one of --flops, --latency and --accuracy, got none"):
        Goal.read(None, None, None)
    with pytest.raises(InputError, match=r"got --flops 0\.3, --accuracy 0\.9"):
        Goal.read(0.3, None, 0.9)
    with pytest.raises(InputError, match=r"--flops must be a share in \(0, 1\] .* got 1\.5"):
        Goal.read(1.5, None, None)


# searching


class Marks:
    """Stands in for the model's answers: a plan's scores follow from a hash of it, and the cost is counted."""

    def __init__(self, model: Any) -> None:
        self.model, self.costs, self.asked, self.stop_after = model, costs_of(model), 0, None

    def attach(self, plan: Plan) -> None:
        attach(self.model, plan)

    def ask(self, plan: Plan | None, portion: Portion) -> Answered:
        self.asked += 1
        if self.asked == self.stop_after:
            raise KeyboardInterrupt
        text = json.dumps(None if plan is None else plan.to_dict())
        digest = hashlib.sha256(f"{text}{portion}".encode()).digest()
        goodness = hashlib.sha256(text.encode()).digest()[0] / 255
        scores = tuple(float(byte / 255 < (0.95 if plan is None else goodness)) for byte in digest[: portion.count])
        images = tuple(f"{portion}{place}" for place in range(portion.count))
        share = 1.0 if plan is None else self.costs.share(plan)
        return Answered(scores, images, ("t",) * portion.count, round(share * 1e12), 10**12)


NAMES = ("uniform", "fastv", "flowcut", "transprune")


FLOPS = Goal("flops", LIMIT)


def searched(marks: Marks, folder: Path, trials: int, goal: Goal = FLOPS, seed: int = 0) -> list[Found]:
    folder.mkdir(exist_ok=True)
    low, high = (LIMIT, LIMIT) if goal.kind == "flops" else (0.3, 1.0)
    space = space_of(marks.model, NAMES, low, high)
    unpruned = [Marks(marks.model).ask(None, part) for part in PARTS]
    with open_study(folder, {"goal": str(goal)}) as study:
        search = Search(study, space, marks.costs, marks, goal, PARTS, unpruned, seed, lambda plan: 0.5)  # type: ignore[arg-type]
        search.run(trials, lambda text: None)
        return found_of(study)


def told(found: Sequence[Found]) -> list[Any]:
    """Everything but the number, which an interrupted trial moves."""
    return [{**vars(trial), "number": None} for trial in found]


def test_singles_come_first_and_whole_and_the_rest_is_halved(model: Any, tmp_path: Path) -> None:
    found = searched(Marks(model), tmp_path, 16)
    singles, rest = found[: len(NAMES)], found[len(NAMES) :]
    assert [trial.text for trial in singles] == list(NAMES)
    assert all(trial.single and trial.state in ("asked", "not possible") for trial in singles)
    assert len(rest) == 16
    assert not any(trial.single for trial in rest)
    states = {trial.state for trial in rest}
    assert {"asked", "stopped"} <= states
    assert any("+" in trial.text for trial in rest)
    assert any("(" in trial.text for trial in rest)
    # none was tried twice
    assert len({repr(trial.plan) if trial.plan else trial.text for trial in found}) == len(found)
    for trial in found:
        if trial.share is not None:
            assert trial.share <= LIMIT * (1 + 1e-9)
        if trial.state == "asked":
            assert trial.value == trial.accuracy
    # transprune sees every token in its first layer, of four
    assert any(trial.state == "not possible" and "costs at least" in trial.note for trial in found)


def test_an_interrupted_search_ends_like_an_uninterrupted_one(model: Any, tmp_path: Path) -> None:
    whole = searched(Marks(model), tmp_path / "whole", 6)
    for stop_after in (3, 17):
        marks = Marks(model)
        marks.stop_after = stop_after
        folder = tmp_path / str(stop_after)
        with pytest.raises(KeyboardInterrupt):
            searched(marks, folder, 6)
        assert told(searched(Marks(model), folder, 6)) == told(whole)
    # more trials go on where it ended, and another seed looks elsewhere
    assert told(searched(Marks(model), tmp_path / "whole", 8))[: len(whole)] == told(whole)
    assert told(searched(Marks(model), tmp_path / "other", 6, seed=1)) != told(whole)


def test_another_search_in_the_same_folder_is_refused(model: Any, tmp_path: Path) -> None:
    searched(Marks(model), tmp_path, 0)
    with pytest.raises(InputError, match=r"other settings \(goal was .prefill FLOPs.*60 %.*, now .accuracy at least"):
        searched(Marks(model), tmp_path, 0, Goal("accuracy", 0.5))


def test_what_decides_for_itself_too_much_is_asked_no_more(model: Any, tmp_path: Path) -> None:
    """Its cost shows when it runs: here twice what was counted."""
    marks = Marks(model)
    counted = marks.costs
    marks.costs = type("Twice", (), {"share": lambda self, plan: 2 * counted.share(plan)})()  # type: ignore[assignment]
    space = space_of(model, NAMES)
    unpruned = [Marks(model).ask(None, part) for part in PARTS]
    with open_study(tmp_path, {}) as study:
        search = Search(study, space, counted, marks, FLOPS, PARTS, unpruned, 0, lambda plan: 0.5)  # type: ignore[arg-type]
        search.run(4, lambda text: None)
        found = found_of(study)
    assert all(trial.value < 0 for trial in found if trial.single and trial.value is not None)
    rest = [trial for trial in found if not trial.single and trial.share is not None]
    assert rest
    assert all(trial.state == "stopped" and "beyond the limit" in trial.note for trial in rest)


def test_other_limits_search_the_share_too(model: Any, tmp_path: Path) -> None:
    found = searched(Marks(model), tmp_path / "accuracy", 6, Goal("accuracy", 0.5))
    shares = {round(trial.share, 2) for trial in found if trial.share is not None}
    assert len(shares) > 3
    for trial in found:
        if trial.value is not None and trial.value >= 0:
            assert trial.value == 1 - trial.share
    slow = searched(Marks(model), tmp_path / "latency", 3, Goal("latency", 0.4))
    assert {trial.note for trial in slow if trial.ratio is not None} == {
        "its prefill takes 50.0 % of the unpruned time."
    }


# choosing


def trial_of(number: int, value: float | None, plan: Plan | None = None, *, single: bool = False) -> Found:
    keep = round(0.05 + 0.9 * number / 20, 3)
    plan = plan or Plan((Stage(Site("input"), vtprune.Uniform(), keep),))
    candidate = {"methods": [vtprune.Uniform().to_dict()], "split": 0.0, "share": LIMIT}
    return Found(number, f"t{number}", single, candidate, "asked", "", value, plan, value, keep)


def test_finalists_are_the_best_different_plans_and_the_best_single() -> None:
    trials = [trial_of(0, 0.1, single=True), trial_of(1, 0.2, single=True)]
    trials += [trial_of(n, 0.5 + n / 100) for n in range(2, 9)] + [trial_of(9, None)]
    trials.append(dataclasses.replace(trials[8], number=10))
    assert [trial.number for trial in finalists(trials)] == [8, 7, 6, 5, 4, 1]
    with pytest.raises(VtpruneError, match="no candidate could be asked"):
        finalists([trial_of(9, None)])


def test_the_choice_is_made_on_the_validation_questions(model: Any) -> None:
    trials = [trial_of(n, 0.5 + n / 100, single=n < 2) for n in range(8)]
    marks, portion = Marks(model), Portion("dev", 0, 100, 30)
    chosen = choose(trials, marks, Goal("flops", LIMIT), portion, lambda text: None)  # type: ignore[arg-type]
    accuracies = [marks.ask(c.found.plan, portion).accuracy for c in chosen]
    assert [c.value for c in chosen] == accuracies == sorted(accuracies, reverse=True)
    assert [c.found.number for c in chosen] != [trial.number for trial in finalists(trials)]


def test_the_front_holds_what_nothing_beats() -> None:
    def point(share: float, accuracy: float) -> Point:
        return Point("p", "trial", share, accuracy, Plan())

    points = mark_front([point(0.3, 0.8), point(0.1, 0.5), point(0.2, 0.5), point(0.3, 0.9), point(0.9, 0.9)])
    assert [(p.share, p.accuracy) for p in points if p.on_front] == [(0.1, 0.5), (0.3, 0.9)]


def test_smaller_budgets_of_the_best_join_the_front(model: Any) -> None:
    marks = Marks(model)
    trials = [trial_of(n, 0.5 + n / 100) for n in range(3)]
    # half of 0.9 can be reached, a quarter is less than the text alone costs
    trials[2].candidate["share"] = 0.9
    points = front_points(trials, trials[2], lambda p: marks.ask(p, PARTS[0]), marks.costs, 1, lambda text: None)
    (branch,) = [p for p in points if p.role == "branch"]
    assert 0.4 < branch.share <= 0.45
    assert [p.text for p in points if p.role == "tuned"] == ["t2"]


def test_every_single_method_is_compared_at_the_plans_cost(model: Any) -> None:
    marks, space = Marks(model), space_of(model, NAMES)
    tuned = solve_chain(marks.costs, (vtprune.Uniform(),), 0.0, 0.4)
    mine, _, rows = compare(tuned, space.singles, marks, PARTS[:2], marks.costs, 0, lambda text: None)  # type: ignore[arg-type]
    assert len(mine.scores) == 16
    by_name = {row.method: row for row in rows}
    assert set(by_name) == set(NAMES)
    assert by_name["transprune"].verdict.startswith("not possible: transprune costs at least")
    assert by_name["uniform"].verdict == "the same answers"
    for row in rows:
        if row.share is not None and row.difference is not None and row.accuracy is not None:
            assert row.share >= marks.costs.share(tuned) - 1e-9
            assert row.difference.value == pytest.approx(mine.accuracy - row.accuracy.value)
    values = [row.difference.value for row in rows if row.difference is not None]
    assert values == sorted(values)
    alone = {"dyvte": vtprune.DyVTE(exit_layer=2)}
    _, _, (row,) = compare(tuned, alone, marks, PARTS[:1], marks.costs, 0, lambda text: None)  # type: ignore[arg-type]
    assert row.verdict.endswith("but not at equal FLOPs: it decides by itself")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.2, "better"),
        (-0.2, -0.01, "worse"),
        (-0.1, 0.2, "tie"),
        (0.0, 0.2, "tie"),
        (0.0, 0.0, "the same answers"),
    ],
)
def test_verdicts_follow_the_interval(low: float, high: float, verdict: str) -> None:
    figures = 0.3, Interval(0.5, 0.4, 0.6), Interval((low + high) / 2, low, high)
    assert Compared("fastv", *figures).verdict == verdict
    assert Compared("dyvte", *figures, "but not at equal FLOPs").verdict == f"{verdict}, but not at equal FLOPs"


# everything, on a model that answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eval_helpers.save_askable(tmp_path_factory.mktemp("askable"))


@pytest.fixture(scope="module", autouse=True)
def _few_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_data, "IMAGES", 8)
        yield


class Quiet:
    """Progress that nobody watches."""

    def start(self, title: str, steps: int) -> None:
        pass

    def step(self, title: str, count: int = 1) -> None:
        pass


def settings_of(folder: Path, limit: float = 0.8) -> Settings:
    goal = Goal("flops", limit)
    return Settings(str(folder), goal, ("uniform", "fastv", "transprune"), ("vtp_scenes",), limit=8, batch_size=4)


def comparable(result: Result) -> Any:
    trials = told(result.trials)
    return trials, [chosen.found.text for chosen in result.chosen], result.points, result.held_out


def test_a_run_leaves_a_plan_that_everything_loads(folder: Path, tmp_path: Path) -> None:
    from rich.console import Console

    from vtprune.eval.keeps import parse_keeps
    from vtprune.eval.runner import Sweep, run_sweep

    result = run_tune(settings_of(folder), tmp_path / "out", 3, 4, [1, 2], Quiet())
    paths = write(result, tmp_path / "out")
    assert Plan.load(paths["plan.json"]) == result.plan
    assert json.loads(paths["plan.json"].read_text())["tuned"]["search"]["goal"] == {"kind": "flops", "limit": 0.8}
    with vtprune.prune(models.llava(), str(paths["plan.json"])) as session:
        assert session.plan == result.plan
    sweep = Sweep((str(paths["plan.json"]),), tuple(parse_keeps("1")), ("vtp_scenes",), str(folder), 4, against=None)
    rows = run_sweep(dataclasses.replace(sweep, rounds=0), Quiet())[0].rows
    assert [(row.keep, row.status) for row in rows] == [("1", "ok"), ("own", "ok")]
    assert rows[1].plan == result.plan.to_dict()

    lines = [json.loads(line) for line in paths["front.jsonl"].read_text().splitlines()]
    assert sum(line["role"] == "tuned" for line in lines) == 1
    assert any(line["on_front"] for line in lines)
    assert paths["front.png"].stat().st_size > 5000
    assert "flatters the best of many trials" in paths["front.md"].read_text()
    mine, _, rows_beside = result.held_out or (None, None, [])
    assert mine is not None
    assert len(mine.scores) == 8
    assert len(rows_beside) == 3
    # test questions of two seeds; tuning asked those of the dev split
    assert {image.split("/")[1] for image in mine.images} == {"1", "2"}
    assert all(image.split("/")[2].startswith("test-") for image in mine.images)
    screen = Console(record=True, width=120, file=(tmp_path / "screen").open("w"))
    show(result, paths, screen)
    text = screen.export_text()
    screen.file.close()
    assert "held-out questions on" in text
    assert f'vtprune.prune(model, "{paths["plan.json"]}")' in text

    # nothing is asked again, and nothing changes
    asked = (tmp_path / "out" / "answers.jsonl").read_text()
    assert comparable(run_tune(settings_of(folder), tmp_path / "out", 3, 4, [1, 2], Quiet())) == comparable(result)
    assert (tmp_path / "out" / "answers.jsonl").read_text() == asked


def test_answers_survive_a_line_that_was_cut_off(folder: Path, tmp_path: Path) -> None:
    from vtprune.eval.lmms_model import VtpruneChat
    from vtprune.loading import load_model

    path = tmp_path / "answers.jsonl"
    plan = Plan((Stage(Site("input"), vtprune.Uniform(), 0.5),))
    portion = Portion("dev", 0, 2, 3)

    def questions() -> Questions:
        return Questions(VtpruneChat(loaded=load_model(str(folder)), batch_size=4), ("vtp_scenes",), path)

    first = questions()
    full, half = first.ask(None, portion), first.ask(plan, portion)
    assert full.share == 1.0 > half.share
    assert len(full.scores) == 3
    assert all("/0/dev-" in image for image in full.images)
    text = path.read_text()
    path.write_text(text + text[:40])
    again = questions()
    assert (again.ask(None, portion), again.ask(plan, portion)) == (full, half)
    assert path.read_text() == text
    assert len(join([full, half]).scores) == 6
    with pytest.raises(InputError, match=r"task 'vtp_scenes' has \d+ questions, and 903 are needed"):
        again.require([Portion("dev", 0, 900, 3)])


def test_a_limit_that_text_alone_exceeds_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--flops 0\.1 cannot be reached: with one visual token left, text alone"):
        run_tune(settings_of(folder, 0.1), tmp_path, 0, 0, [], Quiet())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("", "give exactly one of --flops"),
        ("--flops 0.3 --latency 0.5", "got --flops 0.3, --latency 0.5"),
        ("--accuracy 0", "--accuracy must be a share in"),
        ("--flops 0.3 --limit 10", "--limit must be a multiple of 4"),
        ("--flops 0.3 --methods fastw", "Did you mean 'fastv'"),
        ("--flops 0.3 --methods fastv(layer=2)", "--methods takes names, whose knobs are searched"),
        ("--flops 0.3 --held-out-seeds x", "--held-out-seeds must be numbers from 0 on"),
        ("--flops 0.3 --tasks vtp_scnes --limit 4", "Unknown task 'vtp_scnes'"),
    ],
)
def test_bad_options_end_with_a_message(arguments: str, match: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["tune", *arguments.split(), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert match in " ".join((result.output + result.stderr).split())


def test_optuna_that_is_missing_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(VtpruneError, match=r"pip install 'vtprune\[tune,eval\]'"):
        require_optuna()


@pytest.mark.parametrize("path", sorted(TUNED.glob("*.json")), ids=lambda path: path.stem)
def test_committed_plans_run_on_their_model_at_their_cost(path: Path) -> None:
    search = json.loads(path.read_text(encoding="utf-8"))["tuned"]["search"]
    loaded, _ = vtprune.load_tiny(search["model"].removeprefix("tiny:"))
    with vtprune.prune(loaded, str(path)) as session:
        geometry = session.geometry
    costs = Costs(geometry, [((16, geometry.visual_tokens),)])
    assert costs.share(Plan.load(path)) == pytest.approx(search["goal"]["limit"], abs=0.01)


@pytest.mark.slow
def test_a_killed_command_goes_on(folder: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the trials, then the same command: the trials and the plan of an undisturbed run."""

    def start(out: Path) -> subprocess.Popen[bytes]:
        options = f"--model {folder} --flops 0.8 --methods uniform,fastv,divprune --tasks vtp_scenes --limit 40"
        command = [*options.split(), "--trials", "6", "--held-out", "4", "--batch-size", "4", "--out", str(out)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "vtprune", "tune", *command], env=environment, stdout=subprocess.DEVNULL
        )

    def lines(out: Path) -> int:
        answers = out / "answers.jsonl"
        return len(answers.read_text().splitlines()) if answers.is_file() else 0

    def state(out: Path) -> Any:
        settings = json.loads((out / "plan.json").read_text())["tuned"]["search"]
        with open_study(out, settings) as study:
            return told(found_of(study)), (out / "plan.json").read_text(), (out / "front.jsonl").read_text()

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait() == 0
    run = start(broken)
    # 4 lines are the unpruned model's, 12 those of single methods
    for _ in itertools.takewhile(lambda _: lines(broken) < 18 and run.poll() is None, itertools.count()):
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (broken / "plan.json").exists()
    before = lines(broken)
    assert start(broken).wait() == 0
    assert lines(broken) > before >= 18
    assert state(broken) == state(whole)
