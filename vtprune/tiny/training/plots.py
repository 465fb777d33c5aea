"""One picture for the model card: learning curves, accuracy against depth, accuracy against tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vtprune.tiny.training.evaluation import RANDOM_SEEDS, keeps
from vtprune.tiny.training.vlms import vlm_class

_DEPTH_KINDS = ("digit_frame", "shape_color", "color", "exist", "where", "obj_loc", "count", "relation")


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_curves(model: str, folder: Path, results: dict[str, Any], target: Path) -> None:
    """Draws from the logs in `folder` and the measurements `results`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8))
    _draw_learning(axes[0], folder)
    depth = results["depth"]
    layers = sorted(int(k) for k in depth)
    for kind in _DEPTH_KINDS:
        axes[1, 0].plot(layers, [depth[str(k)][kind] for k in layers], label=kind, linewidth=1)
    axes[1, 0].plot(layers, [depth[str(k)]["scenes"] for k in layers], "k", label="all scenes", linewidth=2)
    axes[1, 0].set(title="all visual tokens dropped after k layers", xlabel="k", ylabel="% right")
    axes[1, 0].legend(fontsize=7)
    vlm = vlm_class(model)
    packed, kept = results["packed"], keeps(vlm.grid.tokens)
    names = [str(keep) for keep in kept]
    for name in ("grid", vlm.query_name, "max-min"):
        axes[1, 1].plot(kept, [packed[name][keep]["scenes"][0] for keep in names], "o-", label=name)
    drawn = [[packed[f"random {seed}"][keep]["scenes"][0] for seed in range(RANDOM_SEEDS)] for keep in names]
    axes[1, 1].plot(kept, [sum(values) / len(values) for values in drawn], "o-", label="random")
    axes[1, 1].axhline(packed["all tokens"][str(vlm.grid.tokens)]["scenes"][0], color="k", linewidth=1)
    axes[1, 1].set(title="scenes, pruned before the decoder", xlabel="visual tokens", xscale="log", xticks=kept)
    axes[1, 1].set_xticklabels(names)
    axes[1, 1].minorticks_off()
    axes[1, 1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=80)
    pyplot.close(figure)


def _draw_learning(axes: Any, folder: Path) -> None:
    vision = [line for line in read_curve(folder / "vision.jsonl") if "kind" in line]
    for name in ("kind", "digit", "color"):
        axes[0].plot([line["step"] for line in vision], [100 * line[name] for line in vision], label=name)
    axes[0].set(title="phase 1: tower, token labels (training batches)", xlabel="step", ylabel="% right")
    axes[0].legend(fontsize=7)
    for name in ("symbolic", "joint"):
        lines = [line for line in read_curve(folder / f"{name}.jsonl") if "dev_step" in line]
        axes[1].plot([line["dev_step"] for line in lines], [line["scenes"] for line in lines], "o-", label=name)
    axes[1].set(title="symbolic, joint: dev scenes, whole answers", xlabel="step", ylabel="% right")
    axes[1].legend(fontsize=7)
