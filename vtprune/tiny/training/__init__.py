"""Trains the embedded tiny LLaVA from nothing: `python -m vtprune.tiny.training --out DIR --seed 0`."""
