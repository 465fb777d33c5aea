"""The table that `vtprune bench` prints."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rich.table import Table
from rich.text import Text

from vtprune.bench.rows import is_all

__all__ = ["about", "bench_markdown", "bench_table", "break_even", "keep_text", "rival_lines", "setting"]

TARGET = 0.95  # of the speed-up that the FLOP count allows
OVERHEAD = 0.01  # of a prefill or a decode step, attached at keep = 1
SCORING = 0.02  # of a prefill


def keep_text(keep: float | None) -> str:
    """`64` for tokens, `0.333` for a share, `own` where the method decides."""
    if keep is None:
        return "own"
    return str(keep) if isinstance(keep, int) else f"{keep:.3g}"


def _mib(count: float) -> str:
    return f"{count / 2**20:.4g}"


def _graded(value: str, good: bool) -> Text:
    return Text(value, style="green" if good else "yellow")


def _cells(row: dict[str, Any]) -> list[str | Text]:
    quotient, total = row["prefill_quotient"], row["total_quotient"]
    whole = is_all(row["keep"])
    overhead = f"{100 * (row['prefill_ratio'] - 1):+.1f} %"
    return [
        f"{sum(row['average_tokens']) / len(row['average_tokens']):.1f}",
        f"{row['prefill_ms']:.4g}",
        _graded(overhead, row["prefill_ratio"] < 1 + OVERHEAD) if whole else f"{row['prefill_ratio']:.3f}",
        f"{row['prefill_flop_ratio']:.3f}",
        Text("identical", style="green") if whole else _graded(f"{quotient:.2f}", quotient >= TARGET),
        "" if whole else f"{row['bare_quotient']:.2f}",
        "" if whole else _graded(f"{100 * row['scoring_share']:.1f} %", row["scoring_share"] < SCORING),
        f"{row['total_ratio']:.3f}",
        "" if whole else _graded(f"{total:.2f}", total >= TARGET),
        f"{row['decode_ms']:.4g}",
        _graded(f"{row['decode_ratio']:.3f}", row["decode_ratio"] < 1 + OVERHEAD),
        _mib(row["peak_bytes"]),
        _mib(row["kv_bytes"]),
    ]


def _rival_name(row: dict[str, Any]) -> str:
    version = row["rival"]["version"]
    return f"{row['method']} *" if version in (None, "unknown") else f"{row['method']} {version} *"


def _rival_keep(row: dict[str, Any]) -> str:
    return "" if row["keep"] is None else keep_text(row["keep"])


def _rival_cells(row: dict[str, Any]) -> list[str | Text]:
    """As `_cells`; what is not known of another library stays empty."""
    flops = row["prefill_flop_ratio"]
    return [
        str(row["kept_tokens"]),
        f"{row['prefill_ms']:.4g}",
        f"{row['prefill_ratio']:.3f}",
        "" if flops is None else f"{flops:.3f}",
        Text("not proved", style="dim"),
        "",
        "",
        f"{row['total_ratio']:.3f}",
        "",
        f"{row['decode_ms']:.4g}",
        f"{row['decode_ratio']:.3f}",
        _mib(row["peak_bytes"]),
        _mib(row["kv_bytes"]),
    ]


def rival_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What stands below a table about the other libraries in it: what each does, or why it was skipped."""
    lines = []
    for row in (row for row in rows if row["kind"] == "rival"):
        where = f"at keep {keep_text(row['keep'])} " if row["keep"] is not None else ""
        told = row["rival"]
        does = f"{told['does']}. Budget: {told['budget']}. Not proved; {'; '.join(told['notes'])}"
        lines.append(f"{_rival_name(row)}: {does if row['possible'] else where + row['reason']}.")
    return list(dict.fromkeys(lines))


def setting(row: dict[str, Any]) -> str:
    """`batch 4, 576 visual and 64 text tokens`: what the rows of one table share."""
    config = row["config"]
    visual = row.get("prompt", {})
    return (
        f"batch {config['batch_size']}, {visual.get('visual_tokens', '?')} visual and {visual.get('text_tokens', '?')} "
        "text tokens a sample"
    )


def about(row: dict[str, Any]) -> str:
    """Device, threads, dtype and versions of a row."""
    versions, threads = row["versions"], row["threads"]
    names = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    return f"{row['device']['name']}, {threads} thread{'s' if threads > 1 else ''}, {row['dtype']}, {names}"


def break_even(rows: Sequence[dict[str, Any]]) -> list[str]:
    """From which prompt on pruning pays, where several lengths were measured and not all of them did.

    Args:
        rows: of several prompts. A cell is a method and budget, at one batch size and number of text tokens. Other
            libraries are left out: they may save what is no prefill.
    """
    cells: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for row in rows:
        if row["possible"] and row["kind"] == "bench" and not is_all(row["keep"]):
            config, prompt = row["config"], row["prompt"]
            key = (row["method"], keep_text(row["keep"]), config["batch_size"], prompt["text_tokens"])
            cells.setdefault(key, []).append((prompt["visual_tokens"], row["total_ratio"]))
    lines: list[str] = []
    for (method, keep, batch, text), points in cells.items():
        slower = [n for n, ratio in points if ratio >= 1.0]
        if len({n for n, _ in points}) < 2 or not slower:
            continue
        faster = [n for n, _ in points if n > max(slower)]
        where = f"pays from {min(faster)} visual tokens on" if faster else "pays at none of the lengths measured"
        lines.append(f"{method} at keep {keep}, batch {batch}, {text} text tokens: {where} (slower at {max(slower)})")
    return lines


def bench_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a cell. Ratios are pruned / unpruned; a quotient of 1 is all the speed-up that the FLOPs allow.

    "bare" is the quotient of the same decoder, not pruned, on a prompt that is as short from the start; "scoring" the
    share of the call that scorers take. Other libraries come last, with an asterisk that is explained below.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", title=setting(rows[0]) if rows else None)
    table.add_column("method")
    for name in (
        "keep",
        "avg tokens",
        "prefill ms",
        "ratio",
        "FLOP ratio",
        "quotient",
        "bare",
        "scoring",
        "with tower",
        "quotient",
        "decode ms",
        "ratio",
        "peak MiB",
        "KV MiB",
    ):
        table.add_column(name, justify="right")
    full = next((row for row in rows if row["possible"]), None)
    if full is not None:
        table.add_row(
            "unpruned",
            "",
            str(full["visual_tokens"][0]),
            f"{full['prefill_ms_full']:.4g}",
            *[""] * 7,
            f"{full['decode_ms_full']:.4g}",
            "",
            _mib(full["peak_bytes_full"]),
            _mib(full["kv_bytes_full"]),
        )
    for row in rows:
        rival = row["kind"] == "rival"
        if row["possible"]:
            name = _rival_name(row) if rival else row["method"]
            table.add_row(name, keep_text(row["keep"]), *(_rival_cells if rival else _cells)(row))
        elif rival:
            table.add_row(_rival_name(row), _rival_keep(row), Text("skipped", style="dim"))
        else:
            floor = f"not possible (floor {row['floor']:.4g})" if row["floor"] is not None else row["reason"]
            table.add_row(row["method"], keep_text(row["keep"]), Text(floor, style="dim"))
    return table


def bench_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The same for documents, in shares of the unpruned call: one table a prompt size, and what its columns mean."""
    lines: list[str] = []
    title = ""
    for row in rows:
        if setting(row) != title:
            title = setting(row)
            lines += ["", f"{title}:", "", _markdown_row(_TITLES), _markdown_row(["---", "---", *["---:"] * 9])]
        if row["kind"] == "rival":
            lines.append(_markdown_rival(row))
            continue
        keep = "all" if is_all(row["keep"]) else _share(row["keep"])
        if not row["possible"]:
            floor = "" if row["floor"] is None else f" (floor {row['floor']:.4g})"
            lines.append(_markdown_row([row["method"], keep, f"{row['status']}{floor}", *[""] * 8]))
            continue
        whole = is_all(row["keep"])
        lines.append(
            _markdown_row(
                [
                    row["method"],
                    keep,
                    f"{100 * (row['prefill_ratio'] - 1):+.1f} %" if whole else f"{row['prefill_ratio']:.2f}",
                    f"{row['prefill_flop_ratio']:.2f}",
                    "identical" if whole else f"{row['prefill_quotient']:.2f}",
                    "" if whole else f"{row['bare_quotient']:.2f}",
                    "" if whole else f"{100 * row['scoring_share']:.1f} %",
                    f"{row['total_ratio']:.2f}",
                    f"{row['decode_ratio']:.2f}",
                    f"{row['peak_bytes'] / row['peak_bytes_full']:.2f}",
                    f"{row['kv_bytes'] / row['kv_bytes_full']:.2f}",
                ]
            )
        )
    pruned = [row for row in rows if row["kind"] == "bench" and row["possible"] and not is_all(row["keep"])]
    proved = all(row["oracle_error"] is not None for row in pruned)
    others = [part for line in rival_lines(rows) for part in (line.replace("*", "\\*", 1), "")]
    return "\n".join([*lines[1:], "", _LEGEND + (_PROVED if proved else _NOT_PROVED), "", *others])


def _markdown_rival(row: dict[str, Any]) -> str:
    name = _rival_name(row).replace("*", "\\*")
    keep = "" if row["keep"] is None else _share(row["keep"])
    if not row["possible"]:
        return _markdown_row([name, keep, "skipped", *[""] * 8])
    flops = row["prefill_flop_ratio"]
    return _markdown_row(
        [
            *(name, keep, f"{row['prefill_ratio']:.2f}", "" if flops is None else f"{flops:.2f}", "not proved", "", ""),
            f"{row['total_ratio']:.2f}",
            f"{row['decode_ratio']:.2f}",
            f"{row['peak_bytes'] / row['peak_bytes_full']:.2f}",
            f"{row['kv_bytes'] / row['kv_bytes_full']:.2f}",
        ]
    )


_TITLES = (
    *("method", "keep", "prefill", "FLOPs", "quotient", "bare", "scoring", "with tower", "decode step"),
    *("peak memory", "KV"),
)
_LEGEND = (
    "prefill (decoder with scoring), with tower, decode step, peak memory, KV: against unpruned, medians of one "
    "interleaved run; at keep = all the overhead of being attached. quotient: speed-up of the prefill as a share of "
    "what the FLOP count allows. bare: the same for the decoder alone, not pruned, on a prompt that is as short from "
    "the start, which is what this machine makes of fewer tokens. scoring: share of the call that scorers take. "
)
_PROVED = "Every row was first proved equal to the unpruned model with the same tokens hidden, on this batch."
_NOT_PROVED = "Rows that the masked oracle does not serve were not proved on this batch."


def _share(keep: float | None) -> str:
    """`64` for tokens, `1/9` or `0.35` for a share, `own` where the method decides."""
    if keep is None or isinstance(keep, int):
        return keep_text(keep)
    part = Fraction(keep).limit_denominator(99)
    return str(part) if abs(part - keep) < 1e-9 else f"{keep:.3g}"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")
