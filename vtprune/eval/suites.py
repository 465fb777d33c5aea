"""Names for groups of tasks that papers of this field report together."""

from __future__ import annotations

from collections.abc import Sequence

from vtprune.eval import DEFAULT_TASKS

__all__ = ["SUITES", "expand_suites"]

SUITES: dict[str, tuple[str, ...]] = {
    # offline, for the embedded models
    "embedded": DEFAULT_TASKS,
    # offline, one ability each (docs/tasks.md)
    "abilities": ("vtp_words", "vtp_count", "vtp_fine", "vtp_pairs", "vtp_video"),
    # the tables of FastV, SparseVLM, VisionZip, FlowCut and others on LLaVA-1.5. MMBench is the variant that is scored
    # by rule; TextVQA asks without OCR tokens, where the papers' prompts have them; VQAv2 and VizWiz are the validation
    # sets, where the papers ask their test servers
    "llava15": (
        "gqa",
        "mmbench_en_dev_static",
        "mme",
        "pope",
        "scienceqa_img",
        "vqav2_val",
        "textvqa_val",
        "vizwiz_vqa_val",
    ),
    "ocr": ("textvqa_val", "docvqa_val", "chartqa", "infovqa_val", "ocrbench"),
    "video": ("videomme", "egoschema_subset", "mlvu_dev"),
    # where pruning is known to collapse
    "grounding": ("refcoco_bbox_rec_val", "refcoco+_bbox_rec_val", "refcocog_bbox_rec_val"),
}


def expand_suites(names: Sequence[str]) -> tuple[str, ...]:
    """Tasks in order, each once; a suite's name stands for its tasks."""
    return tuple(dict.fromkeys(task for name in names for task in SUITES.get(name, (name,))))
