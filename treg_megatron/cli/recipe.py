"""List the recipes of this package, print one as a run would read it, or make one for another model or cluster.

    treg recipe
    treg recipe llama3_8b
    treg recipe llama3_8b optimizer.lr=1e-6
    treg recipe runs/X/train --key train.output
    treg recipe new --config models/X --nodes 2 --gpus-per-node 8 --gpu-memory 80 --output mine.yaml

Prints the whole recipe with defaults filled in and overrides applied, and where each value comes from. RECIPE is a name
from the list, the path of a YAML file, or a training checkpoint. The output can be saved, edited and run.

`new` searches the layout that preflight finds fastest and safe, and writes a recipe with the reasons as comments; where
nothing fits, it names the smallest cluster that does.
"""

import argparse
from pathlib import Path

from treg_megatron.cli.arguments import command_parser, recipe_at


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg recipe``."""
    parser = command_parser(prog, __doc__)
    parser.add_argument("words", nargs="*", metavar="[RECIPE] section.key=value", help="recipe, and keys that differ")
    parser.add_argument("--recipe", metavar="RECIPE", help="the recipe, as for the other commands")
    parser.add_argument("--key", metavar="SECTION.KEY", help="print this key alone; one without a value is refused")
    new = parser.add_argument_group("for new")
    new.add_argument(
        "--config", metavar="MODEL", help="config.json, its folder, or the name of a published architecture"
    )
    new.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    new.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of a machine (default: 8)")
    new.add_argument("--gpu", default="h100", help="kind of GPU (cluster.gpu; default: h100)")
    new.add_argument("--gpu-memory", type=float, metavar="80", help="memory of a GPU in GB (default: the GPU's)")
    new.add_argument("--lora", action="store_true", help="train low-rank adapters instead of all weights")
    new.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: print)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Print the list or the recipe."""
    from treg_megatron.config import recipe

    if arguments.words[:1] == ["new"]:
        _new(arguments)
        return
    overrides = [word for word in arguments.words if "=" in word]
    named = [arguments.recipe] * (arguments.recipe is not None) + [word for word in arguments.words if "=" not in word]
    if not (arguments.words or named or arguments.key):
        for name, summary in recipe.summaries().items():
            print(f"{name:<22} {summary}")
        return
    if len(named) > 1:
        raise recipe.UserError(f"one recipe at a time: {' and '.join(named)} were named")
    config, sources = recipe.trace_recipe(recipe_at(named[0] if named else "base"), overrides)
    print(recipe.value(config, arguments.key) if arguments.key else recipe.described(config, sources))


def _new(arguments: argparse.Namespace) -> None:
    """Search a layout and write the recipe."""
    from treg_megatron.cli.preflight import use_meta_machine
    from treg_megatron.config.recipe import RECIPES, load_recipe
    from treg_megatron.errors import UserError
    from treg_megatron.utils.files import atomic_write

    if arguments.config is None:
        raise UserError("treg recipe new needs --config: a config.json, its folder, or a published architecture")
    if arguments.nodes < 1 or arguments.gpus_per_node < 1:
        raise UserError(f"--nodes {arguments.nodes} --gpus-per-node {arguments.gpus_per_node}: both are at least 1")
    if arguments.output and not arguments.output.parent.is_dir():
        raise UserError(f"--output {arguments.output}: the folder {arguments.output.parent} does not exist")
    given = Path(arguments.config).expanduser()
    folder = given if given.is_dir() else given.parent if given.is_file() else Path("models") / given.name
    name = arguments.output.stem if arguments.output else folder.name.lower() + ("_lora" if arguments.lora else "")
    words = [word for word in arguments.words[1:] if "=" in word]
    model = [f"model.hf={folder}"]
    if not (folder / "config.json").is_file():
        model.append(f"model.architecture={arguments.config}")
    cluster = {key: getattr(arguments, key) for key in ("nodes", "gpus_per_node", "gpu", "gpu_memory")}
    overrides = [f"cluster.{key}={value}" for key, value in cluster.items() if value is not None]
    overrides += ["lora.rank=16", "optimizer.lr=5.0e-6"] if arguments.lora else []
    config = load_recipe(RECIPES / "family" / "gpu.yaml", [*model, *overrides, *words])
    use_meta_machine()
    from treg_megatron.preflight import new_recipe
    from treg_megatron.preflight.plan import sections_of

    text = new_recipe.text(new_recipe.choose(sections_of(config)), name, [*model, *words])
    if arguments.output is None:
        print(text, end="")
        return
    with atomic_write(arguments.output) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"{arguments.output}: `treg preflight --recipe {arguments.output}` says more")
