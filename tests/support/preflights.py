"""Preflight of a recipe in a process of its own, with its exit code, output and cost."""

import contextlib
import io
import re
import time
from pathlib import Path
from typing import NamedTuple

from tests.support.forked import run_ranks
from treg_megatron.config.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


class Done(NamedTuple):
    code: int
    printed: str
    cpu_seconds: float
    grown_gb: float  # peak memory beyond what the process started with


def preflight_in_this_process(
    recipe: Path, overrides: list[str], suggest: bool = False, picture: Path | None = None
) -> Done:
    from treg_megatron.cli.preflight import preflight

    begun_kb, start, printed = memory_kb("VmRSS"), time.process_time(), io.StringIO()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which is inherited from the parent
    with contextlib.redirect_stdout(printed):
        code = preflight(load_recipe(recipe, overrides), suggest, picture)
    return Done(code, printed.getvalue(), time.process_time() - start, (memory_kb("VmHWM") - begun_kb) / 1e6)


def memory_kb(field: str) -> int:
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def preflight(name: str | Path, *overrides: str, **options) -> Done:
    """``name``: of a shipped recipe, or the path of one."""
    path = name if isinstance(name, Path) else RECIPES / f"{name}.yaml"
    return run_ranks(1, preflight_in_this_process, path, list(overrides), *options.values())[0]
