"""Learned predictors: small modules that methods load and `vtprune train` makes, and their checkpoints."""

from __future__ import annotations

from vtprune.predictors.atp import Thresholds
from vtprune.predictors.checkpoint import Predictor, load_predictor, shipped_weights
from vtprune.predictors.dyvte import ExitGates
from vtprune.predictors.fingerprint import Fingerprint

__all__ = ["ExitGates", "Fingerprint", "Predictor", "Thresholds", "load_predictor", "shipped_weights"]
