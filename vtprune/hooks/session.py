"""Session: the hooks of one `prune()` on one model, and how they are wired."""

from __future__ import annotations

import dataclasses
import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from vtprune.contract import Scorer
from vtprune.errors import InputError, SessionError
from vtprune.hooks.accounting import real_positions, report_full, report_pruned
from vtprune.hooks.cache import record_of, write_record
from vtprune.hooks.call import Step
from vtprune.hooks.deepstack import attach_deepstack
from vtprune.hooks.departures import read_departures
from vtprune.hooks.encoded import remember_grids
from vtprune.hooks.families.base import Family, Prompt
from vtprune.hooks.planner import Planner
from vtprune.hooks.prefill import Prefill
from vtprune.hooks.probe import attach_probe
from vtprune.hooks.rows import Rows
from vtprune.hooks.tower_hooks import TowerHooks
from vtprune.hooks.tower_scores import with_tower_scores
from vtprune.hooks.validate import asked_layers, check_call, check_drafts, watched_blocks, watched_transitions
from vtprune.hooks.views import Seen
from vtprune.plan import Plan
from vtprune.report import Report

__all__ = ["Session"]

# both ends weak: the hooks keep a session alive as long as its model, and nothing here keeps the model
_sessions: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()


class _Calls(threading.local):
    """The calls now in progress in this thread."""

    decoder: Step | Prefill | None = None
    whole: Prompt | None = None  # of a call that prunes nothing


class Session:
    """A pruned model. Made by `prune()`; also a context manager.

    Attributes:
        plan: the plan for a prompt with one image.
        geometry: the model's shape.
    """

    def __init__(self, model: nn.Module, planner: Planner, family: Family, *, record_scores: bool) -> None:
        self.geometry, self.plan = planner.geometry, planner.nominal
        self._planner, self._family, self._parts = planner, family, family.parts()
        self._record_scores = record_scores
        self._calls = _Calls()
        self._report: Report | None = None
        self._undo: list[Callable[[], object]] = []
        self._root_signature = inspect.signature(type(self._parts.root).forward)
        opened = self.geometry.vision is not None and self._parts.tower is not None
        self._tower = TowerHooks(family, planner, record_scores=record_scores) if opened else None
        self._model = weakref.ref(model)
        other = _sessions.get(self._parts.root)
        if other is not None:
            raise SessionError(
                f"{type(model).__name__} is already pruned by {other()!r}. Call remove() on that session first, or "
                "give prune() a list of methods to combine them."
            )
        _sessions[self._parts.root] = weakref.ref(self)
        try:
            self._attach()
        except BaseException:
            self.remove()
            raise

    @property
    def report(self) -> Report:
        """What the last call that held a prompt kept and cost.

        Raises:
            SessionError: if the model has not been called yet.
        """
        if self._report is None:
            raise SessionError("no report yet: call the model (model.generate(...) or model(...)) first.")
        return self._report

    def plan_for(self, visual_tokens: int, text_tokens: int, images: int = 1, opening: int | None = None) -> Plan:
        """The plan of a prompt of this size; `plan` is that of a prompt with one image.

        Args:
            visual_tokens, text_tokens, images: of the prompt.
            opening: visual tokens of still images and first frames (`Layout.opening`), None for all.

        Raises:
            BudgetError: if the budget does not fit this prompt.
        """
        return self._planner.plan_for(visual_tokens, text_tokens, images, opening)

    def remove(self) -> None:
        """Take every hook and probe off again. The model is exactly as before; calling it twice is harmless."""
        while self._undo:
            self._undo.pop()()
        mine = _sessions.get(self._parts.root)
        if mine is not None and mine() is self:
            del _sessions[self._parts.root]

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        model = self._model()
        name = "model gone" if model is None else type(model).__name__
        stages = ", ".join(f"{s.scorer.name} at {s.site} keep {s.keep}" for s in self.plan.stages)
        return f"Session({name}: {stages or 'no stages'})"

    # wiring

    def _attach(self) -> None:
        parts = self._parts

        # a compiled forward must run the hooks and not bake in what they saw when it was traced
        def pre(module: nn.Module, hook: Callable[..., Any]) -> None:
            untraced: Any = torch.compiler.disable(hook)
            self._undo.append(module.register_forward_pre_hook(untraced, with_kwargs=True).remove)

        def post(module: nn.Module, hook: Callable[..., Any]) -> None:
            untraced: Any = torch.compiler.disable(hook)
            # always_call: an exception inside must not leave a call's state behind
            self._undo.append(module.register_forward_hook(untraced, with_kwargs=True, always_call=True).remove)

        self._undo.append(remember_grids(parts.root, self._family, self._tower and self._tower.encoding))
        pre(parts.root, self._on_root)
        post(parts.root, self._after_root)
        if self._planner.inactive:
            return
        model = self._model()
        if model is not None and model is not parts.root:
            pre(model, self._on_model)
        pre(parts.text_model, self._on_text)
        post(parts.text_model, self._after_text)
        if self.geometry.deepstack:
            self._undo.append(attach_deepstack(parts.text_model, self.pruned_rows))
        # every layer may differ from the text model's own input, in a cache that another plan pruned or by its mask
        for index, layer in enumerate(parts.layers):
            pre(layer, self._on_layer(index))
        watched = watched_blocks(self.plan, "layer")
        for block in sorted({*watched, *asked_layers(self.plan)}):
            module = self._family.attention(parts.layers[block])
            self._undo.append(attach_probe(module, self._observer(block, watched.get(block, ()))))
        for block, scorers in watched_transitions(self.plan).items():
            layer = parts.layers[block]
            post(self._family.attention(layer), self._on_sublayer(block, "attention", scorers))
            post(self._family.mlp(layer), self._on_sublayer(block, "mlp", scorers))
        if self._tower is not None:
            self._tower.attach(pre, post, self._undo)

    def pruned_rows(self) -> Rows | None:
        """What each row of the prefill that runs now holds, if a token has left."""
        call = self._calls.decoder
        return call.rows if isinstance(call, Prefill) and call.left.pruned else None

    def _observer(self, block: int, scorers: Sequence[Scorer]) -> Callable[..., None]:
        calls = self._calls

        def observe(*states: Any) -> None:
            if isinstance(calls.decoder, Prefill):
                calls.decoder.observe(block, scorers, Seen(*states))

        return observe

    def _on_sublayer(
        self, layer: int, part: Literal["attention", "mlp"], scorers: Sequence[Scorer]
    ) -> Callable[..., None]:
        calls = self._calls

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(calls.decoder, Prefill) and output is not None:
                after = output[0] if isinstance(output, tuple) else output
                before = args[0] if args else kwargs["hidden_states"]
                calls.decoder.observe_transition(layer, part, scorers, before, after)

        return hook

    # root

    def _on_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache, wanted = kwargs.get("past_key_values"), kwargs.get("logits_to_keep")
        if isinstance(wanted, int) and wanted > 1 and (cache is None or cache.get_seq_length() == 0):
            check_drafts(self.plan, wanted)

    def _on_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls = self._calls
        calls.decoder = calls.whole = None
        arguments = kwargs
        if args:
            arguments = dict(self._root_signature.bind_partial(module, *args, **kwargs).arguments)
            arguments.update(arguments.pop("kwargs", {}))
        prompt = self._family.prompt(arguments)
        record = None if prompt.cache is None else record_of(prompt.cache)
        if record is not None and self._planner.inactive:
            raise InputError(
                f"the cache holds a conversation of {record.length} tokens that was pruned, but this session keeps "
                "everything (keep=1.0) and does not serve such caches. Continue under a session that prunes."
            )
        if not any(prompt.counts):
            if record is not None:
                calls.decoder = Step(self._parts, record, prompt)
            elif prompt.visual is not None:
                self._report = report_full(self.geometry, prompt, (0, 0), self._itemsize())
            return
        plans = self._plans(prompt)
        acts = any(s.count(n) < n for p, n in zip(plans, prompt.counts, strict=True) for s in p.stages)
        left = None if self._tower is None else self._tower.left(prompt)
        if not acts and left in (None, list(prompt.counts)) and record is None:
            calls.whole = prompt
            return
        real = real_positions(prompt)
        check_call(module, prompt, real, plans)
        layout = prompt.layout(real)
        calls.decoder = Prefill(self._parts, prompt, layout, plans, want_scores=self._record_scores)

    def _plans(self, prompt: Prompt) -> list[Plan]:
        text = real_positions(prompt).sum(1).tolist() if self._planner.needs_text else prompt.counts
        sizes = zip(prompt.counts, text, prompt.images, prompt.opening, strict=True)
        return [self._planner.plan_for(n, t - n, max(1, len(images)), fresh) for n, t, images, fresh in sizes]

    def _after_root(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls = self._calls
        call, calls.decoder = calls.decoder, None
        vision = (0, 0) if self._tower is None else self._tower.flops()
        scores = None if self._tower is None else self._tower.scores()
        if calls.whole is not None and output is not None:
            self._report = report_full(self.geometry, calls.whole, vision, self._itemsize())
        if not isinstance(call, Prefill) or output is None:
            return
        cache = getattr(output, "past_key_values", None)
        if cache is not None and (call.left.pruned or record_of(cache) is not None):
            write_record(cache, call.record())
        report = report_pruned(self.geometry, call, vision, self._itemsize())
        kept = with_tower_scores(report.kept, report.visual_tokens, scores)
        self._report = dataclasses.replace(report, kept=kept)

    def _itemsize(self) -> int:
        return next(self._parts.text_model.parameters()).element_size()

    # text model and decoder layers

    def _on_text(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        call = self._calls.decoder
        if call is None:
            return None
        if isinstance(call, Step):
            return args, call.text(kwargs)
        left, expected = None, None if self._tower is None else self._tower.left(call.prompt)
        if expected is not None:
            index = call.layout.position[..., None].expand(-1, -1, kwargs["inputs_embeds"].shape[-1])
            embeds = kwargs["inputs_embeds"]
            visual = embeds.gather(1, index.to(embeds.device))
            left = read_departures(visual, call.alive.valid.to(embeds.device)), expected
        return args, call.text(kwargs, left)

    def _after_text(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = self._calls.decoder
        if not isinstance(call, Prefill) or output is None:
            return None
        if isinstance(output, tuple):
            return (call.text_output(output[0]), *output[1:])
        output.last_hidden_state = call.text_output(output.last_hidden_state)
        return output

    def _on_layer(self, index: int) -> Callable[..., Any]:
        calls = self._calls

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = calls.decoder
            if call is None:
                return None
            changed = call.layer(index, args[0] if args else kwargs["hidden_states"], kwargs)
            if changed is None:
                return None
            hidden, arguments = changed
            if args:
                return (hidden, *args[1:]), arguments
            return args, {**arguments, "hidden_states": hidden}

        return hook
