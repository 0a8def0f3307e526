"""GPUs by name (``cluster.gpu``), and the utilisation that training on them was measured to reach.

docs/PREFLIGHT.md lists the sources of every number here.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from treg_megatron.config.schema import ClusterSection
from treg_megatron.errors import UserError


class Gpu(NamedTuple):
    """What one GPU has: memory in GB (10^9 bytes), dense bf16 TFLOP/s, NVLink in GB/s and one direction."""

    memory: float
    peak_tflops: float
    node_bandwidth: float


#: by the name in ``cluster.gpu``; SXM boards in nodes whose GPUs NVSwitch connects
GPUS = {
    "h100": Gpu(80.0, 989.0, 450.0),
    "h200": Gpu(141.0, 989.0, 450.0),
    "a100_80": Gpu(80.0, 312.0, 300.0),
    "a100_40": Gpu(40.0, 312.0, 300.0),
    "b200": Gpu(180.0, 2250.0, 900.0),
}


class Utilisation(NamedTuple):
    """Model FLOPs utilisation in bf16 that was measured with a dense model of ``parameters``."""

    parameters: float
    share: float
    measured: str  # where, in a few words; "assumption" where nothing was found


_FOUNDRY = "MosaicML llm-foundry"
_H100 = (
    Utilisation(1.3e9, 0.42, _FOUNDRY),
    Utilisation(2.7e9, 0.44, _FOUNDRY),
    Utilisation(6.7e9, 0.46, _FOUNDRY),
    Utilisation(13e9, 0.40, _FOUNDRY),
    Utilisation(30e9, 0.44, _FOUNDRY),
    Utilisation(70e9, 0.51, "NVIDIA DGX Cloud benchmarks, fine-tuning"),
    Utilisation(405e9, 0.43, "Meta, 8,192 GPUs"),
)
DENSE = {
    "h100": _H100,
    "h200": tuple(row._replace(measured="assumption: as H100, whose processor it has") for row in _H100),
    "a100": (
        Utilisation(0.76e9, 0.57, _FOUNDRY),
        Utilisation(1.3e9, 0.60, _FOUNDRY),
        Utilisation(2.7e9, 0.62, _FOUNDRY),
        Utilisation(6.7e9, 0.64, _FOUNDRY),
        Utilisation(13e9, 0.60, _FOUNDRY),
        Utilisation(30e9, 0.55, _FOUNDRY),
        Utilisation(70e9, 0.53, _FOUNDRY),
    ),
    "b200": (
        Utilisation(70e9, 0.38, "newmind.ai, eight B200"),
        Utilisation(405e9, 0.45, "NVIDIA DGX Cloud benchmarks, GB200"),
    ),
}
EXPERTS = {
    "h100": Utilisation(30e9, 0.28, "NVIDIA NeMo AutoModel, Qwen3 30B-A3B"),
}
#: for what no source was found: experts on other GPUs, and CPUs
ASSUMED = Utilisation(0.0, 0.28, "assumption: as experts on H100")
ASSUMED_CPU = Utilisation(0.0, 0.40, "assumption")


def with_gpu(cluster: ClusterSection) -> ClusterSection:
    """The section with every key that is null taken from the GPU that ``cluster.gpu`` names.

    Raises:
        UserError: a key is null and ``cluster.gpu`` is too.
    """
    gpu = GPUS[cluster.gpu] if cluster.gpu else None
    missing = {"gpu_memory": "memory", "peak_tflops": "peak_tflops", "node_bandwidth": "node_bandwidth"}
    missing = {key: name for key, name in missing.items() if getattr(cluster, key) is None}
    if missing and gpu is None:
        raise UserError(f"cluster.{min(missing)} has no value: set it, or name cluster.gpu ({', '.join(GPUS)})")
    return dataclasses.replace(cluster, **{key: getattr(gpu, name) for key, name in missing.items()})


def utilisation(cluster: ClusterSection, fields: dict[str, Any], parameters: float) -> Utilisation:
    """The utilisation to expect: ``cluster.mfu``, or the measured one of the nearest size on this kind of GPU.

    Args:
        fields: the model's sizes, from ``families.model_fields``.
        parameters: of the model.
    """
    if cluster.mfu is not None:
        return Utilisation(parameters, cluster.mfu, "cluster.mfu")
    if cluster.device == "cpu" or cluster.gpu is None:
        return ASSUMED_CPU
    kind = cluster.gpu.split("_")[0]
    if fields.get("num_moe_experts"):
        return EXPERTS.get(kind, ASSUMED)
    return min(DENSE[kind], key=lambda row: abs(math.log(row.parameters / parameters)))
