"""What both slots of the lmms-eval model `vtprune` share: load, prune, ask in batches, count.

Errors are raised: an exception that is swallowed would be scored as a wrong answer.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from transformers import LogitsProcessorList

from vtprune.budget import Geometry
from vtprune.errors import UnknownNameError
from vtprune.eval.asking import (
    UNPRUNED,
    Message,
    PrefillClock,
    Prompt,
    Request,
    attach_to,
    cut_answer,
    default_device,
    generation_arguments,
    media_arguments,
    read_batch_size,
    visual_tokens,
)
from vtprune.eval.counts import BatchCost, PrunedTokenCounts, Totals
from vtprune.eval.replaying import Replaying
from vtprune.loading import load_model
from vtprune.plan import Plan
from vtprune.processes import new_accelerator, several_processes, together
from vtprune.prompt import processor_inputs

__all__ = ["LmmsVtprune"]

_PADDING = "__padding_only__"
_ARGUMENTS = (
    "pretrained",
    "method",
    "keep",
    "basis",
    "flops",
    "plan",
    "batch_size",
    "device",
    "dtype",
    "attn_implementation",
    "save_kept",
)


class LmmsVtprune(lmms):
    """A supported Hugging Face VLM, pruned by any method.

    Args:
        pretrained: what `vtprune.loading.load_model` accepts.
        method: a method's name, several joined by `+` (`flowcut@1/2+fastv`), or `none`.
        keep: budget, or several joined by `+`; lmms-eval parses `0.25` and `1.0` to a float (a share) and `64` to an
            int (tokens).
        basis: `average` or `final`.
        flops: budget as a share of the unpruned prefill FLOPs, instead of `keep`.
        plan: path of a saved plan, instead of `method` and budget.
        batch_size: questions a call; lmms-eval hands it over as text.
        max_batch_size: accepted because lmms-eval may pass it; not used.
        device: where the model runs, chosen from what is there if None.
        dtype: of the weights, `auto` for the checkpoint's own.
        attn_implementation: attention backend of transformers.
        save_kept: write the kept indices of every stage into the samples file, not only their hash.
        loaded: (model, processor) to use instead of loading; the caller keeps the model.
        on_batch: called with the number of questions after each batch.

    Raises:
        UnknownNameError: on a model argument that does not exist.
    """

    def __init__(
        self,
        pretrained: str = "tiny:llava",
        *,
        method: str = UNPRUNED,
        keep: int | float | str | None = None,
        basis: str = "average",
        flops: float | None = None,
        plan: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        save_kept: bool = False,
        loaded: tuple[Any, Any] | None = None,
        on_batch: Callable[[int], object] | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise UnknownNameError("model argument", name, _ARGUMENTS)
        self.batch_size = read_batch_size(batch_size)
        self.save_kept = save_kept
        self._costs: list[PrunedTokenCounts] = []
        self._batches_asked = 0
        self._replaying: Replaying | None = None
        self._reused = loaded is not None
        self._on_batch = on_batch
        self._session: Any = None
        if loaded is None:
            loaded = load_model(
                pretrained,
                device=device or default_device(),
                dtype=dtype,
                attn_implementation=attn_implementation,
            )
        self._model, self.processor = loaded
        self.tokenizer = self.processor.tokenizer
        if several_processes():
            # one whole model a process; the evaluator gathers through this object
            self.accelerator = new_accelerator("eval")
        self.attach(Plan.load(plan) if plan else method, keep, basis=basis, flops=flops)

    @property
    def model(self) -> Any:
        """The Hugging Face model."""
        return self._model

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self._model.device

    @property
    def session(self) -> Any:
        """The current `vtprune.Session`, None if unpruned."""
        return self._session

    @functools.cached_property
    def geometry(self) -> Geometry:
        """The model's shape, as a session knows it (also that of a model which no family names)."""
        self.detach()
        with attach_to(self._model, "uniform", 1.0) as session:
            return session.geometry

    @property
    def totals(self) -> Totals:
        """Sums over the questions that this process answered since the last `attach`."""
        return Totals.of(count.to_dict() for count in self._costs)

    def attach(
        self,
        method: str | Plan = UNPRUNED,
        keep: int | float | str | None = None,
        *,
        basis: str = "average",
        flops: float | None = None,
    ) -> Any:
        """Prune the next questions this way. The previous session is removed, and what was counted is forgotten.

        Returns:
            the new session, or None if `method` is `none`.
        """
        self.detach()
        self._session = attach_to(self._model, method, keep, basis=basis, flops=flops)
        return self._session

    def replay(self, replaying: Replaying) -> None:
        """Keep recorded sets of the next questions; the previous session is removed."""
        self.detach()
        self._replaying = replaying

    def detach(self) -> None:
        """Leave the model as it was loaded."""
        self._costs, self._replaying = [], None
        if self._session is not None:
            self._session.remove()
            self._session = None

    def clean(self) -> None:
        """Called by lmms-eval after generation. A model that the caller handed in stays usable."""
        if not self._reused:
            self.detach()
            super().clean()

    def encode(self, prompts: Sequence[Prompt]) -> Any:
        """Left-padded model inputs, on the model's device, of (prompt text, its images and `Video`s) pairs."""
        media = media_arguments([medium for _, shown in prompts for medium in shown])
        texts = [text for text, _ in prompts]
        return processor_inputs(self.processor, texts, self.device, self._model.dtype, **media)

    def prompt(self, messages: Sequence[Message]) -> str:
        """Messages in the model's own chat format."""
        return self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    @torch.inference_mode()
    def answer(
        self, prompts: Sequence[Prompt], settings: dict[str, Any], places: Sequence[tuple[str, int]] = ()
    ) -> list[tuple[str, PrunedTokenCounts]]:
        """Generate for one batch.

        Args:
            prompts: (text, images and videos) pairs.
            settings: the task's generation arguments.
            places: task and doc id of each prompt; read only while recorded sets are replayed.

        Returns:
            answer and counts of each prompt, in order.
        """
        inputs = self.encode(prompts)
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        if self._replaying is not None:
            self._session = self._replaying.attach(self._model, places, self._session)
        clock = PrefillClock()
        output = self._model.generate(
            **inputs, **generation_arguments(settings), pad_token_id=pad, logits_processor=LogitsProcessorList([clock])
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = [
            cut_answer(text, settings.get("until"))
            for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)
        ]
        report = None if self._session is None else self._session.report
        self._batches_asked += 1
        counts = PrunedTokenCounts.of_batch(
            prompt=inputs["attention_mask"].sum(1).tolist(),
            answer=(new != pad).sum(1).tolist(),
            visual=visual_tokens(self._model.config, inputs["input_ids"]),
            report=report,
            batch=BatchCost.of(f"{self.rank}-{self._batches_asked}", len(prompts), clock.milliseconds, report),
            save_kept=self.save_kept,
        )
        self._costs += counts
        return list(zip(texts, counts, strict=True))

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer all requests, in order. Questions of like length share a batch, so that little is padded.

        Raises:
            VtpruneError: on every process, if one of several broke.
        """
        start = time.perf_counter()
        # what makes the processes' numbers of requests equal is nobody's question
        asked = [index for index, request in enumerate(requests) if not (request.metadata or {}).get(_PADDING)]
        with together(getattr(self, "accelerator", None)):
            answered = self._answer_all(requests, asked)
        elapsed = time.perf_counter() - start
        tokens = sum(result.token_counts.output_tokens or 0 for result in answered.values() if result.token_counts)
        log_metrics(
            total_elapsed_time=elapsed,
            total_gen_tokens=tokens,
            avg_speed=tokens / elapsed if elapsed else 0.0,
            additional_metrics={"total_requests": len(asked), "rank": self.rank, **self.totals.to_dict()},
        )
        return [answered.get(index, GenerationResult(text="")) for index in range(len(requests))]

    def _answer_all(self, requests: list[Instance], asked: list[int]) -> dict[int, GenerationResult]:
        results: dict[int, GenerationResult] = {}
        for batch in self._batches(requests, asked):
            parts = [self._parts(requests[index].args) for index in batch]
            prompts = [part.make() for part in parts]
            answers = self.answer(prompts, parts[0].settings, [(part.task, part.doc_id) for part in parts])
            for index, (text, counts) in zip(batch, answers, strict=True):
                results[index] = GenerationResult(text=text, token_counts=counts)
            if self._on_batch is not None:
                self._on_batch(len(batch))
        return results

    def _batches(self, requests: list[Instance], asked: list[int]) -> Iterable[list[int]]:
        """Indices of requests that are generated together: same settings, longest first."""

        def settings_of(index: int) -> str:
            return repr(self._parts(requests[index].args).settings)

        order = sorted(asked, key=lambda i: (settings_of(i), -len(requests[i].args[0]), i))
        for _, group in itertools.groupby(order, key=settings_of):
            members = list(group)
            for first in range(0, len(members), self.batch_size):
                yield members[first : first + self.batch_size]

    def _parts(self, arguments: tuple[Any, ...]) -> Request:
        """One request's arguments."""
        raise NotImplementedError

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: the few tasks that need it crash inside lmms-eval 0.7 for every model."""
        raise NotImplementedError("the lmms-eval model 'vtprune' answers generate_until tasks only, not loglikelihood.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("the lmms-eval model 'vtprune' answers generate_until tasks only, not multi-round.")
