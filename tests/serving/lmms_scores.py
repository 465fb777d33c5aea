"""What lmms-eval scores on the bundled tasks, as a program of its own: `lmms_scores.py SIDE FOLDER OUT`.

lmms-eval and vLLM both leave settings behind in the process that runs them, so each side has its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engines import ARCHITECTURE, switch

from vtprune.eval.harness import Harness

METHOD = "fastervlm"
# the first one is that of vLLM's start and of docs/serving.md; "100%" is unpruned
KEEPS = (16, "100%", 3)
TASKS = ("vtp_scenes", "vtp_easy_vqa")
LIMIT = 30


def model_of(name: str, arguments: str) -> Any:
    """A model as `python -m lmms_eval --model NAME --model_args ARGUMENTS` builds it."""
    from lmms_eval.models import get_model

    model = get_model(name).create_from_arg_string(arguments, {"batch_size": "8"})
    model.batch_size = 8
    return model


def in_vllm(folder: str) -> Iterator[Any]:
    """lmms-eval's own model `vllm` with each budget in turn."""
    overrides = {"architectures": [ARCHITECTURE], "vtprune": {"method": METHOD, "keep": KEEPS[0]}}
    options = "dtype=float32,enforce_eager=True,max_model_len=512,max_new_tokens=8"
    model = model_of("vllm", f"model={folder},{options},hf_overrides={json.dumps(overrides)}")
    yield model
    for keep in KEEPS[1:]:
        switch(model.client, METHOD, keep)
        yield model


def in_transformers(folder: str) -> Iterator[Any]:
    """The model `vtprune` with each budget in turn."""
    for keep in KEEPS:
        method = "none" if keep == "100%" else f"{METHOD},keep={keep}"
        yield model_of("vtprune", f"pretrained={folder},dtype=float32,method={method}")


def main(side: str, folder: str, out: str) -> None:
    """Write, for each budget and task, the answers and scores in order of the questions."""
    # vLLM's answers begin with the space before the first word, which the model `vtprune` cuts off
    harness = Harness(TASKS, LIMIT)
    sides: Mapping[str, Any] = {"vllm": in_vllm, "transformers": in_transformers}
    found = {
        str(keep): {
            task: [(s.prediction.strip(), s.score) for s in samples] for task, samples in harness.run(model).items()
        }
        for keep, model in zip(KEEPS, sides[side](folder), strict=True)
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
