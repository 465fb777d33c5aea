"""What lmms-eval's model `vtprune` scores on the bundled tasks: `lmms_scores.py FOLDER OUT`.

A program of its own, because lmms-eval leaves settings behind in the process that runs it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vtprune.eval.harness import Harness

METHOD = "fastervlm"
# the first one is that of docs/serving.md
KEEPS = (16, 3)
TASKS = ("vtp_scenes", "vtp_easy_vqa")
LIMIT = 30


def main(folder: str, out: str) -> None:
    """Write, for each budget and task, the answers and scores in order of the questions."""
    from lmms_eval.models import get_model

    harness, found = Harness(TASKS, LIMIT), {}
    for keep in KEEPS:
        arguments = f"pretrained={folder},dtype=float32,method={METHOD},keep={keep}"
        model = get_model("vtprune").create_from_arg_string(arguments, {"batch_size": "8"})
        found[str(keep)] = {
            task: [(sample.prediction, sample.score) for sample in samples]
            for task, samples in harness.run(model).items()
        }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
