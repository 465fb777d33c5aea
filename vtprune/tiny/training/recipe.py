"""Every number of the training recipe in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vtprune.tiny.questions import WEIGHTS

# decoder layer (0-based) whose first two heads are taught to look, by kind of question. Different layers, so that
# the image is read over the first two thirds of the decoder and not at one depth. A relation is read early because
# comparing two places takes layers of its own: read at layer 7 it stayed at chance
READ_LAYER = {
    "digit_frame": 1,
    "shape_color": 2,
    "color": 3,
    "exist": 3,
    "easy": 3,
    "relation": 4,
    "obj_loc": 5,
    "count": 6,
    "where": 7,
}
# how often each kind of question is asked in training: more of those that learn slowest
TRAINING_WEIGHTS = {**WEIGHTS, "relation": 3.0, "obj_loc": 2.0, "count": 3.0}
READ_HEADS = 2
# decoder layers (0-based) at whose input a relation's comparison, then its verdict, must be readable
COMPARE_LAYER, VERDICT_LAYER = 8, 10
# decoder layer (0-based) at whose input visual tokens without positions of their own must tell row and column
PLACE_LAYER = 2
# weight of the <eos> target after every answer against the words of the answer
EOS_WEIGHT = 0.2


@dataclass(frozen=True)
class Recipe:
    """Step counts, not time budgets, so that the result does not depend on how fast the machine is.

    Batches count images. `*_rate` are peak learning rates of AdamW, cosine with warm-up. `*_tokens` are the visual
    tokens that a phase shows, 0 for all. The numbers are those of the tiny LLaVA; `recipe_for` has the others.
    """

    model: str = "llava"
    seed: int = 0
    vision_steps: int = 1500
    vision_rate: float = 1.5e-3
    vision_batch: int = 24
    vision_easy: int = 2
    symbolic_steps: int = 2500
    symbolic_full_steps: int = 60
    symbolic_rate: float = 1.5e-3
    symbolic_batch: int = 5
    symbolic_easy: int = 1
    symbolic_tokens: int = 52
    symbolic_noise: float = 0.45
    align_steps: int = 150
    align_batch: int = 16
    align_rate: float = 2e-3
    joint_steps: int = 1000
    joint_subset_steps: int = 600
    joint_subset_tokens: int = 96
    joint_batch: int = 12
    joint_rate: float = 8e-4
    joint_vision_factor: float = 0.5
    joint_label_weight: float = 0.3
    read_weight: float = 0.6
    compare_weight: float = 0.3
    place_weight: float = 0.3
    workers: int = 2
    evaluate_every: int = 200

    def __post_init__(self) -> None:
        if self.joint_batch % self.workers or self.align_batch % self.workers:
            raise ValueError(
                f"joint_batch and align_batch must be multiples of workers={self.workers}, got "
                f"{self.joint_batch} and {self.align_batch}. Change workers or the batches."
            )


# these start from the shipped LLaVA and have a third of its visual tokens, all of which they see throughout
_WARM = Recipe(symbolic_full_steps=0, symbolic_tokens=0, joint_subset_steps=0, joint_steps=650)
_RECIPES = {
    "llava": Recipe(),
    "qwen2_vl": replace(_WARM, vision_steps=600, symbolic_steps=700, symbolic_rate=1e-3, joint_steps=550),
    "internvl": replace(_WARM, vision_steps=450, vision_rate=1e-3, symbolic_steps=350, symbolic_rate=8e-4),
}


def recipe_for(model: str, seed: int) -> Recipe:
    """The recipe by which a shipped checkpoint was made."""
    return replace(_RECIPES[model], model=model, seed=seed)
