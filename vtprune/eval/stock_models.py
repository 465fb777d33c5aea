"""lmms-eval's own model classes, pruned: `vtprune_llava_hf`, `vtprune_qwen2_5_vl` and others.

Prompts, generation settings and post-processing stay lmms-eval's own, so a number can be put beside one that was
measured with its class of the same name. (`--model vtprune` is one class for all families that batches, counts what
pruning saved and runs on a CPU in several processes.) The classes are made when they are asked for: each imports what
its stock class needs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

from vtprune.errors import VtpruneError
from vtprune.eval.asking import UNPRUNED, attach_to, default_device
from vtprune.plan import Plan
from vtprune.processes import several_processes

__all__ = ["STOCK", "PrunedStock"]

STOCK = {
    "LlavaHfChat": "lmms_eval.models.chat.llava_hf.LlavaHf",
    "LlavaHfSimple": "lmms_eval.models.simple.llava_hf.LlavaHf",
    "Qwen2VLSimple": "lmms_eval.models.simple.qwen2_vl.Qwen2_VL",
    "Qwen25VLChat": "lmms_eval.models.chat.qwen2_5_vl.Qwen2_5_VL",
    "Qwen25VLSimple": "lmms_eval.models.simple.qwen2_5_vl.Qwen2_5_VL",
    "InternVLHfChat": "lmms_eval.models.chat.internvl_hf.InternVLHf",
}
"""Name of a class of this module to the stock class that it prunes."""


class PrunedStock:
    """First base of every class here: prunes the model that the stock class has loaded.

    Args:
        method, keep, basis, flops, plan: as for the model `vtprune`, see `vtprune.eval.lmms_base`.
        device: where the model runs, chosen from what is there if None.
        device_map: how it is laid out; all of it on `device` if None.
        stock: the stock class's own arguments.
    """

    model: Any

    def __init__(
        self,
        *,
        method: str = UNPRUNED,
        keep: int | float | str | None = None,
        basis: str = "average",
        flops: float | None = None,
        plan: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        **stock: Any,
    ) -> None:
        device = device or default_device()
        # with several processes the stock classes choose each one's GPU, unless told a map
        if device_map is not None or not several_processes():
            stock["device_map"] = device_map or device
        super().__init__(device=device, **stock)  # type: ignore[call-arg]
        self.session = attach_to(self.model, Plan.load(plan) if plan else method, keep, basis=basis, flops=flops)

    def generate_until(self, requests: list[Any]) -> Any:
        """The stock class's answers.

        Raises:
            VtpruneError: if the model broke: some stock classes count that as an empty answer.
        """
        watch, model = _Watch(), self.model
        real = model.generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            with watch:
                return real(*args, **kwargs)

        model.generate = generate
        try:
            answers = super().generate_until(requests)  # type: ignore[misc]
        finally:
            del model.generate
        if watch.error is not None:
            raise VtpruneError(f"generate() broke: {watch.error!r}") from watch.error
        return answers


class _Watch:
    """Remembers the first error that leaves its block."""

    error: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.error = self.error or error


@contextlib.contextmanager
def _decord() -> Iterator[None]:
    """Some stock classes import decord, which reads video files, even to look at images; it is rarely installed."""
    if "decord" in sys.modules or importlib.util.find_spec("decord") is not None:
        yield
        return
    with contextlib.suppress(ImportError):
        importlib.import_module("qwen_vl_utils")  # it looks whether decord is there, and shall see the truth

    def missing(*_: object, **__: object) -> None:
        raise ImportError("this model of lmms-eval reads video files with decord. Run: pip install decord")

    stand_in = types.ModuleType("decord")
    stand_in.VideoReader = stand_in.cpu = stand_in.gpu = missing  # type: ignore[attr-defined]
    sys.modules["decord"] = stand_in
    try:
        yield
    finally:
        sys.modules.pop("decord", None)


def __getattr__(name: str) -> Any:
    if name not in STOCK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, stock = STOCK[name].rpartition(".")
    with _decord():
        base = getattr(importlib.import_module(module), stock)
    made = type(name, (PrunedStock, base), {"__doc__": f"`{STOCK[name]}`, pruned.", "__module__": __name__})
    globals()[name] = made
    return made
