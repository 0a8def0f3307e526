"""study.yaml, and what else decides the numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from treg_megatron.errors import UserError
from treg_megatron.files import sha256_of, sha256_of_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPE = HERE.relative_to(ROOT) / "recipe.yaml"
PROMPT_PAIR = HERE / "revise.yaml"


@dataclass(frozen=True)
class Run:
    """One training of one method with one setting and one seed."""

    method: str
    setting: int                # its number in the method's grid
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-setting{self.setting}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """The keys of study.yaml, where each is explained."""

    run: Path
    report: Path
    processes: int
    world: dict[str, Any]
    reference: dict[str, Any]
    measure: dict[str, Any]
    search_seed: int
    seeds: list[int]
    grids: dict[str, list[dict[str, Any]]]
    methods: dict[str, dict[str, Any]]

    def __post_init__(self):
        if self.search_seed in self.seeds:
            raise UserError(f"search_seed={self.search_seed} is also one of seeds: the choice would know its test")

    @property
    def search_runs(self) -> list[Run]:
        """Every setting of every method's grid, once."""
        return [Run(method, setting, self.search_seed) for method, of in self.methods.items()
                for setting in range(len(self.grids[of["grid"]]))]

    def final_runs(self, choice: dict[str, int]) -> list[Run]:
        """Every method with its chosen setting, seed by seed, so that an interrupted study is short of seeds, not methods."""
        return [Run(method, choice[method], seed) for seed in self.seeds for method in self.methods]

    def settings(self, run: Run) -> dict[str, Any]:
        """Recipe keys that tell a run from the others; results are kept for as long as these stay the same."""
        method = self.methods[run.method]
        return {**method["settings"], **self.grids[method["grid"]][run.setting], "data.seed": run.seed,
                "train.seed": run.seed, "data.train": self.run / "streams" / method.get("streams", "train")}

    @property
    def digest(self) -> str:
        """Of all that the numbers come from but the runs' own settings."""
        files = ("world.py", "model.py", "data.py", "revise.yaml", "recipe.yaml")
        return sha256_of_json([self.world, self.reference, *(sha256_of(HERE / name) for name in files),
                               sha256_of(ROOT / "recipes" / "base.yaml")])


def load_study(path: Path) -> Study:
    """Read a study; a ``defaults`` key names the file that it changes some keys of.

    Raises:
        UserError: no such file, or a key that is unknown or missing.
    """
    try:
        keys = _with_defaults(path)
        return Study(**{**keys, "run": Path(keys["run"]), "report": Path(keys["report"])})
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"study {path} cannot be used: {error}") from None


def _with_defaults(path: Path) -> dict[str, Any]:
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    parent = keys.pop("defaults", None)
    return _merged(_with_defaults(path.parent / parent), keys) if parent else keys


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {**base, **{name: _merged(base[name], value) if isinstance(value, dict) and isinstance(base.get(name), dict)
                       else value for name, value in changes.items()}}
