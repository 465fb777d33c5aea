"""The engine: hooks that shorten what a Hugging Face VLM computes on, and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtprune.budget import Geometry
from vtprune.errors import UnsupportedModelError
from vtprune.hooks.families.base import family_of
from vtprune.hooks.planner import Methods, Planner
from vtprune.hooks.proof import prove
from vtprune.hooks.quantised import check_quantised
from vtprune.hooks.session import Session
from vtprune.hooks.validate import check_plan

__all__ = ["Session", "geometry", "prune", "without_adapters"]


def without_adapters(model: Any) -> Any:
    """Adapters (PEFT) wrap the model they train; the hooks go on the model itself."""
    wrapped = getattr(model, "get_base_model", None)
    return model if wrapped is None else wrapped()


def geometry(model_or_config: Any) -> Geometry:
    """The shape of a model (with a prompt of one image), from the model or from its config alone.

    Raises:
        UnsupportedModelError: if no family serves it.
    """
    config = getattr(model_or_config, "config", model_or_config)
    return family_of(config).geometry(config)


def prune(
    model: nn.Module,
    method: Methods,
    keep: int | float | str | list[int | float | str] | None = None,
    *,
    basis: str = "average",
    flops: float | None = None,
    record_scores: bool = False,
) -> Session:
    """Attach pruning to a Hugging Face VLM. The model is changed in place until `session.remove()`.

    Args:
        model: a `transformers` vision-language model of a supported family (`vtprune.families()`). One that no family
            names is tried on a dry call first, which costs a few short forward passes.
        method: a name (`vtprune.methods()`), with knobs if need be ("gemfilter(layer=3)") and with other rules than its
            own ("flowcut/dpp/nearest": a DPP of its score, the rest averaged into the nearest survivor), several joined
            by `+`, those but the last with a budget of their own ("flowcut@1/2+fastv"), a method object, a list of
            names and objects applied in order, a `Plan`, or the file of a saved one ("plan.json").
        keep: visual tokens that enter a decoder layer, averaged over the layers: an int is tokens a sample, a float in
            (0, 1] or a string such as "25%" a fraction. `keep=1.0` keeps all and changes nothing. With a list of
            methods a list of budgets, each for what the methods so far leave (with a chain, one for each method in it
            that has none of its own).
        basis: "average" over the decoder layers, or "final": what survives the last stage.
        flops: instead of `keep`, the share of the unpruned decoder prefill FLOPs to spend.
        record_scores: keep each stage's scores in the report (in the tower where the host lays its outputs into the
            prompt in their order, see `vtprune.hooks.tower_scores`).

    Returns:
        the session: handle and context manager.

    Raises:
        UnsupportedModelError: if no family serves the model, its dry call failed, or its linears are quantised in a
            way that ties tokens together.
        UnknownNameError: if a method name is not registered.
        BudgetError: if the budget is malformed or out of the method's reach.
        UntrainedError: if a learned method has no weights for this model.
        CheckpointError: if its weights cannot be read, or were trained for another model.
        PlanError: if the stages cannot run in this order on this model.
        SessionError: if the model is already pruned.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UnsupportedModelError(f"model must be a transformers model, got {type(model).__name__}.")
    model = without_adapters(model)
    family = family_of(model.config)(model)
    shape = family.own_geometry()
    planner = Planner(shape, method, keep, basis, flops, lambda m: m.bind(model))
    check_plan(planner.nominal, shape)
    if not planner.inactive:
        check_quantised(family.parts().root)
        if family.proves_itself:
            prove(model, family, shape, planner.nominal)
    return Session(model, planner, family, record_scores=record_scores)
