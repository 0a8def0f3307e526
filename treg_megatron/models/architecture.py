"""Architecture of a recipe's model: from its config.json, or from a published one before the download."""

import difflib
import math
from pathlib import Path
from typing import Any

from treg_megatron.config.schema import ModelSection
from treg_megatron.errors import UserError
from treg_megatron.models.families import FREE_FIELDS, family_of, model_fields
from treg_megatron.utils.files import read_json

PUBLISHED = Path(__file__).parent / "architectures"


def hf_config_of(model: ModelSection) -> dict[str, Any]:
    """The config.json of ``model.hf`` if it is on disk, else that of ``model.architecture``.

    Raises:
        UserError: neither exists, or the two are different models.
    """
    own = Path(model.hf) / "config.json"
    if own.is_file():
        config = read_json(own)
        require_architecture(model, config, str(own))
        return config
    if model.architecture is None:
        raise UserError(
            f"{own} does not exist and model.architecture names no published one: download the model to "
            f"model.hf, or set model.architecture to one of {', '.join(_published())}"
        )
    return _named(model.architecture)


def require_architecture(model: ModelSection, config: dict[str, Any], where: str) -> None:
    """Check that a config.json has the architecture that the recipe names, if it names one.

    Raises:
        UserError: the architectures differ; the message names the first field that does.
    """
    if model.architecture is None:
        return
    named = _named(model.architecture)
    found, expected = model_fields(config), model_fields(named)
    different = [name for name in expected if name not in FREE_FIELDS and not _same(found.get(name), expected[name])]
    if family_of(config) is not family_of(named):
        different = ["architecture"]
        found, expected = ({"architecture": family_of(c).architecture} for c in (config, named))
    if different:
        name = different[0]
        raise UserError(
            f"{where} is not {model.architecture}: {name} is {found.get(name)}, published "
            f"{expected[name]}; set model.architecture=null, or name the model that you mean"
        )


def _named(name: str) -> dict[str, Any]:
    if name in _published():
        return read_json(PUBLISHED / f"{name}.json")
    if Path(name).is_file():
        return read_json(Path(name))
    nearest = difflib.get_close_matches(name, _published(), n=1)
    raise UserError(
        f"model.architecture={name} is neither a file nor a published architecture; "
        + (f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(_published())}")
    )


def _published() -> list[str]:
    return sorted(path.stem for path in PUBLISHED.glob("*.json"))


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, float) and isinstance(expected, (int, float)):
        return math.isclose(found, expected, rel_tol=1e-6)
    return found == expected
