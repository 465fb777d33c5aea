"""What scoring costs: the share of a prefill that each method's scorers take, on random:llama-0.3b.

    python benchmarks/scoring.py [--keep 1/3] [--rounds 5] [METHOD ...]

Prints a Markdown table, medians of calls in turn on one thread, vision tower included. A method that needs weights, or
cannot reach the budget, says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from fractions import Fraction

import torch

import vtprune
from vtprune.errors import VtpruneError
from vtprune.presets import build_random, random_inputs
from vtprune.stopwatch import scoring_time, timer


@torch.no_grad()
def seconds(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(scoring, whole call)."""
    with scoring_time() as watch:
        start = timer()
        model(**inputs)
        return watch.seconds, timer() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=sorted(vtprune.methods()))
    parser.add_argument("--keep", type=Fraction, default=Fraction(1, 3))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = build_random("llama-0.3b")
    inputs = random_inputs(model)
    seconds(model, inputs)
    sys.stdout.write("| method | of the pruned prefill | of the unpruned prefill |\n|---|---:|---:|\n")
    for name in given.methods:
        shares, parts = [], []
        try:
            for _ in range(given.rounds):
                full = seconds(model, inputs)[1]
                with vtprune.prune(model, name, float(given.keep)):
                    scoring, call = seconds(model, inputs)
                shares.append(scoring / call)
                parts.append(scoring / full)
        except VtpruneError as error:
            sys.stdout.write(f"| `{name}` | - | {str(error).split('.')[0]} |\n")
            continue
        sys.stdout.write(f"| `{name}` | {statistics.median(shares):.1%} | {statistics.median(parts):.1%} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
