"""vLLM with the plugin keeps the same tokens and gives the same greedy answers as transformers with vtprune."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import DEFAULT, MIXED, MIXED_METHODS, SWEEP, Expected, swept
from engines import KINDS, NEW, Ask, answers, engine, kept_sets, picture, prompt, switch, vision_side, worker_model

from vtprune.errors import UnsupportedModelError
from vtprune.integrations.vllm import generic
from vtprune.integrations.vllm.bench import serve_rounds
from vtprune.integrations.vllm.settings import BACKENDS, served_methods
from vtprune.specs import parse_method

# prefills in chunks of 16 tokens that cut through every picture, blocks so small that prompts share some
_CHUNKS = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True, "block_size": 32}
# and so few of them that requests are preempted
_ENGINES: dict[str, dict[str, Any]] = {
    "llava": {"disable_log_stats": False},
    "qwen2_vl": {**_CHUNKS, "num_gpu_blocks_override": 10, "max_model_len": 288, "disable_log_stats": False},
    "qwen2_5_vl": {},
    "internvl": _CHUNKS,
}


@pytest.fixture(scope="module", params=itertools.product(BACKENDS, KINDS), ids="-".join)
def running(request: Any, checkpoints: dict[str, Path], expected: Expected) -> Iterator[tuple[str, Any]]:
    """(kind, an engine): one start for each, the settings are switched in place."""
    backend, kind = request.param
    with engine(checkpoints[kind], "divprune", DEFAULT, backend, **_ENGINES[kind]) as llm:
        yield kind, llm


def _tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_the_settings_of_the_start_rule(running: tuple[str, Any], expected: Expected) -> None:
    kind, llm = running
    with kept_sets() as found:
        outputs = answers(llm, kind, SWEEP)
    assert sorted(found) == sorted(kept for ask in SWEEP for kept in expected[kind, "divprune", ask][0])
    assert _tokens(outputs) == [expected[kind, "divprune", ask][1] for ask in SWEEP]


def test_every_method_equals_transformers(
    running: tuple[str, Any], expected: Expected, questions: dict[str, str]
) -> None:
    kind, llm = running
    wrong = {}
    for method in swept(kind):
        switch(llm, method, DEFAULT)
        asked = {"vtprune_question": questions[kind]} if parse_method(method).reads_text else {}
        with kept_sets() as found:
            outputs = answers(llm, kind, SWEEP, **asked)
        kept = sorted(found) == sorted(kept for ask in SWEEP for kept in expected[kind, method, ask][0])
        said = _tokens(outputs) == [expected[kind, method, ask][1] for ask in SWEEP]
        if not (kept and said):
            wrong[method] = {"kept": kept, "answers": said}
    assert wrong == {}
    assert len(swept(kind)) >= 14


def test_no_cache_serves_tokens_of_another_question(running: tuple[str, Any], questions: dict[str, str]) -> None:
    kind, llm = running
    switch(llm, "cdpruner", DEFAULT)
    ask, found = SWEEP[0], []
    for question in (questions[kind], "which digit is in the blue frame ?", questions[kind], ""):
        with kept_sets() as kept:
            answers(llm, kind, [ask], vtprune_question=question)
        found.append(kept)
    first, second, again, none = found
    assert len(first) == len(second) == len(none) == 1
    assert again == []
    assert first != second
    assert first != none


@pytest.mark.parametrize(
    ("method", "asked", "said"),
    [
        ("cdpruner", {}, "cdpruner chooses tokens by the question"),
        ("cdpruner", {"vtprune_question": ["x"]}, r"got \['x'\]"),
        ("divprune", {"vtprune_question": "is it red ?"}, "divprune does not read the question"),
    ],
)
def test_questions_that_cannot_be_right_are_refused(
    running: tuple[str, Any], method: str, asked: dict[str, Any], said: str
) -> None:
    kind, llm = running
    switch(llm, method, DEFAULT)
    with pytest.raises(ValueError, match=said):
        answers(llm, kind, SWEEP[:1], **asked)


@pytest.mark.parametrize("method", MIXED_METHODS)
def test_mixed_requests_equal_transformers(running: tuple[str, Any], expected: Expected, method: str) -> None:
    kind, llm = running
    switch(llm, method, DEFAULT)
    outputs = answers(llm, kind, MIXED)
    want = [expected[kind, method, ask] for ask in MIXED]
    assert _tokens(outputs) == [answer for _, answer in want]
    assert len({tuple(answer) for _, answer in want}) > 3
    # B placeholders of each picture stand in the prompt
    picture = worker_model(llm).config.image_token_id
    assert [list(o.prompt_token_ids).count(picture) for o in outputs] == [sum(map(len, kept)) for kept, _ in want]
    # once more, from whatever has been cached
    with kept_sets() as found:
        again = answers(llm, kind, MIXED)
    assert _tokens(again) == [answer for _, answer in want]
    assert len(found) < len(MIXED)
    if "block_size" in _ENGINES[kind]:
        assert max(o.num_cached_tokens for o in again) >= 32


def test_requests_that_were_preempted_equal_transformers(running: tuple[str, Any], expected: Expected) -> None:
    kind, llm = running
    if "num_gpu_blocks_override" not in _ENGINES[kind]:
        pytest.skip("this engine has room for all requests")
    switch(llm, "fastervlm", DEFAULT)
    asks = [ask for ask in MIXED if ask.long] * 3
    llm.reset_prefix_cache()
    outputs = answers(llm, kind, asks, new=40)
    assert [tokens[:6] for tokens in _tokens(outputs)] == [expected[kind, "fastervlm", ask][1] for ask in asks]
    (count,) = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert count > 0


def test_another_choice_gives_other_answers(running: tuple[str, Any], expected: Expected) -> None:
    """The control: what the other tests compare is not the same whatever is kept."""
    kind, llm = running
    switch(llm, "uniform", DEFAULT)
    with kept_sets() as found:
        outputs = answers(llm, kind, SWEEP)
    assert sorted(found) != sorted(kept for ask in SWEEP for kept in expected[kind, "fastervlm", ask][0])
    assert _tokens(outputs) == [expected[kind, "uniform", ask][1] for ask in SWEEP]
    assert any(_tokens(outputs) != [expected[kind, rival, ask][1] for ask in SWEEP] for rival in swept(kind))


def test_the_benchmark_counts_what_enters(running: tuple[str, Any]) -> None:
    from vllm import SamplingParams

    kind, llm = running
    if kind != "llava":
        pytest.skip("tried on one engine")
    switch(llm, "uniform", 1.0)

    def request(number: int) -> dict[str, Any]:
        ask = Ask(((100 + number, 120),))
        return {"prompt": prompt(kind, ask), "multi_modal_data": {"image": picture(ask.sizes[0])}}

    greedy = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    rows = list(serve_rounds(llm, request, (1.0, 16), (1, 4), rounds=1, sampling=greedy))
    assert [(row.keep, row.concurrency) for row in rows] == [(1.0, 1), (16, 1), (1.0, 4), (16, 4)]
    assert [row.prompt_tokens for row in rows] == [267, 27, 267, 27]
    assert all(row.requests_per_s > 0 and 0 < row.first_token_ms < 1e5 for row in rows)


def test_wrong_positions_give_other_answers(
    running: tuple[str, Any], expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: places of tokens matter under M-RoPE, so equal answers prove them."""
    kind, llm = running
    if not kind.startswith("qwen"):
        pytest.skip("positions have one axis")
    switch(llm, "fastervlm", DEFAULT)
    monkeypatch.setattr(generic, "fill_positions", lambda positions, *_: positions)
    llm.reset_prefix_cache()
    outputs = answers(llm, kind, MIXED)
    assert _tokens(outputs) != [expected[kind, "fastervlm", ask][1] for ask in MIXED]


@pytest.mark.parametrize("keep", [0, -3, 1.5, "many", True, [8]])
def test_wrong_budgets_are_refused(running: tuple[str, Any], keep: Any) -> None:
    kind, llm = running
    with pytest.raises(ValueError, match="vtprune_keep: keep must be an int >= 1") as caught:
        answers(llm, kind, [Ask(((120, 200),), keep=keep)])
    assert repr(keep) in str(caught.value)


def test_a_prompt_without_images_needs_no_question(running: tuple[str, Any]) -> None:
    kind, llm = running
    switch(llm, "cdpruner", DEFAULT)
    (output,) = answers(llm, kind, [Ask(())])
    assert len(_tokens([output])[0]) == NEW


def test_no_part_is_built_twice(running: tuple[str, Any]) -> None:
    _, llm = running
    model = worker_model(llm)
    names = [name for name, _ in model.named_parameters()]
    if model is vision_side(llm):
        assert all(name.startswith(("model.", "lm_head.")) for name in names)
    else:
        assert all(name.startswith(("language_model.", "vision_side.model.")) for name in names)
        assert not any(name.startswith("vision_side.model.language_model") for name in names)
        assert any(name.startswith("vision_side.model.") for name in names)


@pytest.mark.parametrize("option", ["compile_mm_encoder", "cudagraph_mm_encoder"])
def test_options_that_go_around_the_hooks_are_refused(option: str) -> None:
    given = {"compile_mm_encoder": False, "cudagraph_mm_encoder": False, option: True}
    config = SimpleNamespace(compilation_config=SimpleNamespace(**given))
    with pytest.raises(UnsupportedModelError, match=f"leave {option} off"):
        generic.VTPruneModel(vllm_config=config)


def test_refused_methods_say_why(running: tuple[str, Any]) -> None:
    _, llm = running
    reasons = served_methods(vision_side(llm).pruner.geometry)
    assert "inside the decoder" in reasons["fastv"]
    assert "compares the frames" in reasons["vidcom2"]
