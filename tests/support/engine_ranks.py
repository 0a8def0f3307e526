"""What ranks do with the policy on Transformer Engine's layers, and on PyTorch's for comparison."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: attributes of a parameter from which Megatron learns how its gradient is reduced, and what an absent one means
MARKS = {"tensor_model_parallel": False, "sequence_parallel": False, "allreduce": True}


class Described(NamedTuple):
    """The policy of one rank, loaded from a checkpoint."""

    parameters: dict[str, torch.Tensor]
    marks: dict[str, dict[str, bool]]  # of each parameter
    keys: dict[str, tuple[int, ...]]  # key in a checkpoint -> shape of the whole tensor
    extra_states: set[str]  # keys
    count: tuple[int, int]  # preflight's
    classes: set[str]  # of all modules
    windows: list[tuple[int, int] | None]  # of each layer's attention, if it is Transformer Engine's


@contextlib.contextmanager
def layers(engine: bool) -> Iterator[None]:
    """Inside the block, bf16 policies are built of Transformer Engine's layers, or as where it is not installed."""
    from tests.support.engine import on_an_h100
    from treg_megatron.models import lora, policy
    from treg_megatron.utils.substitute import substituted

    def configure(config, *args, **kwargs):
        with on_an_h100():
            return build(config, *args, **kwargs)

    build = policy.PolicyConfig.configure_model
    with (
        substituted(policy, "HAVE_TE", engine),
        substituted(lora, "HAVE_TE", engine),
        substituted(policy.PolicyConfig, "configure_model", configure),
    ):
        yield


def start(tensor: int) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor)
    model_parallel_cuda_manual_seed(1)


def load(checkpoint: Path, tensor: int, engine: bool, precision: str = "bf16"):
    from treg_megatron.checkpoint.policy import load_policy

    with layers(engine):
        return load_policy(checkpoint, tensor=tensor, sequence=tensor > 1, precision=precision)


def entries_of(module) -> list[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    from treg_megatron.checkpoint.layout import MODEL_PREFIX
    from treg_megatron.checkpoint.torch_dist import CONTENT_METADATA

    entries = []
    for entry in nested_values(module.sharded_state_dict(prefix=MODEL_PREFIX, metadata=CONTENT_METADATA)):
        entries += nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    return entries


def keys_of(module) -> dict[str, tuple[int, ...]]:
    """Key in a checkpoint -> shape of the whole tensor, extra states left out."""
    return {e.key: tuple(e.global_shape) for e in entries_of(module) if not e.key.endswith("_extra_state")}


def described(policy) -> Described:
    from treg_megatron.preflight.ranks import parameters_of_the_model

    parameters = dict(policy.module.named_parameters())
    return Described(
        {name: p.detach().clone() for name, p in parameters.items()},
        {name: {m: bool(getattr(p, m, d)) for m, d in MARKS.items()} for name, p in parameters.items()},
        keys_of(policy.module),
        {e.key for e in entries_of(policy.module) if e.key.endswith("_extra_state")},
        parameters_of_the_model([policy]),
        {f"{type(m).__module__}.{type(m).__qualname__}" for m in policy.module.modules()},
        [getattr(m.self_attention.core_attention, "window_size", None) for m in policy.module.decoder.layers],
    )


def load_and_describe(checkpoint: Path, tensor: int) -> tuple[Described, Described]:
    """On Transformer Engine's layers, and on PyTorch's."""
    start(tensor)
    first, second = (described(load(checkpoint, tensor, engine)) for engine in (True, False))
    torch.distributed.barrier()  # the first rank holds the store
    return first, second


def resave(checkpoint: Path, weights: Path, engine: bool, tensor: int) -> None:
    """Load a checkpoint, and write its weights from the layers into which they were loaded."""
    from tests.support.megatron_model import save

    start(tensor)
    save(load(checkpoint, tensor, engine).module, str(weights))


class Adapted(NamedTuple):
    """The adapters of one rank."""

    parameters: dict[str, tuple[int, ...]]  # parameter -> shape on this rank
    keys: dict[str, tuple[int, ...]]  # key in a checkpoint -> shape of the whole tensor
    wrapped: dict[str, str]  # module with an adapter -> class
    parallel: dict[str, bool]  # whether the input of the module is split
    frozen: bool  # whether adapters are all that is trained


def adapted(checkpoint: Path, tensor: int, targets: list[str], precision: str) -> tuple[Adapted, Adapted]:
    """The adapters where Transformer Engine is installed, and where it is not."""
    start(tensor)
    return _adapted(checkpoint, tensor, targets, precision, True), _adapted(
        checkpoint, tensor, targets, precision, False
    )


def _adapted(checkpoint: Path, tensor: int, targets: list[str], precision: str, engine: bool) -> Adapted:
    from nemo.collections.llm.peft.lora import LoRALinear

    from treg_megatron.config.schema import LoraSection
    from treg_megatron.models.lora import adapters
    from treg_megatron.preflight.ranks import _Walkable

    policy = load(checkpoint, tensor, engine, precision)
    transform = adapters(LoraSection(rank=4, alpha=8.0, dropout=0.0, targets=targets), policy.config)
    with layers(engine):
        transform(_Walkable(policy.module))
    modules = {name: m for name, m in policy.module.named_modules() if isinstance(m, LoRALinear)}
    parameters = dict(policy.module.named_parameters())
    return Adapted(
        {name: tuple(p.shape) for name, p in parameters.items() if ".adapter." in name},
        {key: shape for key, shape in keys_of(policy.module).items() if ".adapter." in key},
        {name: type(m.to_wrap).__name__ for name, m in modules.items()},
        {name: m.adapter.input_is_parallel for name, m in modules.items()},
        all(p.requires_grad == (".adapter." in name) for name, p in parameters.items()),
    )


def overlapping_layers(checkpoint: Path) -> dict[str, tuple[bool, bool]]:
    """Whether the layers of a buffer gather or scatter their tokens while they multiply, by the name of the buffer."""
    from treg_megatron.checkpoint.layout import read_metadata
    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.models.build import build_policy, policy_config
    from treg_megatron.objective import Objective

    start(2)
    keys = ("tensor=2", "sequence=true", "tensor_overlap=true")
    recipe = load_recipe(overrides=[f"parallel.{key}" for key in keys])
    with layers(engine=True):
        config = policy_config(
            read_metadata(checkpoint).hf_config, section(recipe, "parallel"), section(recipe, "train")
        )
        config.tensor_model_parallel_size = config.expert_tensor_parallel_size = 2
        config.sequence_parallel = True
        policy = build_policy(config, Objective.of(section(recipe, "objective")))
        policy.configure_model()
    return {
        module.ub_name: (module.ub_overlap_ag_fprop, module.ub_overlap_rs_fprop)
        for module in policy.module.modules()
        if getattr(module, "ub_name", None)
    }


def make_overlap_buffers() -> str:
    """What in the compiled part Transformer Engine asks first for its buffers."""
    from tests.support.engine import NotCompiledError
    from treg_megatron.training.callbacks.tensor_overlap import OverlapBuffers

    start(2)
    try:
        OverlapBuffers(180, 64).on_fit_start(None, None)
    except NotCompiledError as error:
        return str(error)
    return ""
