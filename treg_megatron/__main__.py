"""``python -m treg_megatron``, the same as ``treg``."""

from treg_megatron.cli.main import main

if __name__ == "__main__":
    main()
