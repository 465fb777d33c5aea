"""`vtprune bench --engine vllm`: what pruning gives a server."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vtprune.bench.provenance import provenance
from vtprune.commands.show import console
from vtprune.commands.vllm_start import checked_overrides, served_place
from vtprune.integrations.vllm.bench import Served, ratios, serve_rounds
from vtprune.integrations.vllm.settings import QUESTION, Settings

__all__ = ["bench_vllm"]

_ANSWER = 16  # tokens


def bench_vllm(
    model: str,
    method: str,
    keeps: tuple[int | float, ...],
    backend: str,
    dtype: str,
    rounds: int,
    out: Path | None,
    command: str,
) -> None:
    """Measure requests per second and time to first token at concurrency 1 and 8, and print them.

    Args:
        model: an embedded one, a LLaVA preset, a folder or a hub id.
        method: one that vLLM serves.
        keeps: budgets of an image, beside all tokens.
        backend: see `architecture_of`.
        dtype: of the weights.
        rounds: measured rounds of each way.
        out: file for a JSON line a way.
        command: what the user typed.

    Raises:
        InputError: if the model has no processor.
        VtpruneError: if vLLM is not installed.
    """
    settings = Settings.read({"method": method, "keep": 1.0})
    overrides = checked_overrides("--engine vllm", model, settings, backend)
    with served_place(model) as place:
        rows = _measure(place, settings, overrides, keeps, dtype, rounds)
    _print(rows)
    if out is not None:
        import torch

        head = {"model": model, "method": method, "engine": "vllm", "backend": backend, "command": command}
        head |= provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({**dataclasses.asdict(row), **head}) for row in rows]
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        console().print(f"written to {out}", markup=False, soft_wrap=True)


def _measure(
    place: str,
    settings: Settings,
    overrides: dict[str, Any],
    keeps: tuple[int | float, ...],
    dtype: str,
    rounds: int,
) -> list[Served]:
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    from vtprune.images import load_example
    from vtprune.prompt import Question, chat_text

    picture, question = load_example()
    processor = AutoProcessor.from_pretrained(place)
    text = chat_text(processor, Question(question, (picture,)))
    longest = len(processor(text=[text], images=[picture])["input_ids"][0]) + _ANSWER
    llm = LLM(
        model=place,
        dtype=dtype,
        # memory for as much as is asked, and not for what the model could take
        max_model_len=-(-longest // 128) * 128,
        max_num_seqs=8,
        limit_mm_per_prompt={"image": 1},
        disable_log_stats=False,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        hf_overrides=overrides,
    )

    def request(number: int) -> dict[str, Any]:
        other = picture.copy()
        other.putpixel((0, 0), (number % 256, number // 256 % 256, 0))
        own = {QUESTION: question} if settings.scorer.reads_text else {}
        return {"prompt": text, "multi_modal_data": {"image": other}, "mm_processor_kwargs": own}

    sampling = SamplingParams(temperature=0, max_tokens=_ANSWER, ignore_eos=True)
    budgets = (1.0, *(keep for keep in keeps if keep != 1.0 or isinstance(keep, int)))
    with console().status("vLLM") as status:
        return list(serve_rounds(llm, request, budgets, (1, 8), rounds=rounds, sampling=sampling, tell=status.update))


def _print(rows: list[Served]) -> None:
    from rich.table import Table

    from vtprune.bench.table import keep_text

    table = Table("at a time", "keep", "prompt tokens", "requests/s", "x full", "first token ms", "x sooner")
    for row, faster, sooner in ratios(rows):
        table.add_row(
            str(row.concurrency),
            keep_text(row.keep),
            str(row.prompt_tokens),
            f"{row.requests_per_s:.4g}",
            f"{faster:.2f}",
            f"{row.first_token_ms:.4g}",
            f"{sooner:.2f}",
        )
    console().print(table)
