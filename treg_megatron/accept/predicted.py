"""The memory that preflight predicts for a recipe, as a line of JSON.

    python -m treg_megatron.accept.predicted KEY=VALUE ...

A program of its own, because preflight hides what only a GPU has, and works in a process group that is not real.
"""

import json
import sys

from treg_megatron.config.recipe import load_recipe
from treg_megatron.utils import entry
from treg_megatron.utils.imports import heavy_imports

NOT_TENSORS = ("communication", "fragmentation")  # allowances for what torch's allocator does not count


def main() -> None:
    """Print the bytes of the fullest rank's tensors."""
    from treg_megatron.distributed.cpu_redirect import use_cpu

    use_cpu()
    with heavy_imports():
        from treg_megatron.preflight.plan import make_plan, sections_of

        plan = make_plan(sections_of(load_recipe(overrides=sys.argv[1:])))
    parts = plan.stages[plan.fullest].parts
    print(json.dumps({"peak_bytes": sum(nbytes for name, nbytes in parts.items() if name not in NOT_TENSORS)}))


if __name__ == "__main__":
    entry.run(main)
