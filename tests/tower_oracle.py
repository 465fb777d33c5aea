"""The tower's masked oracle: the unpruned tower in which what left is hidden as keys from the block after the cut.

Written independently of vtprune's engine: it knows the indices in a report, and of each host which patches make which
token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from family_models import Case, Row
from torch import Tensor

from vtprune import Report

LOWEST = torch.finfo(torch.float32).min
# a patch: the picture (in the tower's batch; 0 where all share one sequence) and its row there
Patch = tuple[int, int]


@dataclass
class Encoded:
    """What the tower makes of all media of one kind in a call.

    Attributes:
        tokens: the patches of each visual token, in the order of the tokens; none for a newline.
        units: which crop or frame each token comes from, -1 for a newline.
        padding: patches of each unit that no token is made of.
        sizes: patches of each row of the tower's batch.
    """

    tokens: list[list[Patch]] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    padding: dict[int, list[Patch]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)


def _square(rows: int, cols: int, merge: int) -> list[list[int]]:
    """Patches of each token of a grid of rows x cols tokens, patches row by row."""
    wide = cols * merge
    return [
        [(r * merge + a) * wide + c * merge + b for a in range(merge) for b in range(merge)]
        for r in range(rows)
        for c in range(cols)
    ]


def _windows(rows: int, cols: int, side: int) -> list[int]:
    """Tokens of a grid in the order of windows of side x side tokens."""
    return [
        r * cols + c
        for top in range(0, rows, side)
        for left in range(0, cols, side)
        for r in range(top, min(top + side, rows))
        for c in range(left, min(left + side, cols))
    ]


def _crops(case: Any, size: tuple[int, int]) -> tuple[int, list[int]]:
    """Crops of an image of LLaVA-NeXT or LLaVA-OneVision, and which patch of all each token is (-1: a newline).

    Found by sending the numbers of the patches through the host's own way to pack features.
    """
    root, number = case.model().model, case._crops(size)
    named = {"vision_feature_select_strategy": "full"} if case.name != "llava_onevision" else {}
    features = torch.arange(number * 16.0).view(number, 16, 1)
    packed = root.pack_image_features([features], torch.tensor([size]), image_newline=torch.tensor([-1.0]), **named)
    return number, packed[0][0][:, 0].long().tolist()


def encoded(case: Case, kind: str, sizes: list[Any], alone: list[bool]) -> Encoded:
    """What the tower makes of media of these sizes; `alone` in a prompt or not."""
    found = Encoded()

    def unit(tokens: list[list[int]], *, alone: bool) -> None:
        start, number = (0, len(found.sizes)) if alone else (sum(found.sizes), 0)
        here = max(found.units, default=-1) + 1
        found.tokens += [[(number, start + patch) for patch in token] for token in tokens]
        found.units += [here] * len(tokens)
        found.sizes.append(sum(map(len, tokens)))

    def cropped(size: tuple[int, int]) -> None:
        number, order = _crops(case, size)
        first = len(found.sizes)
        found.tokens += [[] if patch < 0 else [(first + patch // 16, patch % 16)] for patch in order]
        found.units += [-1 if patch < 0 else first + patch // 16 for patch in order]
        for crop in range(first, first + number):
            seen = {patch % 16 for patch in order if first + patch // 16 == crop}
            found.padding[crop] = [(crop, patch) for patch in range(16) if patch not in seen]
        found.sizes += [16] * number

    for size, by_itself in zip(sizes, alone, strict=True):
        if kind == "video" and case.name == "llava_next_video":
            for _ in range(size):
                unit(_square(2, 2, 2), alone=True)
        elif case.name == "llava_onevision" and not by_itself:
            unit([*_square(4, 4, 1), []], alone=True)
        elif case.name in ("llava_next", "llava_next_video", "llava_onevision"):
            cropped(size)
        elif kind == "video" and case.name == "video_llava":
            for _ in range(size):
                unit([[], *_square(4, 4, 1)], alone=True)
        elif case.name in ("llava", "video_llava", "paligemma", "paligemma2"):
            unit(_square(4, 4, 1), alone=True)
        elif case.name in ("internvl", "idefics3", "smolvlm", "gemma3"):
            for _ in range(size or 1):
                unit(_square(4, 4, 2), alone=True)
        elif case.name == "mistral3":
            unit(_square(size[0] // 8, size[1] // 8, 2), alone=False)
        else:
            frames, rows, cols = size[0], size[1] // 2, size[2] // 2
            order = _windows(rows, cols, 2) if case.name == "qwen2_5_vl" else list(range(rows * cols))
            for _ in range(frames):
                unit([[4 * order.index(token) + i for i in range(4)] for token in range(rows * cols)], alone=False)
    return found


def gone(case: Case, rows: tuple[Row, ...], report: Report, blocks: int) -> dict[str, list[list[Patch]]]:
    """For each kind of media and each block the patches that it must not see."""
    media = [(kind, size, len(row.media) == 1) for row in rows for kind, size in row.media]
    towers = {
        kind: encoded(case, kind, [size for k, size, _ in media if k == kind], [a for k, _, a in media if k == kind])
        for kind in {kind for kind, _, _ in media}
    }
    tokens = case.encode(
        [(kind, size, 10 * row.seed + i) for row in rows for i, (kind, size) in enumerate(row.media)],
        [len(row.media) for row in rows],
    )[1]
    # (kind, token of that kind) for every visual token of every sample
    owner: list[list[tuple[str, int]]] = []
    at = dict.fromkeys(towers, 0)
    for row in rows:
        owner.append([])
        for kind, _ in row.media:
            number = tokens.pop(0)
            owner[-1] += [(kind, at[kind] + i) for i in range(number)]
            at[kind] += number
    result: dict[str, list[list[Patch]]] = {kind: [[] for _ in range(blocks)] for kind in towers}
    for record in report.kept:
        if record.site.kind != "vision":
            continue
        hit: dict[str, set[int]] = {kind: set() for kind in towers}
        for sample, kept in zip(owner, record.indices, strict=True):
            for kind, token in (sample[i] for i in set(range(len(sample))) - set(kept.tolist())):
                hit[kind].add(token)
        for kind, lost in hit.items():
            tower = towers[kind]
            patches = [patch for token in lost for patch in tower.tokens[token]]
            # a crop loses its padding with its first token
            for number in {tower.units[token] for token in lost}:
                patches += tower.padding.get(number, [])
            for block in range(record.site.index + 1, blocks):
                result[kind][block] += patches
    return result


def tower_of(model: Any) -> tuple[Any, list[Any]]:
    """The vision tower (that of images) and the attention modules of its blocks."""
    names = ("vision_tower", "image_tower", "vision_model", "visual")
    tower = next(getattr(model.model, name) for name in names if hasattr(model.model, name))
    return tower, _attention(tower)


def _attention(tower: Any) -> list[Any]:
    holder = next(getattr(tower, name) for name in ("encoder", "transformer", "blocks") if hasattr(tower, name))
    blocks = next((getattr(holder, name) for name in ("layers", "layer") if hasattr(holder, name)), holder)
    return [next(getattr(b, n) for n in ("self_attn", "attn", "attention") if hasattr(b, n)) for b in blocks]


def turned(module: Any, hidden: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key (after RoPE) and value, each [R, H, d], of a tower that packs its pictures."""
    query, key, value = module.qkv(hidden).view(len(hidden), 3, module.num_heads, -1).unbind(1)

    def turn(states: Tensor) -> Tensor:
        cos, sin = (angles[:, None].float() for angles in position_embeddings)
        first, second = states.chunk(2, -1)
        return states * cos + torch.cat([-second, first], -1) * sin

    return turn(query), turn(key), value


def _dense(module: Any, hidden: Tensor, cu_seqlens: Tensor, position_embeddings: Any, lost: list[Patch]) -> Tensor:
    """The attention of a tower that packs its pictures, written out."""
    total = len(hidden)
    query, key, value = turned(module, hidden, position_embeddings)
    logits = torch.einsum("qhd,khd->hqk", query, key) * module.scaling
    bounds = cu_seqlens.tolist()
    owner = torch.tensor([sum(row >= end for end in bounds[1:]) for row in range(total)])
    see = owner[:, None] == owner[None]
    see[:, [row for _, row in lost]] = False
    weights = logits.masked_fill(~see, LOWEST).softmax(-1)
    return module.proj(torch.einsum("hqk,khd->qhd", weights, value).reshape(total, -1))


@contextmanager
def tower_masked(model: Any, hidden: dict[str, list[list[Patch]]], lead: int) -> Iterator[None]:
    """Hide patches from each block of the tower; `lead` rows (CLS) stand before the patches of a unit."""
    root, undo, now = model.model, [], {"kind": ""}
    tower, modules = tower_of(model)
    # whichever encodes; only one does at a time
    twins = [tower, *([root.video_tower] if hasattr(root, "video_tower") else [])]

    def told(kind: str) -> None:
        name = f"get_{kind}_features"
        encode = getattr(root, name)

        @functools.wraps(encode)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            # some hosts encode videos by way of their images
            outer = now["kind"]
            now["kind"] = outer or kind
            try:
                return encode(*args, **kwargs)
            finally:
                now["kind"] = outer

        setattr(root, name, wrapped)
        undo.append(lambda: delattr(root, name))

    def masking(block: int) -> Any:
        def pre(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            given = kwargs.get("attention_mask")
            mask = (
                states.new_zeros(len(states), 1, states.shape[1], states.shape[1]) if given is None else given.clone()
            )
            for unit, row in hidden[now["kind"]][block]:
                mask[unit, :, :, lead + row] = LOWEST
            return args, {**kwargs, "attention_mask": mask}

        return pre

    for kind in hidden:
        told(kind)
    for block, module in [pair for twin in twins for pair in enumerate(_attention(twin))]:
        if hasattr(module, "qkv"):

            def dense(
                states: Tensor, *, cu_seqlens: Tensor, position_embeddings: Any, block: int = block, **_: Any
            ) -> Any:
                lost = hidden[now["kind"]][block]
                return _dense(modules[block], states, cu_seqlens, position_embeddings, lost)

            module.forward = dense
            undo.append(lambda module=module: vars(module).pop("forward"))
        else:
            undo.append(module.register_forward_pre_hook(masking(block), with_kwargs=True).remove)
    try:
        yield
    finally:
        for back in undo:
            back()
