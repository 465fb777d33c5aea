"""The demo's functions for programs, over HTTP: typed names, the same answers, and nothing that reads other files."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import gradio_client
import httpx
import pytest
from demo_server import HERE, Server, running, server
from gradio_client.exceptions import AppError

import vtprune
from vtprune.examples import example

__all__ = ["server"]

pytestmark = pytest.mark.slow
QUESTION = "where is the digit 4?"


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return gradio_client.Client(server.address, verbose=False)


def _files(*paths: Path) -> list[Any]:
    return [gradio_client.handle_file(str(path)) for path in paths]


def _post(server: Server, body: Any) -> tuple[int, str]:
    address = f"{server.address}gradio_api/call/ask"
    request = urllib.request.Request(address, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def _raw(path: str) -> list[Any]:
    """The arguments of /ask with a file that is named and was not uploaded by a client."""
    named = {"path": path, "meta": {"_type": "gradio.FileData"}}
    return [[named], QUESTION, "tiny:llava", "flowcut", "25%", "", "50%", "", "average", 8]


def _ask(server: Server, path: str) -> str:
    """The events of one call."""
    status, answer = _post(server, {"data": _raw(path)})
    assert status == 200, answer
    with urllib.request.urlopen(f"{server.address}gradio_api/call/ask/{json.loads(answer)['event_id']}") as response:
        return response.read().decode()


def test_what_is_public_is_named_and_typed(client: Any) -> None:
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert sorted(endpoints) == ["/ask", "/methods", "/models", "/plan", "/stability"]
    names = [parameter["parameter_name"] for parameter in endpoints["/ask"]["parameters"]]
    assert names == [
        *("files", "question", "model", "method", "keep"),
        *("first", "first_keep", "beside", "basis", "max_new_tokens"),
    ]
    types = {p["parameter_name"]: p["python_type"]["type"] for p in endpoints["/ask"]["parameters"]}
    assert types["question"] == "str"
    assert types["max_new_tokens"] == "float"
    assert "filepath" in types["files"]


def test_lists(client: Any) -> None:
    assert client.predict(api_name="/models")[0] == "tiny:llava"
    assert client.predict(api_name="/methods") == vtprune.methods()


def test_a_plan_loads(client: Any) -> None:
    found = client.predict(model="tiny:llava", method="flowcut", keep="25%", api_name="/plan")
    assert (found["visual_tokens"], found["average_tokens"]) == (256, 64)
    plan = vtprune.Plan.from_dict(found["plan"])
    assert str(plan.stages[-1].site) == "vision[2]"


def test_an_answer(client: Any) -> None:
    result = client.predict(
        files=_files(*example("scene_1").files),
        question=QUESTION,
        method="flowcut",
        keep="25%",
        beside="fastv",
        api_name="/ask",
    )
    assert result["unpruned"]["answer"] == "bottom left"
    flowcut, fastv = result["pruned"]
    assert (flowcut["method"], flowcut["keep"], flowcut["answer"]) == ("flowcut", "25%", "bottom left")
    assert flowcut["same_answer"]
    assert flowcut["report"]["average_tokens"] == [64.0]
    assert fastv["method"] == "fastv"
    assert flowcut["prefill_seconds"] > 0
    assert result["timing_rounds"] >= 1
    assert result["settings"]["question"] == QUESTION


def test_two_pictures_and_a_film(client: Any) -> None:
    for name in ("pairs", "films"):
        shown = example(name)
        text, answer = shown.questions[0]
        result = client.predict(
            files=_files(*shown.files), question=text, model="tiny:qwen2_vl_plus", keep="75%", api_name="/ask"
        )
        assert result["unpruned"]["answer"] == answer


def test_stability(client: Any) -> None:
    points = client.predict(
        files=_files(*example("scene_1").files), question=QUESTION, keeps="100%,1/16", api_name="/stability"
    )
    assert [point["keep"] for point in points] == ["100%", "1/16"]
    assert [point["same"] for point in points] == [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "fasttv"}, "Did you mean 'fastv'"),
        ({"keep": "150%"}, "'150%'"),
        ({"model": "/etc"}, "Unknown model of this demo '/etc'"),
        ({"method": "dyvte(weights='/etc')"}, "weights of dyvte cannot be set here"),
        ({"question": " "}, "There is no question"),
        ({"files": []}, "There is no picture"),
        ({"basis": "all"}, "basis must be one of"),
        ({"max_new_tokens": 100_000}, "1 to 256 new tokens"),
    ],
)
def test_wrong_values_are_said(client: Any, changes: dict[str, Any], message: str) -> None:
    asked = {"files": _files(*example("scene_1").files), "question": QUESTION, **changes}
    with pytest.raises(AppError) as raised:
        client.predict(**asked, api_name="/ask")
    assert message in str(raised.value)


def test_only_uploaded_files_are_read(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(example("scene_1").files[0].read_bytes())
    # the same picture is read once it was uploaded
    with secret.open("rb") as file:
        (uploaded,) = httpx.post(f"{server.address}gradio_api/upload", files={"files": file}).json()
    assert "event: complete" in _ask(server, uploaded)
    for path in (str(secret), str(server.log), "log.txt", "../../etc/hostname"):
        assert "event: error" in _ask(server, path)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.address}gradio_api/file={urllib.parse.quote(path)}")
        refused.value.close()
        assert refused.value.code in (403, 404)


def test_addresses_are_refused_and_not_fetched(server: Server) -> None:
    status, answer = _post(server, {"data": _raw("http://example.org/a.png")})
    assert status == 400
    assert "is an address, and this demo fetches none" in answer
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server.address}gradio_api/file=http://example.org/a.png")
    refused.value.close()
    assert refused.value.code == 400


def test_the_page_s_own_functions_are_not_for_programs(server: Server) -> None:
    with urllib.request.urlopen(f"{server.address}gradio_api/info") as response:
        info = json.load(response)
    assert set(info["named_endpoints"]) == {"/ask", "/methods", "/models", "/plan", "/stability"}
    assert not info["unnamed_endpoints"]


def test_the_server_reached_for_nothing_else(server: Server, client: Any) -> None:
    client.predict(api_name="/models")
    assert not server.tried.exists(), server.tried.read_text(encoding="utf-8")


def test_a_port_that_is_taken_is_said(server: Server, tmp_path: Path) -> None:
    taken = str(urllib.parse.urlsplit(server.address).port)
    command = [sys.executable, str(HERE / "demo_process.py"), str(tmp_path / "tried.txt"), "--port", taken]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=180)
    assert ended.returncode == 2
    assert f"cannot listen on 127.0.0.1:{taken}" in ended.stderr
    assert "Choose another --port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_demo_serves_a_checkpoint_from_a_folder(tmp_path: Path) -> None:
    model, processor = vtprune.load_tiny("qwen2_vl")
    model.save_pretrained(tmp_path / "mine")
    processor.save_pretrained(tmp_path / "mine")
    with running(tmp_path, "--model", str(tmp_path / "mine")) as demo:
        client = gradio_client.Client(demo.address, verbose=False)
        shown = example("scene_0")
        text, answer = shown.questions[0]
        result = client.predict(files=_files(*shown.files), question=text, api_name="/ask")
    assert result["settings"]["model"] == str(tmp_path / "mine")
    assert result["unpruned"]["answer"] == answer
