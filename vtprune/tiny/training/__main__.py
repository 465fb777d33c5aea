"""`python -m vtprune.tiny.training --model llava --out DIR --seed 0`: trains, exports, measures, writes the card."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from vtprune.tiny.training.pipeline import measure, train, write
from vtprune.tiny.training.plus.network import NAME as PLUS
from vtprune.tiny.training.plus.pipeline import PHASES, run_phases
from vtprune.tiny.training.recipe import recipe_for
from vtprune.tiny.training.vlms import VLMS

# one process per core, and no accelerator: the recipe's seed refers to CPU generators
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

_PHASES = ("all", "vision", "symbolic", "joint", "export", "measure", "card")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vtprune.tiny.training", description=__doc__)
    parser.add_argument("--model", choices=sorted((*VLMS, PLUS)), default="llava", help="which of the tiny models")
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, weights and the exported model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phase", choices=_PHASES, default="all", help="run a single phase again")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="split that `measure` uses")
    parser.add_argument("--quick", action="store_true", help="measure on few pictures")
    arguments = parser.parse_args()
    if arguments.model == PLUS and arguments.phase not in PHASES:
        parser.error(f"--model {PLUS} has the phases {', '.join(PHASES)}, got --phase {arguments.phase}")
    return arguments


def main() -> None:
    """Runs the phase asked for, or all of them in order."""
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    phase, model = arguments.phase, arguments.model
    if model == PLUS:
        run_phases(phase, arguments.seed, folder, arguments.split, arguments.quick)
        return
    recipe = recipe_for(model, arguments.seed)
    if phase not in ("export", "measure", "card"):
        train(phase, recipe, folder)
    if phase in ("all", "export"):
        from vtprune.tiny.training.export import export

        export(model, folder / "joint.pt", folder / model)
    if phase in ("all", "measure"):
        measure(model, folder, arguments.split, arguments.quick)
    if phase in ("all", "card"):
        write(recipe, folder, arguments.split, arguments.quick)


if __name__ == "__main__":
    main()
