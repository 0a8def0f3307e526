"""A report as one HTML file."""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from treg_megatron.evaluation.reporting.charts import colour
from treg_megatron.evaluation.reporting.figures import figures
from treg_megatron.evaluation.reporting.links import arm_links
from treg_megatron.evaluation.reporting.material import Answered, Material
from treg_megatron.evaluation.reporting.notes import notes, of_benchmark
from treg_megatron.evaluation.reporting.shown import shown
from treg_megatron.evaluation.reporting.tables import Table, arm_table, difference_table

_TEMPLATE = Path(__file__).resolve().parents[1] / "pages" / "report.html"
_PLACE = re.compile("__([A-Z]+)__")


def as_page(comparison: dict[str, Any], material: Material, folder: Path) -> str:
    """The page of a comparison; its links are relative to ``folder``."""
    links = [arm_links(arm, folder) for arm in comparison["arms"]]
    parts = dict(
        title=_html(f"Evaluation{of_benchmark(comparison, 'on')}"),
        notes="".join(f"<p>{_html(note)}</p>" for note in notes(comparison)),
        arms=_table(arm_table(comparison), links, first_number=1),
        differences=_table(difference_table(comparison)) if comparison["differences"] else "",
        legend="".join(
            f'<li><span class="swatch {colour(number)}"></span>{_html(name)}{" (baseline)" if number == 0 else ""}</li>'
            for number, name in enumerate(material.models)
        ),
        charts="".join(figures(comparison, material)),
        data=embedded({"models": list(map(shown, material.models)), "prompts": _prompts(material)}),
    )
    return _PLACE.sub(lambda place: parts[place[1].lower()], _TEMPLATE.read_text(encoding="utf-8"))


def embedded(value: Any) -> str:
    """A value as JSON that may stand in a script element of an HTML file."""
    # a `<` in a text could end the script element
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _prompts(material: Material) -> list[dict[str, Any]]:
    return [
        {
            "id": shown(prompt.prompt_id),
            "category": prompt.category and shown(prompt.category),
            "turns": list(map(shown, prompt.turns)),
            "answers": [answer and _answer(answer) for answer in prompt.answers],
        }
        for prompt in material.prompts
    ]


def _answer(answer: Answered) -> dict[str, Any]:
    return {
        "texts": list(map(shown, answer.texts)),
        "tokens": answer.tokens,
        "characters": answer.characters,
        "finished": answer.finished,
        "preference": answer.preference,
        "score": answer.score,
        "verdicts": list(map(shown, answer.verdicts)),
    }


def _table(table: Table, links: list[list[tuple[str, str]]] | None = None, first_number: int | None = None) -> str:
    heads = [*table.headings, *(["made of"] if links and any(links) else [])]
    body = []
    for place, row in enumerate(table.rows):
        swatch = "" if first_number is None else f'<span class="swatch {colour(first_number + place)}"></span>'
        cells = [f'<th scope="row">{swatch}{_html(row[0])}</th>', *(f"<td>{_html(cell)}</td>" for cell in row[1:])]
        if links and any(links):
            made_of = " ".join(f'<a href="{escape(address)}">{_html(name)}</a>' for name, address in links[place])
            cells.append(f"<td>{made_of}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{_html(heading)}</th>' for heading in heads)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _html(text: str) -> str:
    return escape(shown(text))
