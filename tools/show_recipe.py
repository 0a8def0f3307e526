"""Print a recipe as a run would read it: defaults filled in, overrides applied, and where each value comes from.

python tools/show_recipe.py --recipe recipes/X.yaml [section.key=value ...]
python tools/show_recipe.py --recipe recipes/X.yaml --key train.output
"""

import argparse

from treg_megatron.cli.arguments import recipe_at
from treg_megatron.config import recipe
from treg_megatron.utils import entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", default=str(recipe.BASE_RECIPE), metavar="YAML", help="(default: recipes/base.yaml)"
    )
    parser.add_argument("--key", metavar="SECTION.KEY", help="print this key alone; without a value it is refused")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys that differ from the recipe")
    arguments = parser.parse_args()
    config, sources = recipe.trace_recipe(recipe_at(arguments.recipe), arguments.overrides)
    print(recipe.value(config, arguments.key) if arguments.key else recipe.described(config, sources))


if __name__ == "__main__":
    entry.run(main)
