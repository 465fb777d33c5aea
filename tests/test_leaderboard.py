"""The committed leaderboard: every method is in it, the page shows its rows, asking again gives the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from vtprune.cli import app
from vtprune.contract import METHODS
from vtprune.eval.rows import UNPRUNED_ROW, Row, read_rows
from vtprune.eval.table import markdown

ROOT = Path(__file__).resolve().parents[1]
SWEEP = yaml.safe_load((ROOT / "benchmarks" / "leaderboard.yaml").read_text(encoding="utf-8"))
MODELS = SWEEP["model"]


def rows_of(model: str) -> list[Row]:
    return read_rows(ROOT / "benchmarks" / "leaderboard" / f"{model.replace(':', '-')}.jsonl")


@pytest.mark.parametrize("model", MODELS)
def test_every_method_is_there_at_every_budget(model: str) -> None:
    rows = rows_of(model)
    assert rows[0].method == UNPRUNED_ROW
    cells = {(row.method, row.keep): row for row in rows[1:]}
    keeps = [str(keep) for keep in SWEEP["keeps"] if keep != 1]
    assert keeps == ["1/2", "1/4", "1/9", "1/16"]
    for name, method in METHODS.items():
        wanted = keeps if method.takes_budget else ["own"]
        for keep in wanted:
            row = cells[name, keep]
            assert row.status in ("ok", "not possible"), row.name
            assert (row.floor is not None) == (row.status == "not possible"), row.name
    for row in rows:
        assert row.run["model"] == model
        assert row.run["command"] == "vtprune eval --config benchmarks/leaderboard.yaml"
        if row.status == "ok":
            assert set(row.tasks) == {"vtp_easy_vqa", "vtp_scenes"}
            for score in row.tasks.values():
                assert score.questions == SWEEP["limit"]
                assert score.accuracy.low <= score.accuracy.value <= score.accuracy.high


@pytest.mark.parametrize("model", MODELS)
def test_the_page_shows_the_rows(model: str) -> None:
    page = (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    assert markdown(rows_of(model)) in page


@pytest.mark.slow
def test_asking_again_gives_the_same_numbers(tmp_path: Path) -> None:
    model = "tiny:internvl"
    command = ["eval", "--config", str(ROOT / "benchmarks" / "leaderboard.yaml"), "--model", model]
    command += ["--methods", "uniform,fastv,scope", "--keeps", "1/4", "--against", "none", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    committed = {row.name: row for row in rows_of(model)}
    again = read_rows(tmp_path / "rows.jsonl")
    assert [row.method for row in again] == [UNPRUNED_ROW, "uniform", "fastv", "scope"]
    for row in again:
        before = committed[row.name]
        assert row.tasks == before.tasks, row.name
        assert row.kept_hash == before.kept_hash
        assert (row.average_tokens, row.flops_share, row.kv_share, row.vision_flops_share) == (
            before.average_tokens,
            before.flops_share,
            before.kv_share,
            before.vision_flops_share,
        )
