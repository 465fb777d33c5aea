"""The dry call: does pruning give, on this very model, what the model gives with the same tokens hidden?

Runs when `prune()` meets a model that no test of vtprune has seen. A random prompt is run three times, each with a
decode step over its cache: pruned at the sites that were asked for; unpruned with the same tokens hidden as keys from
those layers on; and unpruned with other tokens hidden. The first two must agree and the third must not. The prompt is
made of embeddings of random words, so that no pixels and no processor are needed, and the model is left as it was.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.budget import Geometry
from vtprune.contract import AttentionView, Memory, Scorer, TokenView, TransitionView
from vtprune.errors import SessionError, UnsupportedModelError
from vtprune.hooks.families.base import Family, Parts, Prompt
from vtprune.hooks.hiding import Hidden, hiding
from vtprune.hooks.planner import Planner
from vtprune.hooks.session import Session
from vtprune.layout import ImageGrid
from vtprune.plan import Plan, Site, Stage
from vtprune.report import Kept

__all__ = ["distances", "prove"]

_ROWS, _PADDED = 5, 3
# pruned and hidden may differ by this share of the outputs' spread: rounding, no more
_ROUNDING = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
# hiding other tokens must differ by so many times more
_CONTRAST = {torch.float32: 10.0, torch.float16: 5.0, torch.bfloat16: 3.0}


def prove(model: nn.Module, family: Family, geometry: Geometry, plan: Plan) -> None:
    """Try the sites of `plan` on a random prompt.

    Raises:
        UnsupportedModelError: with how far pruning is from hiding, or what went wrong.
        SessionError: if the model is already pruned.
    """
    parts = family.parts()
    with _undisturbed(model):
        try:
            dry = _DryPrompt.make(parts, len(plan.stages))
            stages = _dry_plan(plan)
            got, kept = _pruned(model, family, geometry, stages, dry)
            hidden = Hidden.make(dry.visual, dry.real, stages, kept, geometry.layers)
            with hiding(parts, dry.real, hidden):
                want = dry.run(model)
            with hiding(parts, dry.real, hidden.mirrored(dry.visual)):
                other = dry.run(model)
        except (SessionError, UnsupportedModelError):
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no family of its own, and its dry call failed with "
                f"{type(error).__name__}: {error}"
            ) from error
    sites = ", ".join(str(stage.site) for stage in plan.stages)
    seen = dry.real & ~hidden.gone[-1]
    for what, rows in (("prompt", lambda o: o.prompt[seen]), ("decode step", lambda o: o.step)):
        _judge(type(model).__name__, f"{sites} ({what})", rows(got), rows(want), rows(other), dry.embeds.dtype)


def distances(got: Tensor, want: Tensor, other: Tensor, dtype: torch.dtype) -> tuple[float, float, float, float]:
    """How far outputs [rows, D] are from those wanted: root mean squares over D, as shares of the spread of `want`.

    Args:
        got: of the pruned model.
        want: of the unpruned one with the same tokens hidden.
        other: of the unpruned one with other tokens hidden.
        dtype: in which they were computed.

    Returns:
        the distance of the worst row of `got` (of the median one in half precision) and of the median row of `other`;
        what rounding in `dtype` may make of the first, and how many times more the second must be.
    """
    spread = want.float().std()
    errors, controls = ((x.float() - want.float()).square().mean(1).sqrt() / spread for x in (got, other))
    # in half precision rounding may send a token to another expert; what is wrong with pruning shows in most rows
    error = (errors.median() if dtype in (torch.float16, torch.bfloat16) else errors.max()).item()
    return error, controls.median().item(), _ROUNDING.get(dtype, 1e-3), _CONTRAST.get(dtype, 10.0)


def _judge(name: str, where: str, got: Tensor, want: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    """Compare outputs [rows, D].

    Raises:
        UnsupportedModelError: if they differ where they must not, or do not where they must.
    """
    coarse = max((dtype, want.dtype), key=lambda d: _ROUNDING.get(d, 0.0))
    error, control, allowed, contrast = distances(got, want, other, coarse)
    said = f"{name} has no family of its own, and its dry call at {where}"
    if not error <= allowed:
        raise UnsupportedModelError(
            f"{said} failed: pruning differs from hiding the same tokens by {error:.2g} of the outputs' spread, where "
            f"{allowed:.2g} is rounding in {coarse}; hiding other tokens differs by {control:.2g}. Something in this "
            "decoder depends on its tokens in a way that is not known, so it is not pruned there. Try a method that "
            "cuts elsewhere, such as divprune at 'input', or a finer dtype."
        )
    if not control >= contrast * max(error, allowed / 100):
        raise UnsupportedModelError(
            f"{said} proves nothing: pruning differs from hiding the same tokens by {error:.2g} of the outputs' "
            f"spread, but hiding other tokens by {control:.2g} only. Load trained weights, or a finer dtype than "
            f"{coarse}."
        )


@dataclass(frozen=True)
class _Outputs:
    """Logits (hidden states of a model without a head) of the prompt, [B, N, D], and of one decode step, [B, D]."""

    prompt: Tensor
    step: Tensor
    cache_bytes: int


@dataclass(frozen=True)
class _DryPrompt:
    """Rows of random words, most of them padded on the left; some of the words stand for visual tokens.

    Attributes:
        embeds: [B, N, D].
        step: [B, 1, D] the word behind the prompt.
        real: [B, N] False at padding.
        visual: [B, N].
    """

    embeds: Tensor
    step: Tensor
    real: Tensor
    visual: Tensor

    @classmethod
    def make(cls, parts: Parts, stages: int) -> _DryPrompt:
        """Room for some tokens to leave at every stage."""
        embedding: Any = parts.text_model.get_input_embeddings()  # type: ignore[operator]
        weight, total = embedding.weight, 12 + 8 * stages
        device = torch.device("cpu") if weight.device.type == "meta" else weight.device  # offloaded: hooks move it
        length = 4 + total + 5
        words = torch.randint(0, weight.shape[0], (_ROWS, length + 1), generator=torch.Generator().manual_seed(0))
        at, row = torch.arange(length), torch.arange(_ROWS)[:, None]
        less = total * (row - (_ROWS - _PADDED) + 1).clamp(min=0) // (_PADDED + 2)
        real = (at > less).to(device) | (less == 0).to(device)
        visual = ((at >= 4 + less) & (at < 4 + total)).to(device)
        embeds = embedding(words.to(device))
        return cls(embeds[:, :-1], embeds[:, -1:], real, visual)

    def read(self, arguments: Mapping[str, Any]) -> Prompt:
        """What a family reads off the root's arguments."""
        mask, cache = arguments.get("attention_mask"), arguments.get("past_key_values")
        if arguments["inputs_embeds"].shape[1] == 1:
            return Prompt(None, None, mask, cache, _ROWS, 0)
        counts = tuple(self.visual.sum(1).tolist())
        images = tuple(((ImageGrid(1, n),),) for n in counts)
        return Prompt(self.visual, None, mask, cache, _ROWS, _ROWS, images, counts)

    def run(self, model: nn.Module) -> _Outputs:
        """The prompt, and a step over its cache."""
        output = model(inputs_embeds=self.embeds, attention_mask=self.real.long(), use_cache=True)
        cache = output.past_key_values
        held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        mask = nn.functional.pad(self.real.long(), (0, 1), value=1)
        step = model(inputs_embeds=self.step, attention_mask=mask, past_key_values=cache, use_cache=True)
        return _Outputs(_states(output), _states(step)[:, -1], held)


def _states(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


@dataclass(frozen=True)
class _Scattered(Scorer):
    """Keeps tokens scattered over the prompt, whatever the stage's own scorer says, which still sees attention."""

    inner: Scorer

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """See `Scorer.observe`."""
        return self.inner.observe(view, memory)

    def prepare(self, view: TokenView) -> Memory:
        """See `Scorer.prepare`."""
        return self.inner.prepare(view)

    @property
    def reads_attention(self) -> bool:
        """See `Scorer.reads_attention`."""
        return self.inner.reads_attention

    @property
    def reads_transitions(self) -> bool:
        """See `Scorer.reads_transitions`."""
        return self.inner.reads_transitions

    @property
    def drops_text(self) -> bool:
        """See `Scorer.drops_text`."""
        return self.inner.drops_text

    def score_rows(self, view: AttentionView) -> Tensor:
        """[B, M] the same for every content."""
        row = torch.arange(view.key.shape[2] - view.first, device=view.key.device)
        return (row * 41 % 103).float().expand(len(view.key), -1)

    def watches(self, site: Site) -> range:
        """See `Scorer.watches`."""
        return self.inner.watches(site)

    def observe_transition(self, view: TransitionView, memory: Memory) -> Memory:
        """See `Scorer.observe_transition`."""
        return self.inner.observe_transition(view, memory)

    def score(self, view: TokenView) -> Tensor:
        """[B, V] the same for every content.

        Raises:
            UnsupportedModelError: if the scorer was to see attention and saw none.
        """
        if self.reads_attention and not view.memory:
            raise UnsupportedModelError(
                f"{self.name} reads the decoder's attention, which this model does not compute through transformers' "
                "attention interface. Use a method that reads none, such as divprune or uniform."
            )
        return (view.original * 37 % 101).float()


def _dry_plan(plan: Plan) -> Plan:
    """The sites of `plan`, each of which drops some tokens; a quarter is left in the end."""

    def scattered(scorer: Scorer) -> Scorer:
        facts = {name: getattr(scorer, name) for name in ("name", "queries", "accumulates", "ahead", "reads_input")}
        return type("DryCall", (_Scattered,), facts)(scorer)

    share = 0.75 / len(plan.stages)
    return Plan(
        tuple(
            Stage(stage.site, scattered(stage.scorer), 1 - share * (i + 1), positions=stage.positions)
            for i, stage in enumerate(plan.stages)
        )
    )


def _pruned(
    model: nn.Module, family: Family, geometry: Geometry, plan: Plan, dry: _DryPrompt
) -> tuple[_Outputs, Sequence[Kept]]:
    rehearsal: Any = copy.copy(family)
    rehearsal.prompt = dry.read
    with Session(model, Planner(geometry, plan, None, "average", None), rehearsal, record_scores=False) as session:
        outputs, report = dry.run(model), session.report
    if outputs.cache_bytes != report.kv_bytes:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no family of its own, and on its dry call the cache held "
            f"{outputs.cache_bytes} bytes where its config says {report.kv_bytes}: its layers cache something else "
            "than keys and values of one size, which the report would get wrong."
        )
    return outputs, report.kept


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout; every module is back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
