"""Configuration of the study: study.yaml, the references and runs that it describes, and a digest of what results
depend on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from treg_megatron.errors import UserError
from treg_megatron.utils.files import sha256_of, sha256_of_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPE = HERE.relative_to(ROOT) / "recipe.yaml"
#: forms of the revision requests, which every reference learns; the first labels the training pairs (recipe.yaml)
FORMS = ("revise_turn", "revise")


def form_path(form: str) -> Path:
    """The YAML file of one of :data:`FORMS`."""
    return HERE / f"{form}.yaml"


@dataclass(frozen=True)
class Run:
    """One training run of one method with one setting of its grid and one seed."""

    method: str
    setting: int  # index in the method's grid
    seed: int
    overrides: dict[str, Any]  # recipe keys in which this run differs from the others of its reference

    @property
    def name(self) -> str:
        """Unique name with a digest of the overrides, so that results of other settings are never reused."""
        return f"{self.method}-setting{self.setting}-seed{self.seed}-{sha256_of_json(self.overrides)[:8]}"


@dataclass(frozen=True)
class Study:
    """The keys of study.yaml, which explains each of them."""

    run: Path
    report: Path
    processes: int
    world: dict[str, Any]
    training: dict[str, Any]
    models: dict[str, dict[str, Any]]
    measure: dict[str, Any]
    search_seed: int
    seeds: list[int]
    grids: dict[str, list[dict[str, Any]]]
    methods: dict[str, dict[str, Any]]

    def __post_init__(self):
        if self.search_seed in self.seeds:
            raise UserError(f"search_seed={self.search_seed} is also one of seeds: the search must not use a test seed")

    @property
    def references(self) -> list["Reference"]:
        """The references in the order of study.yaml."""
        return [Reference(self, name) for name in self.models]

    @property
    def digest(self) -> str:
        """SHA-256 of everything that results depend on, except the settings of single runs."""
        files = ("world.py", "model.py", "data.py", "recipe.yaml", *(f"{form}.yaml" for form in FORMS))
        return sha256_of_json([self.world, self.training, self.models, *(sha256_of(HERE / name) for name in files)])


@dataclass(frozen=True)
class Reference:
    """One reference, and the runs that start from it."""

    study: Study
    name: str

    @property
    def folder(self) -> Path:
        """Where everything that depends on this reference goes."""
        return self.study.run / self.name

    @property
    def model(self) -> Path:
        """Its Hugging Face folder."""
        return self.folder / "reference" / "hf"

    @property
    def search_runs(self) -> list[Run]:
        """Every setting of every method's grid, once."""
        return [
            self.of(method, setting, self.study.search_seed)
            for method, keys in self.study.methods.items()
            for setting in range(len(self.study.grids[keys["grid"]]))
        ]

    def final_runs(self, choice: dict[str, int]) -> list[Run]:
        """Every method with its chosen setting, seed by seed: an interrupted study then lacks seeds, not methods."""
        return [self.of(method, choice[method], seed) for seed in self.study.seeds for method in self.study.methods]

    def of(self, method: str, setting: int, seed: int) -> Run:
        """The run of a method with a setting and a seed."""
        keys = self.study.methods[method]
        return Run(
            method,
            setting,
            seed,
            {
                **keys["settings"],
                **self.study.grids[keys["grid"]][setting],
                "data.seed": seed,
                "train.seed": seed,
                "data.train": str(self.folder / "streams" / streams_of(keys)),
            },
        )


def streams_of(method: dict[str, Any]) -> str:
    """Name of the training data of a method: ``train``, or what its key ``streams`` says."""
    return method.get("streams", "train")


def load_study(path: Path) -> Study:
    """Read a study; its key ``defaults`` names a study to inherit from, and null takes an inherited key out.

    Raises:
        UserError: the file does not exist, or a key is unknown or missing.
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
    changed = {
        name: _merged(base[name], value) if isinstance(value, dict) and isinstance(base.get(name), dict) else value
        for name, value in changes.items()
    }
    return {name: value for name, value in {**base, **changed}.items() if value is not None}
