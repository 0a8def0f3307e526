"""What the trainer and the model's configuration become on a machine with GPUs, as far as a CPU can tell."""

import pytest
import torch

from tests.support.training import RECIPE
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.distributed.launch import RankInfo


@pytest.mark.parametrize("visible, devices", [(4, [0, 1, 2, 3]), (1, [0, 0, 0, 0])])
def test_the_trainer_knows_which_gpus_its_processes_see(visible, devices, monkeypatch):
    """With ``srun --gpus-per-task=1`` Lightning would refuse to use as many GPUs as there are processes."""
    from treg_megatron.training import build

    monkeypatch.setattr(build, "is_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    recipe = load_recipe(RECIPE, [])
    strategy = build.strategy(section(recipe, "parallel"), section(recipe, "train"), initial_weights=None)
    trainer = build.trainer(RankInfo(6, 8, 2, 4), strategy, section(recipe, "train"), 1, [])
    assert trainer.strategy.parallel_devices == [torch.device("cuda", index) for index in devices]
    assert (trainer.num_nodes, trainer.num_devices, strategy.num_processes) == (2, 4, 4)


@pytest.mark.parametrize(
    "engine, gemma, precision, torch_layers",
    [
        (False, False, "bf16", True),
        (True, False, "bf16", False),
        (True, False, "fp32", True),  # Transformer Engine has no attention to packed sequences in fp32
        (True, True, "bf16", True),
    ],
)
def test_where_layers_are_plain_torch(engine, gemma, precision, torch_layers, monkeypatch):
    from treg_megatron.models import build

    monkeypatch.setattr(build.policies, "HAVE_TE", engine)
    assert build.takes_torch_layers(gemma, precision) == torch_layers


def test_saving_gathers_in_host_memory_on_one_data_rank():
    """Otherwise every rank gathers the whole optimizer's state through its GPU."""
    from treg_megatron.training import build

    recipe = load_recipe(RECIPE, [])
    strategy = build.strategy(section(recipe, "parallel"), section(recipe, "train"), initial_weights=None)
    assert strategy.sharded_state_dict_metadata["distrib_optim_fully_reshardable_mem_efficient"]
