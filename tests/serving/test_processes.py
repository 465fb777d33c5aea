"""The plugin in engines whose parts are processes of their own: tensor parallel ranks, and the HTTP server."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DEFAULT, MIXED, SWEEP, Expected, references
from engines import ENVIRONMENT, answers, engine, folder, picture

_METHODS = ["visionzip", "divprune"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"llava": folder("llava", tmp_path_factory.mktemp("checkpoints"))}


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> Expected:
    return references(checkpoints, {"llava": _METHODS})


def test_two_ranks_equal_transformers(
    checkpoints: dict[str, Path], expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has half of the tower's heads, and all must choose by all of them."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    asks = [*MIXED]
    with engine(checkpoints["llava"], "visionzip", DEFAULT, "native", tensor_parallel_size=2) as llm:
        outputs = answers(llm, "llava", asks)
    want = [expected["llava", "visionzip", ask][1] for ask in asks]
    assert [list(output.outputs[0].token_ids) for output in outputs] == want


@pytest.fixture(scope="module")
def server(checkpoints: dict[str, Path], expected: Expected, tmp_path_factory: Any) -> Iterator[str]:
    """The address of `vtprune serve`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vtprune", "serve", str(checkpoints["llava"]), "--method", "divprune"]
    command += ["--keep", str(DEFAULT), "--port", str(port), "--name", "tiny", "--dtype", "float32"]
    command += ["--", "--enforce-eager", "--max-model-len", "512"]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(900):
            if process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        assert process.poll() is None, log.read_text()[-4000:]
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def _ask(address: str, size: tuple[int, int], **extra: Any) -> Any:
    encoded = io.BytesIO()
    picture(size).save(encoded, "PNG")
    url = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what color is the circle ?"}]
    body = {"model": "tiny", "temperature": 0, "max_tokens": 6, "min_tokens": 6, "ignore_eos": True, **extra}
    body["messages"] = [{"role": "user", "content": content}]
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def test_requests_over_http_have_budgets_of_their_own(
    server: str, checkpoints: dict[str, Path], expected: Expected
) -> None:
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(checkpoints["llava"])
    for ask in SWEEP:
        extra = {} if ask.keep is None else {"mm_processor_kwargs": {"vtprune_keep": ask.keep}}
        reply = _ask(server, ask.sizes[0], **extra)
        kept, answer = expected["llava", "divprune", ask]
        assert reply["usage"]["prompt_tokens"] == 11 + len(kept[0])
        assert (
            reply["choices"][0]["message"]["content"].split() == read.decode(answer, skip_special_tokens=True).split()
        )


@pytest.mark.parametrize("keep", [0, 2.5, "x"])
def test_wrong_budgets_over_http_are_400(server: str, keep: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        _ask(server, (120, 200), mm_processor_kwargs={"vtprune_keep": keep})
    assert caught.value.code == 400
    assert repr(keep) in json.loads(caught.value.read())["error"]["message"]


def test_a_question_that_nobody_reads_is_400_over_http(server: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        _ask(server, (120, 200), mm_processor_kwargs={"vtprune_question": "is it red ?"})
    assert caught.value.code == 400
    assert "divprune does not read the question" in json.loads(caught.value.read())["error"]["message"]
