"""The model card as Markdown, from the measurements and the logs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from vtprune.tiny import load_folder
from vtprune.tiny.questions import KINDS_OF_QUESTION
from vtprune.tiny.storage import FILE
from vtprune.tiny.training import card_text
from vtprune.tiny.training.evaluation import FASTV_LAYERS, RANDOM_SEEDS, SHARES, Sample, keeps
from vtprune.tiny.training.recipe import COMPARE_LAYER, PLACE_LAYER, READ_LAYER, VERDICT_LAYER, Recipe
from vtprune.tiny.training.vlms import Vlm, vlm_class

_COLUMNS = (*KINDS_OF_QUESTION, "easy", "scenes")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_row(head), _row(["---"] * len(head)), *(_row(row) for row in rows)])


def _percent(entry: dict[str, Any] | None, column: str) -> str:
    return f"{entry[column][0]:.1f}" if entry and column in entry else "-"


def _by_kind(tokens: int, packed: dict[str, Any]) -> str:
    every = str(tokens)
    full = packed["all tokens"][every]
    rows = [
        [label, *(_percent(packed[name][keep], column) for column in _COLUMNS)]
        for label, name, keep in (
            (f"all {every} tokens", "all tokens", every),
            ("no visual tokens", "no visual tokens", "0"),
            ("wrong image", "wrong image", every),
        )
    ]
    rows.insert(1, ["95 % interval", *(f"{full[column][1]}-{full[column][2]}" for column in _COLUMNS)])
    rows.append(["questions", *(str(full[column][3]) for column in _COLUMNS)])
    return _table(["", *_COLUMNS], rows)


def _spread(packed: dict[str, Any], keep: str, column: str) -> str:
    values = [packed[f"random {seed}"][keep][column][0] for seed in range(RANDOM_SEEDS)]
    return f"{sum(values) / len(values):.1f} (±{(max(values) - min(values)) / 2:.1f})"


def _against_tokens(vlm: type[Vlm], results: dict[str, Any], column: str) -> str:
    packed, rows = results["packed"], results["rows"]
    every, kept = str(vlm.grid.tokens), [str(keep) for keep in keeps(vlm.grid.tokens)]

    def line(label: str, table: dict[str, Any], name: str, full: str) -> list[str]:
        cells = [f"{table[name][k][column][0]:.1f}" if column in table.get(name, {}).get(k, {}) else "-" for k in kept]
        return [label, full, *cells]

    def interval_line(name: str) -> list[str]:
        cells = [f"{packed[name][k][column][1]}-{packed[name][k][column][2]}" for k in kept]
        return [f"{name}, 95 % interval", "", *cells]

    full, full_rows = (f"{part['all tokens'][every][column][0]:.1f}" for part in (packed, rows))
    table = [[f"random, {RANDOM_SEEDS} seeds", full, *(_spread(packed, keep, column) for keep in kept)]]
    for name in ("random 0", "grid", vlm.query_name, "max-min"):
        if name != "random 0":
            table.append(line(name, packed, name, full))
        table.append(interval_line(name))
    table.append(line("random (one question per row)", rows, "random", full_rows))
    for layer in FASTV_LAYERS:
        table.append(line(f"FastV-like K={layer}", rows, f"FastV-like K={layer}", full_rows))
    if column == "scenes":
        table.append(line("oracle", rows, "oracle", full_rows))
    return _table(["method", every, *kept], table)


def _by_kind_at(vlm: type[Vlm], results: dict[str, Any], share: int) -> str:
    packed, rows = results["packed"], results["rows"]
    keep = str(keeps(vlm.grid.tokens)[SHARES.index(share)])
    drawn = [
        sum(packed[f"random {seed}"][keep][kind][0] for seed in range(RANDOM_SEEDS)) / RANDOM_SEEDS for kind in _COLUMNS
    ]
    table = [["random, mean", *(f"{value:.1f}" for value in drawn)]]
    for name in ("grid", vlm.query_name, "max-min"):
        table.append([name, *(_percent(packed[name].get(keep), kind) for kind in _COLUMNS)])
    for name in (*(f"FastV-like K={layer}" for layer in FASTV_LAYERS), "oracle"):
        table.append([name, *(_percent(rows[name].get(keep), kind) for kind in _COLUMNS)])
    title = f"## By kind at {keep} tokens (%)"
    return f"{title}\n\n{_table([f'{keep} tokens', *_COLUMNS], table)}"


def _depth(depth: dict[str, dict[str, float]]) -> str:
    layers = sorted(depth, key=int)
    rows = [[kind, *(f"{depth[k][kind]:.1f}" for k in layers)] for kind in _COLUMNS]
    return _table(["dropped after layer k =", *layers], rows)


def _layers(layers: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {layer}" for kind, layer in layers.items())


def collect_facts(model: str, folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """What the card states besides accuracies: size, words, wall times, generate() counts, versions, notes.txt."""
    shipped = folder / model
    stored = shipped / (FILE if vlm_class(model).stored_in_int8 else "model.safetensors")
    notes = folder / "notes.txt"
    walls = {name: folder / f"{name}.wall.json" for name in ("vision", "symbolic", "joint")}
    config = json.loads((folder / model / "config.json").read_text(encoding="utf-8"))
    return {
        **results["generated"],
        "architecture": config["architectures"][0],
        "parameters": sum(weight.numel() for weight in load_folder(shipped, torch.float32).parameters()),
        "file": stored.name,
        "bytes": stored.stat().st_size,
        "stored": "int8, a scale a row" if vlm_class(model).stored_in_int8 else "fp16",
        "words": len(vlm_class(model).words()),
        "notes": notes.read_text(encoding="utf-8").strip() if notes.is_file() else "",
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator, "
        f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}",
        "wall_s": {name: json.loads(path.read_text(encoding="utf-8")) for name, path in walls.items()},
    }


def write_card(results: dict[str, Any], recipe: Recipe, sample: Sample) -> str:
    """The whole card."""
    vlm, packed, facts = vlm_class(recipe.model), results["packed"], results["facts"]
    every = str(vlm.grid.tokens)
    full, easy = packed["all tokens"][every], packed["all easy-VQA pictures"][every]["easy"]
    settings = _table(["setting", "value"], [[name, str(value)] for name, value in asdict(recipe).items()])
    wall = _table(["phase", "wall time, s"], [[name, f"{value:.0f}"] for name, value in facts["wall_s"].items()])
    notes, measuring = facts["notes"], card_text.MEASURING.format(split=sample.split, model=recipe.model).strip()
    parts = [
        card_text.HEADER.format(
            title=vlm.title, architecture=facts["architecture"], origin=card_text.ORIGIN[vlm.warm_start]
        ),
        card_text.OPENING_NUMBERS.format(scenes=full["scenes"], easy=easy, images=sample.scenes, **facts),
        card_text.DATA,
        card_text.MODEL[recipe.model].format(**facts),
        _training(recipe, facts),
        settings,
        wall,
        *([f"Notes on this run: {notes}"] if notes else []),
        "![learning curves, depth and token curves](curves.png)",
        f"## Test: accuracy by kind of question (%)\n\n{measuring}",
        _by_kind(vlm.grid.tokens, packed),
        f"easy-VQA, all {easy[3]} test questions: {easy[0]} % ({easy[1]}-{easy[2]}).",
        f"## Accuracy against visual tokens, scenes (%)\n\n{_against_tokens(vlm, results, 'scenes')}",
        f"## Accuracy against visual tokens, easy-VQA (%)\n\n{_against_tokens(vlm, results, 'easy')}",
        _by_kind_at(vlm, results, 9),
        _by_kind_at(vlm, results, 16),
        "## At which depth is the image read? (%)\n\nAll visual tokens are dropped after the first k decoder layers "
        f"({sample.drop_scenes} scenes, {sample.row_easy} easy-VQA pictures).\n\n{_depth(results['depth'])}",
        card_text.CLOSING.format(
            words=facts["words"],
            query=vlm.query_name,
            scenes=sample.scenes,
            easy=sample.easy,
            row_scenes=sample.row_scenes,
            row_easy=sample.row_easy,
        ),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _training(recipe: Recipe, facts: dict[str, Any]) -> str:
    ours = {name: text.format(place_layer=PLACE_LAYER) for name, text in card_text.OF_MODEL[recipe.model].items()}
    return card_text.TRAINING[recipe.model].format(
        model=recipe.model,
        reading=_layers(READ_LAYER),
        compare=COMPARE_LAYER,
        verdict=VERDICT_LAYER,
        seed=recipe.seed,
        hardware=facts["hardware"],
        **ours,
    )
