"""Every number by which the tiny Qwen2-VL Plus was trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from vtprune.tiny.training.recipe import READ_LAYER

# decoder layer (0-based) whose first two heads are taught to look; the rest as for the tiny Qwen2-VL
READ_LAYERS = {
    **READ_LAYER,
    "read": 2,
    "ink": 3,
    "gap": 2,
    "color_in": 5,
    "which": 5,
    "more": 6,
    "motion": 3,
    "change": 4,
}
# decoder layer at whose input visual tokens must tell in which picture, or at which moment, they stand
ORDINAL_LAYER = 3


@dataclass(frozen=True)
class PlusRecipe:
    """Step counts, not time budgets. `pictures` are exercises of each task a step, "scenes" the old questions.

    After `tower_at` steps the tower alone learns to tell words apart for `tower_steps`, then all goes on together.
    The rate follows a cosine over `schedule` steps, and from `rounded_from` on falls to nothing at `steps`; from there
    on factors are also rounded as they will be stored.
    """

    seed: int = 0
    schedule: int = 800
    steps: int = 560
    rate: float = 2e-3
    warmup: int = 30
    tower_at: int = 200
    tower_steps: int = 250
    tower_rate: float = 2e-3
    hold_weight: float = 1.0
    tower_rank: int = 12
    decoder_rank: int = 6
    pictures: dict[str, int] = field(
        default_factory=lambda: {"words": 4, "gaps": 2, "pairs": 2, "films": 4, "scenes": 2}
    )
    read_weight: float = 0.6
    look_weight: float = 0.5
    ordinal_weight: float = 0.3
    # from `tower_at` on: fewer of what is learnt
    later_pictures: dict[str, int] = field(
        default_factory=lambda: {"words": 4, "gaps": 1, "pairs": 3, "films": 4, "scenes": 2}
    )
    tower_pictures: dict[str, int] = field(default_factory=lambda: {"words": 12, "gaps": 2, "films": 6, "scenes": 2})
    rounded_from: int = 440
    evaluate_every: int = 100
    save_every: int = 50
