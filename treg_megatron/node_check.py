"""``python -m treg_megatron.node_check``, as slurm/common.sh runs it."""

from treg_megatron.preflight.nodes import main
from treg_megatron.utils import entry

if __name__ == "__main__":
    entry.run(main)
