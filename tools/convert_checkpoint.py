"""``treg import``, ``treg export`` and ``treg verify`` as one script."""

from treg_megatron.cli.main import run_script

if __name__ == "__main__":
    run_script("import", "export", "verify")
