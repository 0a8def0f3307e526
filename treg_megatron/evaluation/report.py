"""The report of a comparison: report.html, one page that needs no network, and the same as report.md.

The page holds every prompt with all answers; it draws only what is in view, so that thousands open at once.
"""

from pathlib import Path
from typing import Any

from treg_megatron.evaluation.reporting.markdown import as_markdown
from treg_megatron.evaluation.reporting.material import collect
from treg_megatron.evaluation.reporting.page import as_page
from treg_megatron.utils.files import atomic_write_all

HTML_NAME, MARKDOWN_NAME = "report.html", "report.md"


def write_report(comparison: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write both forms of the report into ``folder``, and return their paths.

    Args:
        comparison: the content of comparison.json. Answers, judgments and runs that its arms name are read; what is not
            there any more is left out, with a warning.

    Raises:
        UserError: the folder cannot be written.
    """
    material = collect(comparison)
    page, text = (Path(folder) / name for name in (HTML_NAME, MARKDOWN_NAME))
    with atomic_write_all([page, text]) as (partial_page, partial_text):
        partial_page.write_text(as_page(comparison, material, folder), encoding="utf-8")
        partial_text.write_text(as_markdown(comparison, material, folder), encoding="utf-8")
    return page, text
