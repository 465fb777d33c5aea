"""vtprune: prune the visual tokens of Hugging Face vision-language models, exactly.

session = vtprune.prune(model, "fastv", keep=0.25)
out = model.generate(**inputs)
print(session.report)
session.remove()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vtprune.budget import Budget, Geometry
    from vtprune.contract import Scorer
    from vtprune.draw import draw_kept
    from vtprune.errors import BudgetError, InputError, PlanError, UnsupportedModelError, VtpruneError
    from vtprune.hooks import Session, geometry, prune
    from vtprune.hooks.verified import FamilyInfo
    from vtprune.hooks.verify import Verification, verify
    from vtprune.layout import Layout
    from vtprune.plan import Plan, Site, Stage
    from vtprune.recipe import Recipe
    from vtprune.report import Report
    from vtprune.scorers.replay import replay
    from vtprune.tiny import load_tiny

__all__ = [
    "Budget",
    "BudgetError",
    "FamilyInfo",
    "Geometry",
    "InputError",
    "Layout",
    "Plan",
    "PlanError",
    "Recipe",
    "Report",
    "Scorer",
    "Session",
    "Site",
    "Stage",
    "UnsupportedModelError",
    "Verification",
    "VtpruneError",
    "__version__",
    "draw_kept",
    "families",
    "geometry",
    "load_tiny",
    "methods",
    "prune",
    "replay",
    "verify",
]

# torch and transformers are imported when a name that needs them is first used, so that `vtprune --help` is quick
_HOMES = {
    "Budget": "vtprune.budget",
    "BudgetError": "vtprune.errors",
    "FamilyInfo": "vtprune.hooks.verified",
    "Geometry": "vtprune.budget",
    "InputError": "vtprune.errors",
    "Layout": "vtprune.layout",
    "Plan": "vtprune.plan",
    "Recipe": "vtprune.recipe",
    "PlanError": "vtprune.errors",
    "Report": "vtprune.report",
    "Scorer": "vtprune.contract",
    "Session": "vtprune.hooks",
    "Site": "vtprune.plan",
    "Stage": "vtprune.plan",
    "UnsupportedModelError": "vtprune.errors",
    "Verification": "vtprune.hooks.verify",
    "VtpruneError": "vtprune.errors",
    "draw_kept": "vtprune.draw",
    "geometry": "vtprune.hooks",
    "load_tiny": "vtprune.tiny",
    "prune": "vtprune.hooks",
    "replay": "vtprune.scorers.replay",
    "verify": "vtprune.hooks.verify",
}


def methods() -> dict[str, str]:
    """Registered methods: name to one-line summary."""
    from vtprune.contract import METHODS

    return {name: cls.summary for name, cls in METHODS.items()}


def families() -> dict[str, FamilyInfo]:
    """Supported architecture families: what each serves, and how that was verified."""
    from vtprune.hooks.verified import family_infos
    from vtprune.tiny import tiny_model_types

    return family_infos(tiny_model_types())


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name[:1].isupper():
        from vtprune.contract import METHODS
        from vtprune.rules import REMAINDERS, SELECTIONS

        # classes of methods and rules are public under their class name: vtprune.FastV, vtprune.DPP
        for registry in (METHODS, SELECTIONS, REMAINDERS):
            for _, cls in registry.items():
                if cls.__name__ == name:
                    return cls
    raise AttributeError(f"module 'vtprune' has no attribute {name!r}")
