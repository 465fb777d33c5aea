"""The demo's functions for programs: JSON in, JSON out, through `gradio_client`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from vtprune.demo.ask import race
from vtprune.demo.media import read_question
from vtprune.demo.models import Models
from vtprune.demo.result import result_of
from vtprune.demo.settings import Settings
from vtprune.demo.stability import KEEPS, stability
from vtprune.errors import VtpruneError

__all__ = ["Api"]


class Api:
    """The functions over the models that the demo offers. Each raises `gr.Error` with vtprune's own message."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def models(self) -> list[str]:
        """The models that can be asked; the first is the usual one."""
        return list(self._models.specs)

    def methods(self) -> dict[str, str]:
        """The pruning methods: name to one-line summary."""
        import vtprune

        return vtprune.methods()

    def plan(
        self,
        model: str,
        method: str = "flowcut",
        keep: str = "25%",
        first: str = "",
        first_keep: str = "50%",
        basis: str = "average",
    ) -> dict[str, Any]:
        """The plan of a prompt with one picture: stages, visual tokens a decoder layer, share of the prefill FLOPs."""
        from vtprune.cost import plan_cost

        try:
            settings = Settings(model, "", "", method, keep, first, first_keep, basis=basis)
            session = settings.runs()[0].attach(self._models[model].copy())
        except VtpruneError as error:
            raise _said(error) from error
        geometry = session.geometry
        return {
            "plan": session.plan.to_dict(),
            "visual_tokens": geometry.visual_tokens,
            "average_tokens": plan_cost(session.plan, geometry, "average"),
            "flops_share": plan_cost(session.plan, geometry, "flops"),
        }

    def ask(
        self,
        files: Sequence[str] | None,
        question: str,
        model: str,
        method: str,
        keep: str,
        first: str,
        first_keep: str,
        beside: str,
        basis: str,
        max_new_tokens: float,
    ) -> dict[str, Any]:
        """One question, unpruned and pruned: see `vtprune.demo.result.result_of`."""
        try:
            settings = Settings(
                model or self._models.specs[0],
                "",
                question or "",
                method or "",
                keep or "",
                first or "",
                first_keep or "",
                beside or "",
                basis,
                int(max_new_tokens),
            )
            loaded = self._models[settings.model]
            runs = settings.runs()
            asked = read_question(loaded.model, loaded.reads_videos, settings.question, _paths(files))
            *_, last = race(loaded, asked, runs, settings.max_new_tokens)
        except VtpruneError as error:
            raise _said(error) from error
        return result_of(last, settings)

    def stability(
        self, files: Sequence[str] | None, question: str, model: str, method: str, keeps: str, max_new_tokens: float
    ) -> list[dict[str, Any]]:
        """How likely the unpruned answer stays as the budget shrinks: one entry a budget (see `Point`)."""
        try:
            settings = Settings(
                model or self._models.specs[0],
                question=question or "",
                method=method,
                max_new_tokens=int(max_new_tokens),
            )
            loaded = self._models[settings.model]
            asked = read_question(loaded.model, loaded.reads_videos, settings.question, _paths(files))
            budgets = [part.strip() for part in keeps.split(",")] if keeps else KEEPS
            points = stability(loaded, asked, settings.runs(), settings.max_new_tokens, budgets)
            return [point.to_dict() for point in points]
        except VtpruneError as error:
            raise _said(error) from error


def _paths(files: Sequence[str] | None) -> list[Path]:
    return [Path(file) for file in files or ()]


def _said(error: VtpruneError) -> gr.Error:
    # a message of ours is no fault of the server: nothing to print there
    return gr.Error(str(error), print_exception=False)
