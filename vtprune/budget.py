"""Budgets, the geometry they are solved on, and the solver.

The one unit in which methods that cut at different depths compare: the number of visual tokens that enter a decoder
layer, averaged over the decoder layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from vtprune.errors import BudgetError, PlanError
from vtprune.plan import Plan

__all__ = ["Basis", "Budget", "Geometry", "VisionGeometry", "decoder_layer", "parse_keep", "scale_depth", "solve"]

Basis = Literal["average", "final", "flops"]


@dataclass(frozen=True)
class VisionGeometry:
    """The vision tower: what its cost and its schedules depend on.

    Attributes:
        blocks: transformer blocks.
        feature_block: 0-based index of the block whose output the projector reads; a `vision[k]` cut needs
            k <= feature_block, and with k = feature_block saves nothing in the tower.
        hidden, heads, intermediate: widths.
        has_cls: a CLS token stands before the patches.
        patches: patches of one input of the tower (an image, a crop or a frame), of the example where sizes differ.
        patch_dim: values in one patch (channels x frames x patch height x patch width).
        projector: widths of the linear layers that only what is left after the tower passes, input first.
        cell: patches that become one visual token.
        mlp_matrices: of a block; 3 where a gate has one of its own.
        merger: widths of the linear layers that every token passes, also if it has left, because the host needs the
            whole grid there.
        taps: blocks whose output passes a copy of the projector as well (DeepStack).
        full_blocks: blocks that attend to the whole image where the others attend in windows; None if all do.
    """

    blocks: int
    feature_block: int
    hidden: int
    heads: int
    intermediate: int
    has_cls: bool
    patches: int
    patch_dim: int
    projector: tuple[int, ...]
    cell: int = 1
    mlp_matrices: int = 2
    merger: tuple[int, ...] = ()
    taps: tuple[int, ...] = ()
    full_blocks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Geometry:
    """The decoder's shape and one prompt's size: all that a schedule or a cost depends on.

    Attributes:
        family: name of the family.
        layers, hidden, heads, kv_heads, head_dim, intermediate: the decoder.
        visual_tokens: of the sample (of one image, before a prompt is known).
        text_tokens: of the sample, special tokens included.
        images: number of images the visual tokens come from.
        vision: the tower, or None if the family gives no access to it.
        dynamic: images differ in their number of tokens; `visual_tokens` is then only an example until a prompt comes.
        deepstack: after how many of the first decoder layers the host adds visual features again.
        rotary_axes: 3 where a token has a time, a row and a column for rotary position (M-RoPE), else 1.
        windows: sliding window of each decoder layer, None where it attends to everything; () if none can slide.
        notes: what is assumed about the model, for reports.
        entering: visual tokens that enter each decoder layer before the method at hand acts; () means all.
        opening: visual tokens that lie where no earlier frame of their film has one: all of still images, the first
            frame of each video. None means all.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    visual_tokens: int
    text_tokens: int = 64
    images: int = 1
    vision: VisionGeometry | None = None
    dynamic: bool = False
    deepstack: int = 0
    rotary_axes: int = 1
    windows: tuple[int | None, ...] = ()
    notes: tuple[str, ...] = ()
    entering: tuple[int, ...] = ()
    opening: int | None = None

    def __post_init__(self) -> None:
        if not self.entering:
            object.__setattr__(self, "entering", (self.visual_tokens,) * self.layers)

    def for_prompt(self, visual_tokens: int, text_tokens: int, images: int, *, opening: int | None = None) -> Geometry:
        """The same model with another prompt, of still images unless `opening` says otherwise."""
        return dataclasses.replace(
            self,
            visual_tokens=visual_tokens,
            text_tokens=text_tokens,
            images=images,
            entering=(),
            opening=opening,
        )

    @property
    def fresh_tokens(self) -> int:
        """`opening` as a number."""
        return self.visual_tokens if self.opening is None else self.opening

    def after(self, plan: Plan) -> Geometry:
        """The same prompt as a later method finds it, once `plan` has acted."""
        return dataclasses.replace(self, entering=plan.tokens_per_layer(self.entering, self.visual_tokens))


def parse_keep(keep: int | float | str) -> int | float:
    """Read a budget: an int >= 1 is tokens, a float in (0, 1] a fraction, `"25%"` / `"64"` / `"0.25"` the same as text.

    Raises:
        BudgetError: on anything else, with what was given.
    """
    legal = "an int >= 1 (tokens), a float in (0, 1] (fraction) or a string such as '25%'"
    value: int | float
    if isinstance(keep, str):
        text = keep.strip()
        try:
            if text.endswith("%"):
                value = float(text[:-1]) / 100
            elif "/" in text:
                above, below = text.split("/", 1)
                value = float(above) / float(below)
            else:
                value = float(text) if any(c in text for c in ".eE") else int(text)
        except (ValueError, ZeroDivisionError) as error:
            raise BudgetError(f"keep must be {legal}, got {keep!r}.") from error
    else:
        value = keep
    # callers without a type checker pass anything here
    if isinstance(value, bool) or not isinstance(value, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise BudgetError(f"keep must be {legal}, got {keep!r} ({type(keep).__name__}).")
    if isinstance(value, float) and not (math.isfinite(value) and 0.0 < value <= 1.0):
        hint = f" For {int(value)} tokens write the int {int(value)}." if math.isfinite(value) and value > 1 else ""
        raise BudgetError(f"keep must be {legal}, got {keep!r}.{hint}")
    if isinstance(value, int) and value < 1:
        raise BudgetError(f"keep must be {legal}, got {keep!r}.")
    return value


@dataclass(frozen=True)
class Budget:
    """How much of the visual tokens a method may spend.

    Attributes:
        value: tokens (int) or share (float); None leaves it to an adaptive method.
        basis: `average` over the decoder layers, `final` after the last stage, or `flops` (share of the unpruned
            decoder prefill).
    """

    value: int | float | None
    basis: Basis = "average"

    @classmethod
    def make(
        cls, keep: int | float | str | None = None, *, basis: str = "average", flops: float | None = None
    ) -> Budget:
        """Validate what the user wrote.

        Raises:
            BudgetError: if `keep` is malformed, both `keep` and `flops` are given, or `basis` is unknown.
        """
        if basis not in ("average", "final"):
            raise BudgetError(f"basis must be 'average' or 'final' (or pass flops=0.3), got {basis!r}.")
        if flops is not None:
            if keep is not None:
                raise BudgetError(f"give keep or flops, not both, got keep={keep!r} and flops={flops!r}.")
            # callers without a type checker pass anything here
            number = isinstance(flops, (int, float))  # pyright: ignore[reportUnnecessaryIsInstance]
            if not number or isinstance(flops, bool) or not 0.0 < flops <= 1.0:
                raise BudgetError(f"flops must be a share in (0, 1] of the unpruned prefill, got {flops!r}.")
            return cls(float(flops), "flops")
        return cls(None if keep is None else parse_keep(keep), basis)  # type: ignore[arg-type]

    def is_all(self, total: int) -> bool:
        """True if the budget asks for every token (keep=1.0, or keep equal to the number of tokens)."""
        return (isinstance(self.value, float) and self.value == 1.0) or (
            isinstance(self.value, int) and self.value == total
        )

    def __str__(self) -> str:
        if self.value is None:
            return "adaptive"
        amount = f"{self.value:.4g} of the" if isinstance(self.value, float) else f"{self.value}"
        what = "unpruned prefill FLOPs" if self.basis == "flops" else "visual tokens"
        how = {"average": " averaged over the decoder layers", "final": " after the last stage", "flops": ""}[
            self.basis
        ]
        return f"{amount} {what}{how}"


def scale_depth(layers: Sequence[int], of: int, depth: int) -> tuple[int, ...]:
    """Move a paper's layer numbers to a model of another depth: nearest layer, at least 1, order kept.

    Args:
        layers: the paper's layers, increasing.
        of: depth of the paper's model.
        depth: depth of the model at hand; the results stay below it.
    """
    scaled: list[int] = []
    for layer in layers:
        at = max(1, math.floor(layer * depth / of + 0.5))
        scaled.append(min(depth - 1, max(at, scaled[-1] + 1 if scaled else 1)))
    return tuple(scaled)


def decoder_layer(method: str, layer: int | None, paper: tuple[int, int], depth: int, *, lowest: int = 1) -> int:
    """A method's `layer` knob on a decoder of `depth` layers; None scales the paper's (layer, depth).

    Raises:
        PlanError: if it is not one of the model's layers from `lowest` on.
    """
    at = scale_depth((paper[0],), paper[1], depth)[0] if layer is None else layer
    if not lowest <= at < depth:
        raise PlanError(
            f"{method} layer must be in [{lowest}, {depth - 1}] ({depth} decoder layers), got {at}. "
            "Lower it, or leave it None."
        )
    return at


def solve(
    build: Callable[[int], Plan], geometry: Geometry, budget: Budget, *, method: str, knob: str | None = None
) -> Plan:
    """The plan of the family `build(n)`, n = 1..V, whose cost comes nearest to the budget.

    Args:
        build: plan for n survivors; its cost must not fall as n grows. `build(V)` keeps all.
        geometry: model and prompt.
        budget: what to reach.
        method: name for messages.
        knob: which knob lowers the floor, for messages, e.g. "layer"; None if none does.

    Raises:
        BudgetError: if even n = 1 costs more than the budget, or `keep` exceeds the prompt's visual tokens.
    """
    from vtprune.cost import plan_cost

    total = geometry.visual_tokens
    if budget.value is None:
        raise BudgetError(f"{method} needs a budget: pass keep=64 (tokens), keep=0.25 (a fraction) or flops=0.3.")
    if isinstance(budget.value, int) and budget.value > total:
        raise BudgetError(f"keep must be in [1, {total}], got {budget.value} ({total} visual tokens in the prompt).")
    if budget.is_all(total) or total == 0:
        return build(max(1, total))
    share = isinstance(budget.value, float) and budget.basis != "flops"
    target = budget.value * total if share else float(budget.value)

    low, high = 1, max(geometry.entering)
    while low < high:  # the smallest n whose cost reaches the target
        middle = (low + high) // 2
        if plan_cost(build(middle), geometry, budget.basis) < target:
            low = middle + 1
        else:
            high = middle
    best = min(
        (build(n) for n in {max(1, low - 1), low}),
        key=lambda plan: abs(plan_cost(plan, geometry, budget.basis) - target),
    )
    cost = plan_cost(best, geometry, budget.basis)
    slack = 0.02 if budget.basis == "flops" else 1.0
    if cost > target + slack:
        floor = plan_cost(build(1), geometry, budget.basis)
        unit = "of the prefill FLOPs" if budget.basis == "flops" else f"of {total} visual tokens"
        raise BudgetError(
            f"{method} cannot reach {target:.4g} {unit} ({budget}): its schedule costs at least {floor:.4g}. "
            f"Ask for {floor:.4g} or more{f', or change the knob {knob!r}' if knob else ''}.",
            floor=floor,
        )
    return best
