"""Requests per second and time to first token of vLLM, pruned against full, on one engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vtprune.integrations.vllm.settings import KEEP

__all__ = ["Served", "ratios", "serve_rounds"]


@dataclass(frozen=True)
class Served:
    """One way of asking.

    Attributes:
        keep: budget of each request, 1.0 for all tokens.
        concurrency: requests in flight at a time.
        requests_per_s: median over the rounds.
        first_token_ms: median over all requests of the time from sending one to its first token.
        prompt_tokens: of a request, those of the image that stay included.
    """

    keep: int | float
    concurrency: int
    requests_per_s: float
    first_token_ms: float
    prompt_tokens: int


def serve_rounds(
    llm: Any,
    request: Callable[[int], dict[str, Any]],
    keeps: Sequence[int | float],
    concurrencies: Sequence[int],
    *,
    rounds: int,
    sampling: Any,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Served]:
    """Ask an engine in every way, in turn, so that what else the machine does falls on all alike.

    Args:
        llm: a `vllm.LLM` with the plugin, `disable_log_stats=False`.
        request: a new request, another image for each number, so that no cache answers.
        keeps, concurrencies: the ways, all combinations.
        rounds: measured rounds; one more goes before them.
        sampling: `SamplingParams` of every request.
        tell: is told what runs.
    """
    ways = [(keep, many) for many in concurrencies for keep in keeps]
    rates: dict[tuple[int | float, int], list[float]] = {way: [] for way in ways}
    firsts: dict[tuple[int | float, int], list[float]] = {way: [] for way in ways}
    lengths: dict[tuple[int | float, int], int] = {}
    number = 0
    for turn in range(rounds + 1):
        for keep, many in ways:
            tell(f"keep {keep}, {many} at a time, round {turn} of {rounds}")
            asked = []
            for _ in range(many):
                new = request(number)
                asked.append({**new, "mm_processor_kwargs": {**new.get("mm_processor_kwargs", {}), KEEP: keep}})
                number += 1
            start = time.perf_counter()
            outputs = llm.generate(asked, sampling, use_tqdm=False)
            seconds = time.perf_counter() - start
            lengths[keep, many] = len(outputs[0].prompt_token_ids)
            if turn:
                rates[keep, many].append(many / seconds)
                firsts[keep, many] += [1000 * output.metrics.first_token_latency for output in outputs]
    for keep, many in ways:
        yield Served(
            keep,
            many,
            statistics.median(rates[keep, many]),
            statistics.median(firsts[keep, many]),
            lengths[keep, many],
        )


def ratios(rows: Sequence[Served]) -> list[tuple[Served, float, float]]:
    """Each row with how many times the requests per second of the full one at its concurrency, and how many times
    sooner its first token comes."""
    full = {row.concurrency: row for row in rows if row.keep == 1.0 and isinstance(row.keep, float)}
    return [
        (
            row,
            row.requests_per_s / full[row.concurrency].requests_per_s,
            full[row.concurrency].first_token_ms / row.first_token_ms,
        )
        for row in rows
    ]
