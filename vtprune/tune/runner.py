"""One run of `vtprune tune`: load, search, validate, compare."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.errors import InputError
from vtprune.plan import Plan, Site, Stage
from vtprune.progress import Progress
from vtprune.tune.budgets import Costs
from vtprune.tune.choose import Chosen, Compared, Point, choose, compare, finalists, front_points
from vtprune.tune.goal import Goal
from vtprune.tune.questions import Answered, Portion, Questions, join
from vtprune.tune.search import Found, Search, found_of, open_study
from vtprune.tune.space import Space

if TYPE_CHECKING:
    pass

__all__ = ["PARTS", "Result", "Settings", "run_tune"]

PARTS = 4
"""Parts of the tuning questions; a trial can be stopped after each."""
_BRANCHES = 3


@dataclass(frozen=True)
class Settings:
    """What a search is made of; a folder holds one search, and goes on with these settings only.

    Attributes:
        model: what `vtprune.loading.load_model` accepts.
        goal: what counts.
        methods: names of registered methods.
        tasks: lmms-eval task names.
        limit: questions a task to tune on; as many others to validate on.
        seed: of the sampler and of the bundled tasks' questions.
        batch_size: questions a call.
        device, dtype, attn_implementation: for loading.

    Raises:
        InputError: if `limit` is not a multiple of 4 from 4 on.
    """

    model: str
    goal: Goal
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    limit: int = 120
    seed: int = 0
    batch_size: int = 16
    device: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if self.limit < PARTS or self.limit % PARTS:
            raise InputError(f"--limit must be a multiple of {PARTS}, such as 120 questions a task, got {self.limit}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "methods": list(self.methods), "tasks": list(self.tasks)}


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        settings: of the search.
        trials: finished, in order.
        chosen: the finalists, the tuned plan first.
        points: accuracy against FLOPs on the tuning questions.
        unpruned: accuracy of the unpruned model there.
        skipped: why methods were left out, by name.
        held_out: the tuned plan's and the unpruned model's answers, and each single method beside the plan; None if
            there was no comparison.
        run: versions, device and dtype.
    """

    settings: Settings
    trials: list[Found]
    chosen: list[Chosen]
    points: list[Point]
    unpruned: float
    skipped: dict[str, str]
    held_out: tuple[Answered, Answered, list[Compared]] | None
    run: dict[str, Any]

    @property
    def plan(self) -> Plan:
        """The tuned plan."""
        return self.chosen[0].found.plan or Plan()


def run_tune(
    settings: Settings, out: Path, trials: int, held_out: int, held_out_seeds: Sequence[int], progress: Progress
) -> Result:
    """Search, or go on with the search in `out`.

    Args:
        settings: what to search.
        out: folder of the study.
        trials: behind those of the single methods.
        held_out: questions a task and seed for the comparison, 0 for none.
        held_out_seeds: of the test questions; tasks with one split have the same ones under every seed.
        progress: told what is done.

    Raises:
        VtpruneError: if something is missing or not known, the folder holds another search, or nothing can be asked.
    """
    from vtprune.eval.harness import require_lmms_eval

    require_lmms_eval()
    from vtprune.eval.runner import environment, load_chat

    parts, validation, test = _portions(settings, held_out, held_out_seeds)
    out.mkdir(parents=True, exist_ok=True)
    with open_study(out, settings.to_dict()) as study:
        progress.start("loading lmms-eval, tasks and model", 1)
        lm = load_chat(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            batch_size=settings.batch_size,
        )
        questions = Questions(lm, settings.tasks, out / "answers.jsonl")
        questions.require([parts[-1], validation, *test])
        progress.step("loaded")
        progress.start("unpruned model", len(parts))
        unpruned = []
        for part in parts:
            unpruned.append(questions.ask(None, part))
            progress.step("unpruned model")
        costs = Costs(questions.geometry, join(unpruned).batches)
        space = _space(settings, costs, questions)
        goal, timed = settings.goal, functools.partial(questions.timed, portion=parts[0])
        search = Search(study, space, costs, questions, goal, parts, unpruned, settings.seed, timed)
        progress.start("trials", len(search.first) + trials)
        progress.step("trials", len(found_of(study)))
        search.run(trials, progress.step)
        found = found_of(study)
    progress.start("validation", len(finalists(found)))
    chosen = choose(found, questions, settings.goal, validation, progress.step)
    branches = _BRANCHES if settings.goal.kind == "flops" else 0
    progress.start("smaller budgets of the best", 2 * branches)

    def ask_tuning(plan: Plan) -> Answered:
        return join([questions.ask(plan, part) for part in parts])

    points = front_points(found, chosen[0].found, ask_tuning, costs, branches, progress.step)
    compared = None
    if held_out:
        progress.start("held-out comparison", len(space.singles))
        plan = chosen[0].found.plan or Plan()
        compared = compare(plan, space.singles, questions, test, costs, settings.seed, progress.step)
    full, run = join(unpruned).accuracy, environment(questions.lm.model)
    return Result(settings, found, chosen, points, full, space.skipped, compared, run)


def _portions(settings: Settings, held_out: int, seeds: Sequence[int]) -> tuple[list[Portion], Portion, list[Portion]]:
    """Tuning questions in parts, validation questions, held-out questions of each seed."""
    from vtprune.eval import BUNDLED_TASKS

    limit, size = settings.limit, settings.limit // PARTS
    parts = [Portion("dev", settings.seed, place * size, size) for place in range(PARTS)]
    validation = Portion("dev", settings.seed, limit, limit)
    bundled = all(task in BUNDLED_TASKS for task in settings.tasks)
    # a task with one split has the same documents under every seed: those behind what was tuned on
    first = 0 if bundled else 2 * limit
    used = seeds if bundled else seeds[:1]
    return parts, validation, [Portion("test", seed, first, held_out) for seed in used if held_out]


def _space(settings: Settings, costs: Costs, questions: Questions) -> Space:
    from vtprune.contract import METHODS

    total = costs.geometry.visual_tokens
    floor = costs.share(Plan((Stage(Site("input"), METHODS["uniform"](), 1.0 / total),)))
    goal = settings.goal
    if goal.kind == "flops" and goal.limit < floor:
        raise InputError(
            f"--flops {goal.limit:g} cannot be reached: with one visual token left, text alone costs {floor:.3f} of "
            "the unpruned prefill. Ask for more."
        )
    low, high = (goal.limit, goal.limit) if goal.kind == "flops" else (floor, 1.0)
    model = questions.lm.model
    return Space(settings.methods, costs.geometry, lambda method: method.bind(model), questions.attach, low, high)
