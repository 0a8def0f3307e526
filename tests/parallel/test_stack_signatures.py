"""Calls into NeMo and megatron-core match the installed signatures.

Both change keywords between minor versions, and a call that no longer binds would otherwise fail hours into a job. The
calls are collected from our source, so new ones are covered automatically: calls of imported names and their
attributes, and calls of super() in classes with an imported base. Method calls on instances are not collected.
"""

import ast
import importlib
import inspect
from functools import partial
from pathlib import Path

import pytest

#: the one module that may name what only some of the supported versions have
VERSIONS = "distributed/megatron_versions.py"
PACKAGE = Path(__file__).resolve().parents[2] / "treg_megatron"
STACK = ("megatron", "nemo")
FEWEST_CALLS, FEWEST_OF_SUPER = 75, 5


def imported_names(tree: ast.AST) -> dict[str, object]:
    """Local name -> object, for everything that a module imports from the two libraries."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in STACK:
            module = importlib.import_module(node.module)
            for alias in node.names:
                found = getattr(module, alias.name, None)
                names[alias.asname or alias.name] = (
                    found if found is not None else importlib.import_module(f"{node.module}.{alias.name}")
                )
    return names


def resolve(function: ast.expr, names: dict[str, object]) -> object | None:
    if isinstance(function, ast.Name):
        return names.get(function.id)
    if isinstance(function, ast.Attribute):
        owner = resolve(function.value, names)
        return getattr(owner, function.attr) if owner is not None else None
    return None


def resolve_in(module: str, function: ast.expr, names: dict[str, object]) -> object | None:
    """As :func:`resolve`; what the installed version lacks is an error everywhere but in :data:`VERSIONS`."""
    try:
        return resolve(function, names)
    except AttributeError:
        if module != VERSIONS:
            raise
        return None


def calls_of_super(tree: ast.AST, names: dict[str, object]) -> list[tuple[object, ast.Call]]:
    """Calls of super().method(...) in classes whose first base is from the two libraries; ``self`` is already bound."""
    found = []
    for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.bases):
        base = resolve(owner.bases[0], names)
        for node in ast.walk(owner) if base is not None else ():
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Call)
                and getattr(node.func.value.func, "id", None) == "super"
            ):
                found.append((partial(getattr(base, node.func.attr), None), node))
    return found


def calls() -> list:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names, module = imported_names(tree), path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (target := resolve_in(module, node.func, names)) is not None:
                found.append(pytest.param(target, node, id=f"{module}:{node.lineno}"))
        for target, node in calls_of_super(tree, names):
            found.append(pytest.param(target, node, id=f"{module}:{node.lineno} super"))
    return found


def test_the_calls_are_found():
    """Check the search itself: with an empty list, the following tests would pass."""
    found = [call.id for call in calls()]
    assert len(found) >= FEWEST_CALLS and len([name for name in found if name.endswith(" super")]) >= FEWEST_OF_SUPER


@pytest.mark.parametrize("target, call", calls())
def test_call_binds(target, call):
    arguments = [None for a in call.args if not isinstance(a, ast.Starred)]
    keywords = {k.arg: None for k in call.keywords if k.arg}
    starred = len(arguments) < len(call.args) or len(keywords) < len(call.keywords)
    signature = inspect.signature(target)
    (signature.bind_partial if starred else signature.bind)(*arguments, **keywords)


def test_nemos_call_of_megatrons_optimizer_binds():
    """NeMo 2.7 cannot call megatron-core 0.16 by itself; its call is read from its source."""
    from megatron.core import optimizer as optimizers
    from nemo.lightning import _strategy_lib

    from treg_megatron.distributed.megatron_versions import arguments_that_nemo_passes

    tree = ast.parse(inspect.getsource(_strategy_lib.setup_megatron_optimizer))
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "get_megatron_optimizer")
    before = optimizers.get_megatron_optimizer
    with arguments_that_nemo_passes():
        signature = inspect.signature(optimizers.get_megatron_optimizer)
    signature.bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})
    assert optimizers.get_megatron_optimizer is before


def test_the_optimizer_of_every_version_takes_what_we_pass_on():
    """Behind NeMo's signature, the keywords that reach megatron-core are its own."""
    from megatron.core import optimizer as optimizers

    from treg_megatron.distributed import megatron_versions

    keywords = {"use_gloo_process_groups": True}
    if not megatron_versions.takes_weight_decay_condition():
        keywords["config_overrides"] = megatron_versions.no_decay_of_biases_and_norms(optimizers.OptimizerConfig())
        with pytest.raises(NotImplementedError):
            megatron_versions.with_config_overrides(optimizers.get_megatron_optimizer)(None, [], lr_mult=2.0)
    inspect.signature(optimizers.get_megatron_optimizer).bind(None, [], **keywords)


def overrides() -> list:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.lightning.megatron_parallel import MegatronLossReduction
    from nemo.lightning.pytorch.plugins import MegatronDataSampler

    from treg_megatron.distributed import stage_shapes
    from treg_megatron.kernels import core_attention
    from treg_megatron.models import layers, lora
    from treg_megatron.models import policy as model
    from treg_megatron.training import data_module as data
    from treg_megatron.training import offload, strategy

    return [
        (GPTModel, model.ResponseGPTModel, ["_postprocess"]),
        (llm.GPTConfig, model.PolicyConfig, ["configure_model"]),
        (MegatronLossReduction, model.PreferenceLossReduction, ["forward", "reduce"]),
        (DotProductAttention, core_attention.SdpaAttention, ["__init__", "forward", "sharded_state_dict"]),
        (SelfAttention, layers.RotatedSelfAttention, ["forward"]),
        (MegatronDataSampler, data.PairSampler, ["transform_dataloader", "on_megatron_step_start"]),
        (P2PCommunicator, stage_shapes.KnownShapes, ["_communicate_shapes"]),
        (llm.peft.LoRA, lora.PolicyLoRA, ["transform"]),
        (nl.MegatronStrategy, strategy.PolicyStrategy, ["setup_optimizers"]),
        (
            DistributedOptimizer,
            strategy.TorchAdamDistributedOptimizer,
            ["sharded_state_dict", "load_state_dict", "_set_main_param_and_optimizer_states"],
        ),
        (
            DistributedOptimizer,
            strategy.OffloadingDistributedOptimizer,
            ["state_dict", "sharded_state_dict", "load_state_dict", "_build_model_and_main_param_groups"],
        ),
        (
            HybridDeviceOptimizer,
            offload.OffloadedAdam,
            ["update_fp32_param_by_new_param", "_update_fp32_params_by_new_state", "_set_sub_optimizer_grads"],
        ),
    ]


@pytest.mark.parametrize("base, ours, methods", overrides(), ids=lambda x: getattr(x, "__name__", None))
def test_overrides_accept_the_arguments_of_their_base(base, ours, methods):
    for method in methods:
        theirs = inspect.signature(getattr(base, method))
        mine = inspect.signature(getattr(ours, method))
        required = [
            p for p in theirs.parameters.values() if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL
        ]
        mine.bind(
            *(None for p in required if p.kind is not p.KEYWORD_ONLY),
            **{p.name: None for p in required if p.kind is p.KEYWORD_ONLY},
        )


@pytest.mark.parametrize(
    "owner, property_name", [("GPTModel", "training_loss_reduction"), ("GPTModel", "validation_loss_reduction")]
)
def test_properties_that_we_replace_exist(owner, property_name):
    from nemo.collections import llm

    assert isinstance(inspect.getattr_static(getattr(llm, owner), property_name), property)


def test_linear_layers_accept_the_arguments_of_megatrons_functions():
    from megatron.core.tensor_parallel import layers

    from treg_megatron.kernels.linear import ColumnParallelLinearIn

    ours = list(inspect.signature(ColumnParallelLinearIn._forward_impl).parameters)[1:]
    for function in (layers.linear_with_grad_accumulation_and_async_allreduce, layers.linear_with_frozen_weight):
        theirs = set(inspect.signature(function).parameters) - {"async_grad_allreduce"}
        assert set(ours) == theirs
    recorded = inspect.signature(layers.LinearWithGradAccumulationAndAsyncCommunication.forward)
    assert list(recorded.parameters)[1:] == ours, "passed by position"
    frozen = inspect.signature(layers.LinearWithFrozenWeight.forward)
    assert list(frozen.parameters)[1:] == ["input", "weight", "bias", "allreduce_dgrad", "tp_group"]
