"""``python -m treg_megatron.node_check``, the same as ``treg check-nodes``."""

import sys

from treg_megatron.cli import check_nodes
from treg_megatron.utils import entry

if __name__ == "__main__":
    entry.run(
        lambda: check_nodes.run(check_nodes.parser("python -m treg_megatron.node_check").parse_args(sys.argv[1:]))
    )
