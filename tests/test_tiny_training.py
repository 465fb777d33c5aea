"""What the training code runs is the model that ships: same tower, same tokens, same logits, labels in place."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vtprune.errors import UnknownNameError
from vtprune.tiny import load_tiny, vocabulary
from vtprune.tiny.scenes import scene_objects

pytest.importorskip("sklearn")

from vtprune.tiny.training import pruning
from vtprune.tiny.training.decoder import answer_logits, drop_visual, pack_inputs, run_decoder
from vtprune.tiny.training.evaluation import keeps
from vtprune.tiny.training.losses import place_loss
from vtprune.tiny.training.network import Trainee
from vtprune.tiny.training.packing import NO_REGION, scene_batch, token_labels
from vtprune.tiny.training.recipe import recipe_for
from vtprune.tiny.training.vlms import VLMS, Vlm, vlm_class

NAMES = sorted(VLMS)


@lru_cache
def shipped(name: str) -> tuple[Vlm, Any]:
    """The training code's network around the shipped weights, and the shipped processor."""
    vlm = vlm_class(name)()
    vlm.hf, processor = load_tiny(name)
    return vlm.eval(), processor


def encode(name: str, image: np.ndarray, question: str) -> dict[str, torch.Tensor]:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    processor = shipped(name)[1]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(images=Image.fromarray(image), text=text, return_tensors="pt"))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_packed_questions_get_the_logits_of_the_shipped_model(name: str) -> None:
    """Many questions in one row, towers in one batch, images resized by us: the front door gives the same."""
    vlm, _ = shipped(name)
    batch = scene_batch(vlm.grid, "dev", 0, 0, 3)
    packed = pack_inputs(vlm, batch, vlm.see(batch.images))
    logits, _ = answer_logits(vlm, batch, run_decoder(vlm, packed)[0], packed.prefix)
    for scene in range(3):
        rows = (batch.targets[:, 0] == scene) & (batch.targets[:, 3] == 1)
        mine = logits[int(np.flatnonzero(rows)[0])]
        inputs = encode(name, batch.images[scene], batch.drafts[scene][1].question)
        theirs = vlm.hf(**inputs).logits[0, -1]
        # bicubic resizing rounds differently in Pillow and torchvision
        torch.testing.assert_close(mine, theirs, atol=1e-4 if name == "llava" else 0.2, rtol=1e-4)
        assert mine.argmax() == theirs.argmax()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_tower_is_that_of_the_real_class(name: str) -> None:
    vlm, processor = shipped(name)
    batch = scene_batch(vlm.grid, "dev", 0, 0, 2, questions=0)
    side = vlm.grid.pixels
    resized = [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in batch.images]
    inputs = processor.image_processor(resized, return_tensors="pt")
    known = ("pixel_values", "image_grid_thw")
    theirs = vlm.hf.model.get_image_features(**{k: v for k, v in inputs.items() if k in known}).pooler_output
    torch.testing.assert_close(vlm.see(batch.images), torch.stack(list(theirs)), atol=1e-4, rtol=1e-4)
    attention = vlm.tower_attention(batch.images)
    assert attention.shape == (2, vlm.grid.tokens)
    # what is missing to 1 is what CLS pays to itself
    total = attention.sum(1)
    assert bool((total <= 1 + 1e-5).all())
    if vlm.query_name == "mean-query attention":
        torch.testing.assert_close(total, torch.ones(2))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_dropped_tokens_keep_their_positions(name: str) -> None:
    """Dropping before the decoder equals dropping from the packed row; rotary places are those on the picture."""
    vlm, _ = shipped(name)
    batch = scene_batch(vlm.grid, "dev", 0, 5, 2)
    visual = vlm.see(batch.images)
    keep = pruning.random_rule(vlm.grid, 2, 20, torch.Generator().manual_seed(0))
    early, late = pack_inputs(vlm, batch, visual, keep), drop_visual(pack_inputs(vlm, batch, visual), keep)
    for one, two in zip(early, late, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
    across = keep % vlm.grid.side if len(early.positions) == 3 else keep
    assert torch.equal(early.positions[-1][:, early.before : early.prefix], early.before + across)


@pytest.mark.parametrize("name", NAMES)
def test_labels_stand_where_the_objects_are(name: str) -> None:
    grid = vlm_class(name).grid
    scale = grid.pixels / vocabulary.IMAGE_SIZE
    for index in range(12):
        objects = scene_objects("dev", 0, index)
        kind, color, region, owner, place = token_labels(grid, objects)
        assert set(np.unique(region[owner < 0])) <= {NO_REGION}
        for number, item in enumerate(objects):
            row, column = (int(axis * scale // grid.cell) for axis in item.center)
            token = row * grid.side + column
            if not item.askable and owner[token] != number:
                continue  # clutter gives way to what is asked about
            assert owner[token] == number
            assert (kind[token], color[token], region[token]) == (
                item.kind + 1,
                item.color + 1,
                item.row * 3 + item.column,
            )
            patch = grid.cell / grid.merge
            inner = [int(axis * scale % grid.cell // patch) for axis in item.center]
            assert place[token] == 1 + inner[0] * grid.merge + inner[1]
        far = [
            token
            for token in np.flatnonzero(owner >= 0)
            if max(
                abs((token // grid.side + 0.5) * grid.cell - objects[owner[token]].center[0] * scale),
                abs((token % grid.side + 0.5) * grid.cell - objects[owner[token]].center[1] * scale),
            )
            > (grid.cell + objects[owner[token]].size * scale) / 2
        ]
        assert not far


@pytest.mark.parametrize("name", ["internvl", "qwen2_vl"])
@torch.no_grad()
def test_a_warm_start_reads_symbols_at_once(name: str) -> None:
    """The decoder comes from the shipped LLaVA, and symbol tokens are what its visual tokens are made of."""
    torch.manual_seed(0)
    trainee = Trainee(name)
    vlm = trainee.vlm
    own = load_tiny("llava")[0]
    word = vocabulary.WORD_IDS["star"]
    assert torch.equal(vlm.hf.get_input_embeddings().weight[word], own.get_input_embeddings().weight[word])
    batch = scene_batch(vlm.grid, "dev", 0, 0, 6, painted=False)
    packed = pack_inputs(vlm, batch, trainee.symbols(batch.labels))
    logits, words = answer_logits(vlm, batch, run_decoder(vlm, packed)[0], packed.prefix)
    right = float((logits.argmax(-1) == words).float().mean())
    noise = pack_inputs(vlm, batch, torch.randn_like(trainee.symbols(batch.labels)))
    blind, _ = answer_logits(vlm, batch, run_decoder(vlm, noise)[0], noise.prefix)
    assert right > float((blind.argmax(-1) == words).float().mean()) + 0.05


@torch.no_grad()
def test_places_are_taught_only_where_nothing_else_tells_them() -> None:
    torch.manual_seed(0)
    for name in NAMES:
        trainee = Trainee(name)
        batch = scene_batch(trainee.vlm.grid, "dev", 0, 0, 2, painted=False)
        packed = pack_inputs(trainee.vlm, batch, trainee.symbols(batch.labels))
        loss = float(place_loss(trainee, packed, run_decoder(trainee.vlm, packed)[1], None))
        # an untrained reading of 9 rows and 9 columns
        assert (loss > 1.5) == (name == "qwen2_vl")
        assert name == "qwen2_vl" or loss == 0


def test_budgets_of_the_tables() -> None:
    assert keeps(256) == [128, 64, 28, 16, 8]
    assert keeps(81) == [40, 20, 9, 5, 2]
    for name in NAMES:
        grid = vlm_class(name).grid
        for keep in keeps(grid.tokens):
            chosen = pruning.grid_rule(grid, 2, keep)
            assert chosen.shape[0] == 2
            assert 0.6 * keep <= chosen.shape[1] <= keep
            assert len(set(chosen[0].tolist())) == chosen.shape[1]


def test_recipes_are_known_by_name() -> None:
    assert recipe_for("qwen2_vl", 3).model == "qwen2_vl"
    assert recipe_for("qwen2_vl", 3).seed == 3
    with pytest.raises(UnknownNameError, match="llava"):
        vlm_class("lava")
