"""What transformers answers, computed before the first engine starts: vLLM changes classes of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import KINDS, Ask, folder, question, reference

from vtprune.integrations.vllm.settings import served_methods

DEFAULT = 16
# portrait and landscape; on some pictures (LLaVA, 96 x 144) vispruner's rounds hang on a difference of 1e-7, which
# transformers itself decides otherwise once pixels are shaken by 1e-6
SWEEP = (Ask(((120, 200),)), Ask(((200, 120),), keep=8))
# budgets of their own, everything, one token, long text, two pictures
MIXED = (
    Ask(((120, 200),)),
    Ask(((160, 96),), keep=5),
    Ask(((144, 144),), keep="50%"),
    Ask(((120, 200),), keep=10**6),
    Ask(((160, 96),), keep=1, long=True),
    Ask(((96, 160), (200, 120)), keep=0.25, long=True),
    Ask(((200, 120),), long=True),
)
Expected = dict[tuple[str, str, Ask], tuple[list[list[int]], list[int]]]
"""(kept sets, answer) by kind, method and request."""
# by CLS, or by what a patch receives; and one that merges
MIXED_METHODS = ("fastervlm", "visionzip")


def methods(geometry: Any) -> list[str]:
    """What the plugin serves on this model."""
    found = [name for name, reason in served_methods(geometry).items() if not reason]
    return found if "flowcut" in found else [*found, "flowcut(text_cut=False)"]


def swept(kind: str) -> list[str]:
    from vtprune.hooks import geometry
    from vtprune.loading import load_config

    return methods(geometry(load_config(f"tiny:{'qwen2_vl' if kind.startswith('qwen') else kind}")))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: folder(kind, root) for kind in KINDS}


@pytest.fixture(scope="session")
def questions(checkpoints: dict[str, Path]) -> dict[str, str]:
    """By kind, the text behind the last image of a prompt."""
    from transformers import AutoProcessor

    return {kind: question(kind, AutoProcessor.from_pretrained(place)) for kind, place in checkpoints.items()}


@pytest.fixture(scope="session")
def expected(checkpoints: dict[str, Path]) -> Expected:
    """What transformers answers to everything that is asked."""
    return references(checkpoints, {kind: swept(kind) for kind in KINDS})


def references(checkpoints: dict[str, Path], by_kind: dict[str, list[str]]) -> Expected:
    """What transformers answers with these methods on these checkpoints."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for kind, names in by_kind.items():
        for method in names:
            for ask in dict.fromkeys((*SWEEP, *(MIXED if method in MIXED_METHODS else ()))):
                found[kind, method, ask] = reference(kind, checkpoints[kind], method, DEFAULT, ask)
    torch.set_num_threads(threads)
    return found
