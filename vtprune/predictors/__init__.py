"""Learned predictors: small modules that methods load and `vtprune train` makes, and their checkpoints."""

from __future__ import annotations

from vtprune.predictors.atp import Thresholds
from vtprune.predictors.checkpoint import Predictor, load_predictor, shipped_weights
from vtprune.predictors.dyvte import ExitGates
from vtprune.predictors.fingerprint import Fingerprint
from vtprune.predictors.relevance import RelevanceNet

__all__ = [
    "ExitGates",
    "Fingerprint",
    "Predictor",
    "RelevanceNet",
    "Thresholds",
    "load_predictor",
    "shipped_weights",
]
