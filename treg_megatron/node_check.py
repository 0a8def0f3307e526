"""``python -m treg_megatron.node_check``, the same as ``treg check-nodes``."""

from treg_megatron.cli.main import run_script

if __name__ == "__main__":
    run_script("check-nodes", prog="python -m treg_megatron.node_check")
