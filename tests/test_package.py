"""The package as a whole: layering, file sizes, house rules, the README's code, and the built wheel."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtprune.tiny import tiny_folder

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vtprune"
EMBEDDED = (tiny_folder("llava") / "config.json").is_file()
needs_embedded = pytest.mark.skipif(not EMBEDDED, reason="the embedded checkpoint is not in this tree")

_TOP = (
    "eval",
    "demo",
    "train",
    "tune",
    "commands",
    "cli",
    "__main__",
    "bench",
    "calibrate",
    "integrations",
    "tiny",
    "loading",
    "presets",
    "examples",
    "images",
    "videos",
    "files",
    "jsonl",
    "processes",
    "progress",
    "prompt",
)
# what users and the upper layers may import from below
_PUBLIC = (
    "",
    "budget",
    "contract",
    "cost",
    "draw",
    "errors",
    "layout",
    "plan",
    "predictors",
    "recipe",
    "registry",
    "report",
    "rules",
    "specs",
    "stopwatch",
    "views",
)
_CORE = (*(name for name in _PUBLIC if name not in ("", "predictors")), "cells", "choice", "similarity")
_RULES = ("selections", "remainders")
# a trainer reads what its method reads, by the method's own code; another program's engine is served by our engine
_DEEPER = {("train", "scorers"), ("integrations", "hooks"), ("integrations", "cells")}
_FILES = sorted(PACKAGE.rglob("*.py"))


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in a file, lazy and type-checking ones too; name is "" for plain imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from ((node.module or "", alias.name) for alias in node.names)


def _inner(module: str) -> str | None:
    """`vtprune.hooks.cache` -> `hooks.cache`; None if it is not ours."""
    if module == "vtprune":
        return ""
    return module.removeprefix("vtprune.") if module.startswith("vtprune.") else None


def _layering_errors(path: Path) -> list[str]:
    here = _module(path).partition(".")[0]
    errors = []
    for module, name in _imports(path):
        inner = _inner(module)
        if inner is None:
            if here == "kernels" and module.partition(".")[0] not in (*sys.stdlib_module_names, "torch", "triton"):
                errors.append(f"a kernel imports {module}")
            continue
        # `from vtprune import errors` means the module errors
        there = (inner or (name if (PACKAGE / f"{name}.py").exists() else "")).partition(".")[0]
        if name.startswith("_") and not name.startswith("__"):
            errors.append(f"takes the private name {name} of {module}")
        if here == "kernels" and there not in ("kernels", "errors"):
            errors.append(f"a kernel imports {module}")
        if here == "scorers" and there in ("hooks", *_TOP):
            errors.append(f"a scorer imports {module}")
        # a method may name the rules it is made of; rules name no method
        if here in _RULES and there in ("hooks", "scorers", "predictors", *_TOP):
            errors.append(f"a rule imports {module}")
        if here == "predictors" and there not in ("predictors", "errors"):
            errors.append(f"a predictor imports {module}")
        if here == "hooks" and there in ("scorers", *_RULES, *_TOP):
            errors.append(f"the engine imports {module}")
        # the package's own __init__ is the facade: it names everything public
        if here in _CORE and there in ("hooks", "scorers", "kernels", "predictors", *_RULES, *_TOP):
            errors.append(f"the core imports {module}")
        if here in _TOP and there not in (*_PUBLIC, *_TOP) and (here, there) not in _DEEPER:
            errors.append(f"reaches below the public names, into {module}")
    return errors


@pytest.mark.parametrize("path", _FILES, ids=_module)
def test_imports_run_one_way(path: Path) -> None:
    assert _layering_errors(path) == []


@pytest.mark.parametrize(
    ("folder", "code", "error"),
    [
        ("scorers", "from vtprune.hooks.cache import x", "a scorer imports vtprune.hooks.cache"),
        ("hooks", "import vtprune.scorers.fastv", "the engine imports vtprune.scorers.fastv"),
        ("hooks", "import vtprune.selections.dpp", "the engine imports vtprune.selections.dpp"),
        ("selections", "from vtprune.hooks.alive import x", "a rule imports vtprune.hooks.alive"),
        ("remainders", "import vtprune.scorers.fastv", "a rule imports vtprune.scorers.fastv"),
        ("hooks", "def f():\n    from vtprune.bench import x", "the engine imports vtprune.bench"),
        ("kernels", "import transformers.utils", "a kernel imports transformers.utils"),
        ("kernels", "from vtprune.plan import Plan", "a kernel imports vtprune.plan"),
        ("eval", "from vtprune.hooks.session import Session", "reaches below the public names"),
        ("hooks", "import vtprune.integrations.vllm", "the engine imports vtprune.integrations"),
        ("integrations", "from vtprune.scorers.fastv import x", "reaches below the public names"),
        ("eval", "from vtprune.plan import _SITE", "takes the private name _SITE"),
    ],
)
def test_the_layering_check_can_fail(folder: str, code: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "vtprune" / folder / "new.py"
    path.parent.mkdir(parents=True)
    path.write_text(code, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "PACKAGE", path.parent.parent)
        assert any(error in found for found in _layering_errors(path))


def test_no_file_over_300_lines() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in _FILES}
    assert {name: n for name, n in lengths.items() if n > 300} == {}


def test_no_function_over_70_lines() -> None:
    long = []
    for path in _FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 70:
                long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert long == []


@pytest.mark.parametrize("path", _FILES, ids=_module)
def test_house_rules(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append(f"line {node.lineno}: assert; raise an error that says what to do")
        if isinstance(node, ast.ExceptHandler) and (
            node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "Exception")
        ):
            found.append(f"line {node.lineno}: blanket except")
    if path.stat().st_size and ast.get_docstring(tree) is None:
        found.append("no module docstring")
    assert found == []


def _readme_snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@needs_embedded
@pytest.mark.parametrize("index", range(len(_readme_snippets())))
def test_readme_snippets_run(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.contract import METHODS

    monkeypatch.chdir(tmp_path)
    script = tmp_path / f"readme_{index}.py"
    script.write_text(_readme_snippets()[index], encoding="utf-8")
    # a snippet may register a method of its own; it must not stay for other tests
    METHODS.items()  # fills a registry that nobody has read yet
    entries = METHODS._entries
    before = dict(entries)  # those that are not listed too
    try:
        runpy.run_path(str(script), run_name="readme")
    finally:
        entries.clear()
        entries.update(before)


def test_readme_has_snippets_and_markers() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(_readme_snippets()) >= 2
    assert text.index("<!-- results:start -->") < text.index("<!-- results:end -->")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that holds vtprune from its wheel; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # a path added by a .pth file does not run that folder's own .pth files, so an editable vtprune stays out
    import torch

    (site / "dependencies.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n", encoding="utf-8")
    return folder / "venv"


def _in(venv: Path, *command: str) -> str:
    """Output of a command of the fresh environment, run away from the source tree."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    program, *rest = command
    done = subprocess.run(
        [str(venv / "bin" / program), *rest], cwd=venv, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_imports_and_lists_methods(installed: Path) -> None:
    where = _in(installed, "python", "-c", "import vtprune; print(vtprune.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    from vtprune import methods

    listed = _in(installed, "vtprune", "methods")
    assert all(name in listed for name in methods())
    points = "from importlib.metadata import entry_points as e; print([p.value for p in e(group='lmms_eval.models')])"
    assert "vtprune.eval.lmms_manifest:manifests" in _in(installed, "python", "-c", points)


@pytest.mark.slow
def test_the_wheel_holds_what_is_not_code(installed: Path) -> None:
    (package,) = (installed / "lib").glob("python*/site-packages/vtprune")
    shipped = {p.relative_to(package) for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    source = {p.relative_to(PACKAGE) for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert shipped == source


@pytest.mark.slow
@needs_embedded
def test_the_wheel_answers_a_question(installed: Path) -> None:
    answer = _in(installed, "vtprune", "run", "--method", "fastv", "--keep", "50%")
    assert "same answer" in answer or "differs from token" in answer
