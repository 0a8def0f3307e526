"""``treg accuracy`` as a script, for torchrun and srun."""

from treg_megatron.cli.main import run_script

if __name__ == "__main__":
    run_script("accuracy")
