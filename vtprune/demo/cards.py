"""Answers and costs as HTML. Every text that comes from outside is escaped here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from vtprune.commands.show import byte_text, flop_text

if TYPE_CHECKING:
    from vtprune.demo.ask import Answer, Race
    from vtprune.demo.stability import Point
    from vtprune.report import Report

__all__ = ["answers_html", "costs_html", "error_html", "points_html", "waiting_html"]


class _Cost(NamedTuple):
    """One row: a name, the number of each side, how to write it, and whether more is better."""

    name: str
    full: float
    of: Callable[[Answer], float | None]
    text: Callable[[float], str]
    more_is_better: bool = False


def error_html(message: str) -> str:
    """A message in place of answers."""
    return f'<div class="vtp-error" role="alert">{escape(message)}</div>'


def waiting_html(message: str) -> str:
    """What is going on before there is an answer."""
    return f'<p class="vtp-waiting" role="status">{escape(message)}</p>'


def points_html(points: Sequence[Point]) -> str:
    """The budget sweep in numbers: a line a method, a column a budget."""
    keeps = list(dict.fromkeys(point.keep for point in points))
    heads = "".join(f'<th scope="col">{escape(keep)}</th>' for keep in keeps)
    rows = []
    for method in dict.fromkeys(point.method for point in points):
        mine = {point.keep: point for point in points if point.method == method}
        cells = "".join(_point_cell(mine.get(keep)) for keep in keeps)
        rows.append(f'<tr><th scope="row">{escape(method)}</th>{cells}</tr>')
    return (
        f'<div class="vtp-costs"><table><thead><tr><th scope="col">probability at</th>{heads}</tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table><p>&#10003; its own answer is the unpruned one, &#8800; it is another one; a "
        "dash: the budget is out of the method's reach.</p></div>"
    )


def _point_cell(point: Point | None) -> str:
    if point is None:
        return "<td></td>"
    if point.probability is None:
        return f'<td title="{escape(point.message)}">-</td>'
    mark = "&#10003;" if point.same else "&#8800;"
    return f"<td>{point.probability:.2f}&nbsp;{mark}</td>"


def answers_html(race: Race) -> str:
    """The answers side by side, words that differ from the unpruned answer marked."""
    full = race.answers[0]
    cards = [_card(full, full.text, "")]
    cards += [_card(answer, full.text, _verdict(answer)) for answer in race.pruned]
    return f'<div class="vtp-answers">{"".join(cards)}</div>'


def _card(answer: Answer, full: str, verdict: str) -> str:
    compared = answer.agrees is not None and not answer.same
    text = _marked(answer.text, full) if compared else escape(answer.text)
    waits = "" if answer.finished else '<span class="vtp-caret" aria-hidden="true"></span>'
    return (
        f'<section class="vtp-answer"><h3>{escape(answer.title)}</h3>'
        f'<p class="vtp-text">{text}{waits}</p>{verdict}</section>'
    )


def _verdict(answer: Answer) -> str:
    if answer.agrees is None:
        return '<p class="vtp-verdict" role="status"></p>'
    if answer.same:
        return '<p class="vtp-verdict vtp-same" role="status">same answer</p>'
    return f'<p class="vtp-verdict vtp-differs" role="status">differs from token {answer.agrees + 1} on</p>'


def _marked(text: str, full: str) -> str:
    """Words that are not those of the unpruned answer, marked."""
    words, others = text.split(), full.split()
    parts = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, others, words, autojunk=False).get_opcodes():
        piece = escape(" ".join(words[start:end]))
        if piece:
            parts.append(piece if kind == "equal" else f"<mark>{piece}</mark>")
    return " ".join(parts) or "<mark>(nothing)</mark>"


def costs_html(race: Race) -> str:
    """What the pruned answers cost, as bars against the unpruned one; times only once they are measured."""
    reports = [answer.report for answer in race.pruned if answer.report is not None]
    if not reports:
        return ""
    rows = "".join(_row(cost, race.pruned) for cost in _costs(race.answers[0], reports[0]))
    heads = "".join(f'<th scope="col">{escape(answer.title)}</th>' for answer in race.pruned)
    rounds = "one round" if race.rounds == 1 else f"{race.rounds} rounds"
    foot = [f"Times are medians of {rounds}, taken in turn." if race.rounds else "Measuring times."]
    foot += [note for report in reports for note in report.notes]
    notes = "".join(f"<p>{escape(note)}</p>" for note in dict.fromkeys(foot))
    return (
        f'<div class="vtp-costs"><table><thead><tr><th scope="col">cost</th><th scope="col">unpruned</th>{heads}'
        f"</tr></thead><tbody>{rows}</tbody></table>{notes}</div>"
    )


def _costs(full: Answer, report: Report) -> list[_Cost]:
    def counted(name: str) -> Callable[[Answer], float | None]:
        return lambda answer: None if answer.report is None else getattr(answer.report, name)

    def tokens(answer: Answer) -> float | None:
        return None if answer.report is None else answer.report.average_tokens[0]

    costs = [
        _Cost("visual tokens a layer", report.visual_tokens[0], tokens, lambda n: f"{n:.4g}"),
        _Cost("decoder prefill", report.flops_full, counted("flops"), flop_text),
        _Cost("vision tower", report.vision_flops_full, counted("vision_flops"), flop_text),
        _Cost("KV cache", report.kv_bytes_full, counted("kv_bytes"), byte_text),
    ]
    if full.prefill_s is not None and full.tokens_per_s is not None:
        costs += [
            _Cost("prefill time", full.prefill_s, lambda answer: answer.prefill_s, _time_text),
            _Cost("decoding", full.tokens_per_s, lambda a: a.tokens_per_s, lambda n: f"{n:.3g} tokens/s", True),
        ]
    return [cost for cost in costs if cost.full]


def _time_text(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _row(cost: _Cost, answers: Sequence[Answer]) -> str:
    cells = []
    for answer in answers:
        value = cost.of(answer)
        if value is None:
            cells.append("<td></td>")
            continue
        share = value / cost.full
        # text as wide as a bar that is longer than the unpruned one's would run out of the cell
        bar = f'<span class="vtp-bar"><i style="width:{100 * min(share, 1.5) / 1.5:.1f}%"></i></span>'
        gain = share - 1 if cost.more_is_better else 1 - share
        kind = "vtp-better" if gain > 0.005 else "vtp-worse" if gain < -0.005 else ""
        text = f'<span class="vtp-share">{100 * share:.3g} %</span> <span class="vtp-value">{cost.text(value)}</span>'
        cells.append(f'<td class="{kind}">{bar}{text}</td>')
    return f'<tr><th scope="row">{cost.name}</th><td>{cost.text(cost.full)}</td>{"".join(cells)}</tr>'
