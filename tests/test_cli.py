"""Every command through typer's runner: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import vtprune
from vtprune.budget import Budget
from vtprune.cli import app
from vtprune.commands.show import byte_text, flop_text, layers_text, share_text
from vtprune.cost import plan_cost
from vtprune.errors import InputError
from vtprune.examples import example
from vtprune.images import load_example
from vtprune.loading import load_config, load_model
from vtprune.plan import Plan
from vtprune.presets import build_random
from vtprune.tiny import tiny_folder

EMBEDDED = (tiny_folder("llava") / "config.json").is_file()
needs_embedded = pytest.mark.skipif(not EMBEDDED, reason="the embedded checkpoint is not in this tree")
_WORDS = ("<pad>", "<bos>", "<eos>", "<image>", "<unk>", "what", "is", "this", "?", *(f"w{i}" for i in range(119)))


def _invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def _fails(*args: str | Path) -> str:
    """The message of a command that must fail with vtprune's own error."""
    result = _invoke(*args)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    # transformers may have shown a progress bar before
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    return message


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaVA of toy size and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build_random("mini").save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    pixels = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(image_processor=pixels, tokenizer=tokenizer, **options).save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((48, 40)).save(path)
    return path


def test_methods_and_families_list_every_registered_name() -> None:
    assert json.loads(_invoke("methods", "--json").output) == vtprune.methods()
    table = _invoke("methods").output
    assert all(name in table for name in vtprune.methods())
    listed = json.loads(_invoke("families", "--json").output)
    assert {name: entry["verified"] for name, entry in listed.items()} == {
        name: info.verified for name, info in vtprune.families().items()
    }
    assert listed["llava"]["models"]["LlavaForConditionalGeneration"]["identity"] == "pass"
    table = " ".join(_invoke("families").output.split())
    assert all(name in table for name in vtprune.families())
    assert "a dry call on every model when it is wrapped" in table


def test_version() -> None:
    assert _invoke("--version").output.strip() == f"vtprune {vtprune.__version__}"


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['vtprune', '--help']\n"
        "try:\n    runpy.run_module('vtprune', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "sys.exit(str([m for m in ('torch', 'transformers', 'lmms_eval') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
    assert "eval" in done.stdout


def test_plan_prints_stages_tokens_and_shares() -> None:
    result = _invoke("plan", "--model", "random:llama-0.3b", "--method", "fastv", "--keep", "25%")
    assert result.exit_code == 0, result.output
    assert "fastv: 0.25 of the visual tokens averaged over the decoder layers" in result.output
    assert "layers 0: 576, 1-15: 115" in result.output
    assert "143.81 of 576" in result.output


@pytest.mark.parametrize("keep", ["1/4", "0.25", "25%", "144"])
def test_plan_reads_a_budget_in_every_notation(keep: str) -> None:
    result = _invoke("plan", "--model", "random:llama-0.3b", "--method", "uniform", "--keep", keep)
    assert "average a layer    144.00 of 576" in result.output


def test_plan_composes_and_saves(tmp_path: Path) -> None:
    saved = tmp_path / "plans" / "plan.json"
    args = ("--model", "random:llava-1.5-7b", "--method", "divprune,fastv", "--keep", "288,64")
    result = _invoke("plan", *args, "--save", saved)
    assert result.exit_code == 0, result.output
    assert "divprune: 288 visual tokens" in result.output
    assert "fastv: 64 visual tokens" in result.output
    plan = Plan.load(saved)
    assert [str(stage.site) for stage in plan.stages] == ["input", "layer[2]"]
    tokens = plan.tokens_per_layer((576,) * 32, 576)
    assert sum(tokens) / 32 == pytest.approx(64, abs=1)


def test_plan_is_what_prune_solves() -> None:
    from vtprune.commands.plan import solve_stages

    model = build_random("mini")
    plan, _ = solve_stages(["uniform", "fastv"], [12, 6], vtprune.geometry(model), basis="average", flops=None)
    with vtprune.prune(model, ["uniform", "fastv"], keep=[12, 6]) as session:
        assert session.plan == plan


def test_plan_counts_the_first_pass_of_a_restart() -> None:
    result = _invoke(
        "plan", "--model", "random:llava-1.5-7b", "--method", "gemfilter", "--keep", "64", "--basis", "final"
    )
    # 13 of 32 layers on all 576 tokens, then 64 everywhere
    assert f"average a layer    {13 * 576 / 32 + 64:.2f} of 576" in result.output
    model = vtprune.geometry(load_config("random:llava-1.5-7b"))
    share = plan_cost(vtprune.GemFilter().plan(model, Budget(64, "final")), model, "flops")
    assert f"({100 * share:.1f} %), text included" in result.output
    assert share > 13 / 32


def test_plan_spends_flops() -> None:
    result = _invoke("plan", "--model", "random:llama-0.3b", "--method", "uniform", "--flops", "0.5")
    assert "0.5 of the unpruned prefill FLOPs" in result.output
    assert "(50.0 %)" in result.output or "(49.9 %)" in result.output or "(50.1 %)" in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--method", "fastvv", "--keep", "64"), "Unknown method 'fastvv'. Did you mean 'fastv'?"),
        (("--method", "fastv", "--keep", "3"), "cannot reach 3 of 576"),
        (("--method", "fastv", "--keep", "64,32"), "got 2 (64,32) for 1 (fastv)"),
        (("--method", "fastv,uniform", "--keep", "64,32"), "got input (uniform) after layer[1] (fastv)"),
        (("--method", "fastv"), "fastv needs a budget"),
        (("--method", "fastv", "--keep", "many"), "got 'many'"),
        (("--method", "uniform", "--keep", "577"), "got 577 (576 visual tokens"),
        (("--method", "fastv", "--keep", "64", "--basis", "mean"), "got 'mean'"),
        (("--method", "fastv", "--keep", "64", "--flops", "0.5"), "got keep=64 and flops=0.5"),
        (("--method", "divprune,fastv", "--flops", "0.5"), "got 2 (divprune,fastv)"),
        (("--method", " , ", "--keep", "64"), "got ' , '"),
    ],
)
def test_plan_errors_name_the_value(args: tuple[str, ...], message: str) -> None:
    assert message in _fails("plan", "--model", "random:llama-0.3b", *args)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("random:llama-03b", "Unknown preset 'llama-03b'. Did you mean 'llama-0.3b'?"),
        ("random:llava-1.5-7b:layers=one", "got 'layers=one'"),
        ("random:llava-1.5-7b:depth=8", "got 'depth=8'"),
        ("tiny:lava", "Unknown tiny model 'lava'. Did you mean 'llava'?"),
        ("./nowhere", "there is no model folder './nowhere'"),
    ],
)
def test_model_errors_name_the_value(model: str, message: str) -> None:
    assert message in _fails("plan", "--model", model, "--keep", "64")


def test_a_folder_without_a_config_and_a_text_model_are_refused(tmp_path: Path) -> None:
    assert "holds no config.json" in _fails("plan", "--model", tmp_path, "--keep", "64")
    load_config("random:mini").text_config.save_pretrained(tmp_path)
    assert "no family serves model_type 'llama'" in _fails("plan", "--model", tmp_path, "--keep", "64")


def test_preset_depth_can_be_cut() -> None:
    assert load_config("random:llava-1.5-7b:layers=8").text_config.num_hidden_layers == 8


def test_load_model_refuses_unknown_dtype_and_device() -> None:
    with pytest.raises(InputError, match="got 'float8'"):
        load_model("random:mini", dtype="float8")
    with pytest.raises(InputError, match="got 'gpu'"):
        load_model("random:mini", device="gpu")


def test_run_compares_answers(checkpoint: Path, picture: Path) -> None:
    args = ("--model", checkpoint, "--image", picture, "--question", "what is this ?", "--max-new-tokens", "4")
    result = _invoke("run", *args, "--method", "uniform", "--keep", "1/4")
    assert result.exit_code == 0, result.output
    assert "same answer" in result.output or "differs from token" in result.output
    assert "layers 0-3: 4" in result.output
    assert "kept at input: 4 of 16" in result.output
    for part in ("decoder prefill", "vision tower", "KV cache", "prefill, median of"):
        assert part in result.output


def test_run_with_everything_kept_says_same_answer(checkpoint: Path, picture: Path) -> None:
    args = ("--model", checkpoint, "--image", picture, "--question", "what is this ?", "--max-new-tokens", "4")
    result = _invoke("run", *args, "--method", "fastv", "--keep", "100%")
    assert "same answer" in result.output
    assert "100.0 %" in result.output


def test_run_takes_a_saved_plan(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    assert _invoke("plan", "--model", checkpoint, "--keep", "50%", "--save", saved).exit_code == 0
    args = ("--model", checkpoint, "--image", picture, "--question", "what ?", "--max-new-tokens", "2")
    result = _invoke("run", *args, "--plan", saved)
    assert result.exit_code == 0, result.output
    assert "plan: fastv at layer[1]" in result.output
    assert "already says what to keep" in _fails("run", *args, "--plan", saved, "--keep", "4")


def test_run_errors_name_the_value(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    asked = ("--model", checkpoint, "--question", "what ?")
    note = tmp_path / "note.txt"
    note.write_text("no pixels here", encoding="utf-8")
    assert "note.txt' is not an image" in _fails("run", *asked, "--image", note)
    assert "there is no image file 'gone.png'" in _fails("run", *asked, "--image", "gone.png")
    assert "needs a --question" in _fails("run", "--model", checkpoint, "--image", picture)
    assert "random weights" in _fails("run", "--model", "random:mini", "--image", picture, "--question", "what ?")
    assert "there is no plan file 'gone.json'" in _fails("run", *asked, "--image", picture, "--plan", "gone.json")
    assert "got 17 (16 visual tokens" in _fails(
        "run", *asked, "--image", picture, "--method", "uniform", "--keep", "17"
    )


def test_eval_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import vtprune.cli as cli

    monkeypatch.setitem(cli._LAZY, "eval", ("a_module_that_is_not_there", "eval_command", ""))
    message = _fails("eval")
    assert "'a_module_that_is_not_there'" in message
    assert "pip install 'vtprune[eval]'" in message


def test_the_demo_without_gradio_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("gradio", "vtprune.demo", "vtprune.commands.demo"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    message = _fails("demo")
    assert "needs 'gradio'" in message
    assert "pip install 'vtprune[demo]'" in message


def test_the_demo_says_which_model_is_not_there() -> None:
    pytest.importorskip("gradio")
    assert "there is no model folder '/no/such/model'" in _fails("demo", "--model", "/no/such/model")
    assert "Unknown tiny model 'lava'" in _fails("demo", "--model", "tiny:lava")
    assert "random weights" in _fails("demo", "--model", "random:mini")


def test_eval_is_mounted() -> None:
    result = _invoke("eval", "--help")
    assert result.exit_code == 0, result.output
    assert "--keeps" in result.output


@needs_embedded
def test_plan_and_run_on_the_embedded_model() -> None:
    result = _invoke("plan", "--keep", "25%")
    assert result.exit_code == 0, result.output
    result = _invoke("run", "--keep", "50%")
    assert result.exit_code == 0, result.output
    assert "an example that ships with vtprune" in result.output
    _, question = load_example()
    assert question in result.output


@needs_embedded
def test_run_asks_about_an_example_by_name() -> None:
    pytest.importorskip("torchvision", reason="transformers makes the processor of this model with it")
    shown = example("films")
    args = ("--model", "tiny:qwen2_vl_plus", "--example", "films", "--method", "fastv", "--keep", "50%")
    result = _invoke("run", *args)
    assert result.exit_code == 0, result.output
    question, answer = shown.questions[0]
    assert str(shown.videos[0]) in result.output
    assert question in result.output
    # the film as the model was trained on it: resized up, it answers something else
    assert result.output.partition("answer")[2].split()[0] == answer
    message = _fails("run", "--example", "films", "--image", "a.png", "--question", "what?")
    assert "--example 'films' brings its own pictures" in message
    assert "Did you mean 'films'" in _fails("run", "--example", "film")


@needs_embedded
@pytest.mark.parametrize(
    ("method", "label"),
    [("dyvte", "dyvte"), ("flowcut@50%+fastv", "flowcut@50%+fastv 0.25"), ("flowcut@1/2+dyvte", "flowcut@1/2+dyvte")],
)
def test_run_takes_chains_and_methods_that_decide(method: str, label: str) -> None:
    result = _invoke("run", "--method", method)
    assert result.exit_code == 0, result.output
    assert label in result.output
    assert "kept at " in result.output


def test_numbers_are_printed_with_units() -> None:
    assert layers_text((576, 576, 64, 1)) == "layers 0-1: 576, 2: 64, 3: 1"
    assert flop_text(2.5e9) == "2.5 GFLOP"
    assert byte_text(3 * 2**20) == "3 MiB"
    assert share_text(1, 4) == "25.0 %"
    assert share_text(0, 0) == "-"
