"""What a user asks of the plugin, and which methods it can serve. No vLLM here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vtprune.budget import Budget, Geometry, parse_keep
from vtprune.contract import METHODS, Scorer
from vtprune.errors import BudgetError, InputError, PlanError, UnsupportedModelError, VtpruneError
from vtprune.integrations.vllm import NATIVE, TRANSFORMERS
from vtprune.plan import Plan
from vtprune.specs import parse_chain
from vtprune.views import PROMPT_ROWS

__all__ = [
    "BACKENDS",
    "KEEP",
    "QUESTION",
    "Settings",
    "architecture_of",
    "check_served",
    "image_plan",
    "kept_of_image",
    "parts_of",
    "read_keep",
    "served_methods",
]

KEEP = "vtprune_keep"
"""The key of `mm_processor_kwargs` that gives one request a budget of its own."""

QUESTION = "vtprune_question"
"""The key of `mm_processor_kwargs` that tells a method which compares tokens with the question what is asked. vLLM
hashes it with the image, so that no cache serves tokens that were chosen for another question."""

BACKENDS = ("native", "transformers")
"""Whose decoder serves a model: vLLM's own, or its Transformers backend's."""


def architecture_of(config: Any, backend: str) -> str:
    """What `hf_overrides["architectures"]` names to serve a model with this config.

    Raises:
        InputError: if there is no such backend.
        UnsupportedModelError: if no class of vLLM's own serves such a model.
    """
    if backend not in BACKENDS:
        raise InputError(f"the backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "transformers":
        return TRANSFORMERS
    if config.model_type not in NATIVE:
        raise UnsupportedModelError(
            f"the plugin has native classes for {', '.join(NATIVE)}, got a {config.model_type!r} model. Choose the "
            "backend transformers."
        )
    return NATIVE[config.model_type]


@dataclass(frozen=True)
class Settings:
    """`hf_overrides={"vtprune": {"method": ..., "keep": ...}}`.

    Attributes:
        method: as with `vtprune.prune`, knobs and rules included; one method and no chain.
        keep: of each image, tokens (int; all of an image that has fewer) or a share (float) of its own.
    """

    method: str
    keep: int | float

    @classmethod
    def read(cls, raw: Any) -> Settings:
        """Check what was written.

        Raises:
            InputError, UnknownNameError, PlanError, BudgetError: with what was given and what is legal.
        """
        legal = 'hf_overrides={"architectures": [...], "vtprune": {"method": "divprune", "keep": 64}}'
        if not isinstance(raw, Mapping) or set(raw) != {"method", "keep"} or not isinstance(raw["method"], str):
            raise InputError(f"vtprune in vLLM is set by {legal}, got vtprune={raw!r}.")
        settings = cls(raw["method"], read_keep(raw["keep"]))
        _ = settings.scorer
        return settings

    @property
    def scorer(self) -> Scorer:
        """The method."""
        return _scorer(self.method)

    def overrides(self, architecture: str) -> dict[str, Any]:
        """The `hf_overrides` that choose a class of the plugin (see `architecture_of`) with these settings."""
        return {"architectures": [architecture], "vtprune": {"method": self.method, "keep": self.keep}}

    def question(self, given: Any) -> str | None:
        """What a request asks, from its `mm_processor_kwargs[QUESTION]` (None if it has none); None for most methods.

        Raises:
            InputError: if the method reads the question and none was given, or the other way round.
        """
        if self.scorer.reads_text:
            if isinstance(given, str):
                return given
            raise InputError(
                f"{self.scorer.name} chooses tokens by the question: send it as mm_processor_kwargs="
                f'{{"{QUESTION}": "what is on the table?"}} ("" for none), got {given!r}.'
            )
        if given is not None:
            raise InputError(f"{self.scorer.name} does not read the question: leave {QUESTION} out, got {given!r}.")
        return None

    @property
    def key(self) -> str:
        """What tells these settings from others, for caches."""
        return json.dumps([self.method, self.keep])


@lru_cache(maxsize=64)
def _scorer(text: str) -> Scorer:
    chain = parse_chain(text)
    if chain.plan is not None or len(chain.methods) != 1 or chain.fixed[0] is not None:
        raise PlanError(f"vLLM takes one method without a budget behind it, such as 'visionzip', got {text!r}.")
    return chain.methods[0]


def read_keep(value: Any) -> int | float:
    """A budget as JSON or Python carries it.

    Raises:
        BudgetError: with what was given and what is legal.
    """
    try:
        return parse_keep(value)
    except BudgetError as error:
        raise BudgetError(f"{KEEP}: {error}") from error


def check_served(method: Scorer, geometry: Geometry) -> None:
    """Refuse what vLLM cannot run: its prompts are laid out before the tower runs, and it encodes images alone.

    Args:
        method: the method.
        geometry: of the model.

    Raises:
        PlanError: naming the need that cannot be met.
        UnsupportedModelError: if the method does not run on this model at all.
    """
    if not method.takes_budget:
        raise PlanError(f"{method.name} decides itself how many tokens stay; vLLM must know before the image is seen.")
    plan = method.plan(geometry, Budget.make(1.0))
    for stage in plan.stages:
        scorer, site = stage.scorer, stage.site
        if site.kind not in ("vision", "input"):
            raise PlanError(
                f"{method.name} cuts at {site}, inside the decoder, where vLLM gives all layers of a request one "
                "length. If a knob leaves that cut out, set it: flowcut(text_cut=False)."
            )
        # a question comes with the request, and only cuts before the decoder can compare its embeddings with tokens
        reads_question = scorer.reads_text and method.reads_text and site.kind == "input"
        if (scorer.reads_text and not reads_question) or scorer.reads_input or scorer.queries in PROMPT_ROWS:
            raise PlanError(f"{method.name} reads the prompt, and vLLM encodes and caches an image without one.")
        if scorer.reads_frames:
            raise PlanError(f"{method.name} compares the frames of a film, and the vLLM plugin serves still images.")
    if plan.stages[-1].adaptive:
        raise PlanError(f"{method.name} decides itself how many tokens stay; vLLM must know before the image is seen.")
    if geometry.deepstack:
        raise UnsupportedModelError(
            f"the vLLM plugin does not serve {geometry.family} models, whose decoder takes visual features again "
            "(DeepStack)."
        )


def served_methods(geometry: Geometry) -> dict[str, str]:
    """Every registered method, with why vLLM cannot run it on a model of this `geometry`; "" if it can."""
    found = {}
    for name, method in METHODS.items():
        try:
            check_served(method(), geometry)
        except VtpruneError as error:
            found[name] = str(error)
        else:
            found[name] = ""
    return found


def parts_of(geometry: Geometry, tokens: int) -> int:
    """Tiles, each an image to the model, of a picture that is `tokens` tokens in all.

    Raises:
        InputError: if they are no whole number of tiles.
    """
    # sizes that come with the call, as those of Qwen2-VL, belong to one picture
    if geometry.rotary_axes > 1:
        return 1
    parts, rest = divmod(tokens, geometry.visual_tokens)
    if rest:
        raise InputError(f"an image has {tokens} tokens, which is no multiple of a tile's {geometry.visual_tokens}.")
    return parts


def kept_of_image(method: Scorer, geometry: Geometry, keep: int | float, tokens: int) -> int:
    """B: how many of an image's tokens stay, the same as with transformers and a prompt of this image alone.

    Args:
        method: that chooses.
        geometry: of the model.
        keep: the budget of an image.
        tokens: N.

    Raises:
        BudgetError: if a tile of the image would keep no token.
    """
    parts = parts_of(geometry, tokens)
    if isinstance(keep, float):
        plan = image_plan(method, geometry, tokens, keep)
        if plan.at("input"):
            return plan.stages[-1].count(tokens)
        # each tile rounds by itself
        return parts * plan.stages[-1].count(tokens // parts)
    if keep < parts:
        raise BudgetError(
            f"{KEEP}={keep} is less than a token for each of the image's {parts} tiles. Keep {parts} or more, or a "
            "share such as 0.25.",
            floor=parts,
        )
    return min(keep, tokens)


@lru_cache(maxsize=4096)
def image_plan(method: Scorer, geometry: Geometry, tokens: int, keep: int | float) -> Plan:
    """The plan of an image (or tile) of `tokens` tokens that keeps `keep` of them, a number or a share."""
    return method.plan(geometry.for_prompt(tokens, geometry.text_tokens, 1), Budget.make(keep))
