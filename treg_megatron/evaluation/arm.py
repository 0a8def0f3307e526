"""The model under evaluation: what a recipe names, as a Hugging Face folder and a name for tables."""

import re
from pathlib import Path

from treg_megatron.checkpoint.layout import find_checkpoint, is_checkpoint, read_metadata, require_whole_export
from treg_megatron.config.recipe import RecordedRecipe, load_recipe, value
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.model_folder import HUB_ID, existing_folder

_EXPORTED = "hf"  # of a run's folder, by recipes/base.yaml
_TRAINED = "train"
_OF_HUGGING_FACE = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_NAME = re.compile(r"[^/\s.][^/\n\r\t]*")  # a file's name without its ending


def hugging_face_folder(model: str | Path) -> Path:
    """The Hugging Face folder that a path means: itself, or what the run at that path exported.

    Raises:
        UserError: it does not exist, or the run is not exported yet; or the export is not whole.
    """
    path = Path(model).expanduser()
    if path.is_file() or any((path / name).is_file() for name in _OF_HUGGING_FACE):
        folder = path
    elif any((path / _EXPORTED / name).is_file() for name in _OF_HUGGING_FACE):
        folder = path / _EXPORTED
    else:
        folder = _exported_by_run(path)
    require_whole_export(folder)
    return folder


def model_name(folder: Path) -> str:
    """The name of a model after its folder; after the run's, if the folder is called like every export."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == _EXPORTED else folder.name


def require_name(name: str, key: str) -> str:
    """``name``, which is to name a file.

    Args:
        key: of the recipe, which gives another one.

    Raises:
        UserError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"the model's name {name!r} cannot be that of a file; set {key}")
    return name


def _exported_by_run(path: Path) -> Path:
    run = next((folder for folder in (path, path / _TRAINED) if is_checkpoint(folder)), None)
    if run is None:
        if not path.exists() and not HUB_ID.fullmatch(str(path)):
            raise UserError(f"model {path} does not exist; export the run first (treg export), or name another model")
        return existing_folder(path)
    recorded = read_metadata(find_checkpoint(run)).run.get("recipe")
    exported = Path(value(load_recipe(RecordedRecipe(run, recorded)), "export.output")) if recorded else None
    if exported is None or not exported.is_dir():
        missing = f" ({exported} does not exist)" if exported else ""
        raise UserError(f"the run {path} is not exported yet{missing}: treg export --recipe {run}")
    return exported
