"""Beams, multi-turn with a reused cache, interleaved and copied conversations."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from family_models import HOST_KEEPS_BEAM_ORDER
from models import IMAGE, LAYERS, TOKENS, Row, batch, llava
from oracle import hidden_keys, masked
from torch import Tensor
from transformers import DynamicCache

import vtprune

ROWS = (Row(1, 3, 5, 0), Row(1, 1, 4, 1))
METHODS = ["uniform", "fastv"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_beams_equal_masked_oracle(method: str, attention: str) -> None:
    model, inputs = llava(attention), batch(*ROWS)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 16, "do_sample": False}
    with vtprune.prune(model, method, 0.4) as session:
        out = model.generate(**inputs, **beams)
        report = session.report
    hidden = [h[::3] for h in hidden_keys(report, inputs["input_ids"].repeat_interleave(3, 0), LAYERS)]
    with masked(model, hidden):
        want = model.generate(**inputs, **beams)
    assert torch.equal(out, want)
    assert report.visual_tokens == (TOKENS,) * 6


@pytest.mark.skipif(not HOST_KEEPS_BEAM_ORDER, reason="this transformers mixes up several images of one prompt")
@pytest.mark.parametrize("method", [*METHODS, "flowcut"])
@torch.no_grad()
def test_beams_keep_what_greedy_keeps(method: str) -> None:
    model, inputs = llava(), batch(Row(2, 3, 5, 0), Row(1, 1, 4, 1))
    with vtprune.prune(model, method, 0.4) as session:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        greedy = session.report.kept
        model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=3)
        for one, three in zip(greedy, session.report.kept, strict=True):
            for b in range(2):
                for beam in range(3):
                    assert torch.equal(one.indices[b], three.indices[3 * b + beam])


def text(seed: int, length: int, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 98, (rows, length), generator=generator)


def converse(model: torch.nn.Module, turns: list[dict[str, Tensor]], reports: list, session: object) -> list[Tensor]:
    """Several turns over one cache; each turn's ids follow what was generated before."""
    cache, ids, mask, results = DynamicCache(config=model.config.text_config), None, None, []
    for turn in turns:
        ids = turn["input_ids"] if ids is None else torch.cat([ids, turn["input_ids"]], 1)
        mask = turn["attention_mask"] if mask is None else torch.cat([mask, turn["attention_mask"]], 1)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            **({"pixel_values": turn["pixel_values"]} if "pixel_values" in turn else {}),
        )
        results.append(out.sequences)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], out.sequences.shape[1] - ids.shape[1])], 1)
        ids = out.sequences
        if session is not None and "pixel_values" in turn:
            reports.append((session.report, ids.shape[1]))
    return results


@pytest.mark.parametrize("rows", [(Row(1, 3, 5, 0),), ROWS], ids=["single", "padded"])
@pytest.mark.parametrize(
    "method", [*METHODS, "flowcut", ["flowcut", "fastv"], vtprune.FastV(positions="compact")], ids=str
)
@torch.no_grad()
def test_second_and_third_turn_over_one_cache(method: object, rows: tuple[Row, ...]) -> None:
    """Turn 2 is text only, turn 3 brings a new image; the same rows alone must give the same answers."""
    model, n = llava(), len(rows)
    keep = [0.6, 0.4] if isinstance(method, list) else 0.4
    first = batch(*rows)
    second = {"input_ids": text(1, 4, n), "attention_mask": torch.ones(n, 4, dtype=torch.long)}
    third = batch(*[Row(1, 2, 3, 20 + b) for b in range(n)])
    with vtprune.prune(model, method, keep):
        together = converse(model, [first, second, third], [], None)
        for b, row in enumerate(rows):
            one = [batch(row), *({k: v[b : b + 1] for k, v in t.items()} for t in (second, third))]
            for whole, single in zip(together, converse(model, one, [], None), strict=True):
                assert torch.equal(whole[b, -single.shape[1] :][-5:], single[0, -5:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_turns_equal_masked_oracle(method: str, attention: str) -> None:
    model = llava(attention)
    turns = [
        batch(Row(1, 3, 5, 0)),
        {"input_ids": text(1, 4, 1), "attention_mask": torch.ones(1, 4, dtype=torch.long)},
        batch(Row(1, 2, 3, 20)),
    ]
    reports: list = []
    with vtprune.prune(model, method, 0.4) as session:
        out = converse(model, turns, reports, session)
    length = out[-1].shape[1]
    hidden = [torch.zeros(1, length, dtype=torch.bool) for _ in range(LAYERS)]
    images = (out[-1][0] == IMAGE).nonzero()[:, 0].split(TOKENS)
    for (report, _), positions in zip(reports, images, strict=True):
        ids = torch.zeros(1, length, dtype=torch.long)
        ids[0, positions] = IMAGE
        for layer, gone in enumerate(hidden_keys(report, ids, LAYERS)):
            hidden[layer] |= gone
    with masked(model, hidden):
        want = converse(model, turns, [], None)
    for got, expected in zip(out, want, strict=True):
        assert torch.equal(got, expected)


@torch.no_grad()
def test_conversations_interleave_and_survive_a_deep_copy() -> None:
    model = llava()
    a, b = batch(Row(1, 3, 5, 0)), batch(Row(1, 6, 2, 3))
    step = text(5, 1, 1)
    for method in ("uniform", "fastv"):
        with vtprune.prune(model, method, 0.4):

            def run(cache: DynamicCache, length: int) -> Tensor:
                mask = torch.ones(1, length + 1, dtype=torch.long)
                position = torch.tensor([[length]])
                return model(
                    input_ids=step, attention_mask=mask, position_ids=position, past_key_values=cache
                ).logits  # fmt: skip

            one = model(**a).past_key_values
            fork = copy.deepcopy(one)
            want_a = run(copy.deepcopy(one), a["input_ids"].shape[1])
            two = model(**b).past_key_values
            want_b = run(copy.deepcopy(two), b["input_ids"].shape[1])
            assert torch.equal(run(one, a["input_ids"].shape[1]), want_a)
            assert torch.equal(run(two, b["input_ids"].shape[1]), want_b)
            assert torch.equal(run(fork, a["input_ids"].shape[1]), want_a)
            assert not torch.equal(want_a, want_b)


@torch.no_grad()
def test_decode_without_position_ids_continues_from_the_logical_length() -> None:
    """A direct forward call leaves position_ids to the host, which asks the cache for the length."""
    model, inputs = llava(), batch(Row())
    step, length = text(5, 1, 1), inputs["input_ids"].shape[1]
    for method in ("uniform", "fastv", "flowcut"):
        with vtprune.prune(model, method, 0.4):
            implicit = model(input_ids=step, past_key_values=model(**inputs).past_key_values).logits
            explicit = model(
                input_ids=step, past_key_values=model(**inputs).past_key_values, position_ids=torch.tensor([[length]])
            ).logits
        assert torch.equal(implicit, explicit)


@torch.no_grad()
def test_threads_do_not_share_calls() -> None:
    model = llava()
    inputs = [batch(Row(1, 3, 5, s)) for s in range(2)]
    with vtprune.prune(model, "fastv", 0.4):
        want = [model.generate(**x, max_new_tokens=6, do_sample=False) for x in inputs]
        got: dict[tuple[int, int], Tensor] = {}

        def work(which: int) -> None:
            for i in range(3):
                got[which, i] = model.generate(**inputs[which], max_new_tokens=6, do_sample=False)

        threads = [threading.Thread(target=work, args=(w,)) for w in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(got) == 6
    assert all(torch.equal(out, want[which]) for (which, _), out in got.items())


@pytest.mark.parametrize("method", ["uniform", "fastv", "flowcut"])
@torch.no_grad()
def test_embeddings_with_placeholders_take_the_same_way_as_ids(method: str) -> None:
    model, inputs = llava(), batch(*ROWS)
    with vtprune.prune(model, method, 0.4):
        want = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        assert torch.equal(model(inputs_embeds=embeds, **inputs).logits, want)


@torch.no_grad()
def test_a_pruned_conversation_is_refused_by_a_session_that_keeps_all() -> None:
    model, inputs = llava(), batch(Row())
    with vtprune.prune(model, "fastv", 0.4):
        cache = model(**inputs).past_key_values
    with vtprune.prune(model, "fastv", 1.0), pytest.raises(vtprune.InputError, match="conversation of 26 tokens"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


@torch.no_grad()
def test_a_conversation_goes_on_under_another_session() -> None:
    """Turn 1 was cut at a layer, turn 2 is cut at the input: each keeps its own columns in every layer."""
    model = llava()
    first, second = batch(Row(1, 3, 5, 0)), batch(Row(1, 2, 3, 20))
    length = first["input_ids"].shape[1]
    mask = torch.ones(1, length + second["input_ids"].shape[1], dtype=torch.long)

    def turns(one: object, two: object) -> tuple[Tensor, list]:
        cache, reports = DynamicCache(config=model.config.text_config), []
        for method, turn, seen in ((one, first, mask[:, :length]), (two, second, mask)):
            inputs = {**turn, "attention_mask": seen, "past_key_values": cache}
            if method is None:
                logits = model(**inputs).logits
                continue
            with vtprune.prune(model, method, 0.4) as session:
                logits = model(**inputs).logits
                reports.append(session.report)
        return logits, reports

    got, reports = turns("fastv", "uniform")
    parts = [hidden_keys(r, t["input_ids"], LAYERS) for r, t in zip(reports, (first, second), strict=True)]
    hidden = [torch.cat(pair, 1) for pair in zip(*parts, strict=True)]
    with masked(model, hidden):
        want, _ = turns(None, None)
    seen = ~parts[1][-1]
    torch.testing.assert_close(got[seen], want[seen], atol=1e-5, rtol=1e-5)
