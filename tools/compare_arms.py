"""``treg compare`` as a script."""

from treg_megatron.cli.main import run_script

if __name__ == "__main__":
    run_script("compare")
