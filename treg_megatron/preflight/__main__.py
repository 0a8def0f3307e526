"""``python -m treg_megatron.preflight``, the same as ``treg preflight``."""

from treg_megatron.cli.main import run_script

if __name__ == "__main__":
    run_script("preflight", prog="python -m treg_megatron.preflight")
