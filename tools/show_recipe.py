"""``treg recipe`` as a script; without arguments it prints the base recipe."""

import sys

from treg_megatron.cli.main import run_script

if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.argv += ["--recipe", "base"]
    run_script("recipe")
