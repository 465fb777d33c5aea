"""Learned methods with untrained weights, so that they join the contract tests of all methods."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from typing import Any

import torch

from vtprune.budget import scale_depth
from vtprune.contract import METHODS, Scorer
from vtprune.predictors import ExitGates, Fingerprint, Predictor, RelevanceNet, Thresholds
from vtprune.scorers.learned import LearnedScorer

BUDGETED = sorted(name for name, cls in METHODS.items() if cls.takes_budget)
# those that can prune a still image
IN_STILLS = [name for name in BUDGETED if name != "evs"]
# as deep as scorer_views.LLAVA
_NOBODY = Fingerprint("nobody", 32, 16)


def untrained(kind: str, fingerprint: Fingerprint) -> Predictor:
    """A small predictor of random weights."""
    torch.manual_seed(7)
    given = fingerprint.to_dict()
    if kind == "dyvte":
        return ExitGates(given, fingerprint.layers, fingerprint.hidden, width=3)
    if kind == "atp":
        after = tuple(k - 1 for k in scale_depth((5, 15, 25), 32, fingerprint.layers))
        return Thresholds(given, after=after, width=4)
    if kind == "relevance":
        return RelevanceNet(given, channels=(3, 5), kernel=3)
    raise AssertionError(f"teach untrained() to make a predictor for {kind}")


@lru_cache
def weights(kind: str, fingerprint: Fingerprint) -> str:
    """Folder of an untrained predictor."""
    state = torch.get_rng_state()
    folder = tempfile.mkdtemp(prefix=f"vtprune-{kind}-")
    untrained(kind, fingerprint).save_pretrained(folder)
    torch.set_rng_state(state)
    return folder


def ready(name: str, model: Any = None) -> Scorer:
    """A method as it runs on `model`, or on no model at all."""
    cls = METHODS[name]
    if not issubclass(cls, LearnedScorer):
        return cls()
    return cls(weights=weights(name, _NOBODY if model is None else Fingerprint.of(model)))
