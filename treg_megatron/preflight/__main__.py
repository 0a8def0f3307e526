"""``python -m treg_megatron.preflight``, the same as ``treg preflight``."""

import sys

from treg_megatron.cli import preflight
from treg_megatron.utils import entry

if __name__ == "__main__":
    entry.run(lambda: preflight.run(preflight.parser("python -m treg_megatron.preflight").parse_args(sys.argv[1:])))
