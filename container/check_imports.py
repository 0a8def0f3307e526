"""Imports all that the package imports, also inside functions, and names what is missing: the last step of an image.

An image is built with --no-deps, so that nothing replaces NVIDIA's builds; this shows that nothing was left out by it.
"""

import ast
import importlib
import sys
from pathlib import Path

import treg_megatron

#: of the extras: vLLM pins a torch of its own and needs another environment; alpaca_eval runs in a process of its own
OPTIONAL = {"vllm", "alpaca_eval"}


def third_party_modules(package: Path) -> list[str]:
    """Modules that the source of a package names in import statements, except Python's own and the package's."""
    named = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                named.add(node.module)
    ours = {package.name, *sys.stdlib_module_names, *OPTIONAL}
    return sorted(name for name in named if name.partition(".")[0] not in ours)


def missing(modules: list[str]) -> dict[str, str]:
    """Module -> error, of those that cannot be imported; a driver that only a node with GPUs has is not missing."""
    errors = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:
            if "libcuda.so" not in str(error) and "libnvidia-ml.so" not in str(error):
                errors[name] = f"{type(error).__name__}: {error}"
    return errors


def main() -> int:
    from treg_megatron.distributed.stack import describe_stack, require_stack
    from treg_megatron.errors import UserError

    try:
        print(describe_stack(require_stack()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    modules = third_party_modules(Path(treg_megatron.__file__).parent)
    errors = missing(modules)
    for name, error in errors.items():
        print(f"error: {name} cannot be imported: {error}", file=sys.stderr)
    print(f"{len(modules) - len(errors)} of {len(modules)} modules are there")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
