"""Redirects CUDA calls to the CPU, so that unmodified Megatron-core and NeMo run on a machine without a GPU.

Both libraries hard-code the CUDA device: ``torch.empty(..., device="cuda")``, ``tensor.cuda()``,
``torch.cuda.current_device()``. :func:`use_cpu` redirects those calls to the CPU for the life of the process, so that
the distributed optimizer, pipeline schedules and checkpoints run over gloo exactly as written. It must be called
explicitly and fails if a CUDA device is visible, so a job that could use a GPU never runs on the CPU silently.

With ``TREG_CPU_DEVICES=labelled``, tensors remember which device the code put them on, see
:mod:`treg_megatron.distributed.device_labels`.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from treg_megatron.errors import UserError
from treg_megatron.kernels.memory import keep_memory
from treg_megatron.utils.imports import heavy_imports

#: packages that Megatron and NeMo use wherever they can be imported, and that fail without a GPU
GPU_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")

#: the environment variable that makes tensors remember their device
DEVICES_VARIABLE = "TREG_CPU_DEVICES"

#: modes that are on in this process, in the order in which they were entered
modes: list[TorchFunctionMode] = []
_log = logging.getLogger(__name__)


def use_cpu() -> None:
    """Redirect CUDA calls of this process to the CPU. Idempotent; inherited by forked processes.

    Call it before Megatron is imported: Transformer Engine and Apex are hidden from then on.

    Raises:
        RuntimeError: a CUDA device is visible.
        UserError: ``TREG_CPU_KERNELS`` does not name a set of kernels, or ``TREG_CPU_DEVICES`` is neither empty nor
            ``labelled``.
    """
    if modes:
        return
    devices = os.environ.get(DEVICES_VARIABLE, "")
    if devices not in ("", "labelled"):
        raise UserError(f"{DEVICES_VARIABLE}={devices}: it is empty or labelled")
    if torch.cuda.is_available():
        raise RuntimeError("a CUDA device is visible: Megatron runs on it, the CPU redirect stays off")
    for package in GPU_PACKAGES:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # to Python: not installed
    keep_memory()
    with heavy_imports():
        _replace_cuda_runtime()
        from treg_megatron.kernels.kernels import cpu_kernels

        cpu_kernels()  # at start-up, so that it logs and fails early
    mode = _CudaMeansCpu()
    mode.__enter__()
    modes.append(mode)
    run_backward = getattr(torch.autograd, "_engine_run_backward", None)
    if run_backward is None:
        _log.warning(
            "torch %s: torch.autograd._engine_run_backward is missing; on this CPU sequence parallelism and recompute "
            "may fail in the backward pass",
            torch.__version__,
        )
    else:
        torch.autograd._engine_run_backward = backward_in(modes, run_backward)
    if devices:
        from treg_megatron.distributed import device_labels

        device_labels.install()


def is_cpu() -> bool:
    """Whether :func:`use_cpu` is on in this process."""
    return bool(modes)


def uses_cpu_kernels() -> bool:
    """Whether kernels may be chosen that only a CPU has: not with device labels, which stand for a GPU."""
    return len(modes) == 1


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device of every torch call, and the tensor methods that move to CUDA or query it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # the distributed optimizer groups parameters by type names such as 'torch.cuda.FloatTensor'
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if "device" in kwargs:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        if func is torch.Tensor.to:
            args = (args[0], *(_cpu_for_cuda(a) for a in args[1:]))
        return func(*args, **kwargs)


def _cpu_for_cuda(device: Any) -> Any:
    if isinstance(device, str) and device.startswith("cuda"):
        return "cpu"
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    if type(device) is int:  # the result of current_device()
        return torch.device("cpu")
    return device


def backward_in(modes: Sequence[TorchFunctionMode], run: Callable) -> Callable:
    """The autograd engine's function ``run``, called inside ``modes``.

    torch disables a mode while it handles a call that the mode intercepted, so calls made by a backward pass would
    otherwise bypass it.
    """

    def run_in_mode(*args, **kwargs):
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return run(*args, **kwargs)

    return run_in_mode


class _NoStream:
    """A stand-in for CUDA streams and events: on the CPU every operation has already finished, in order."""

    def __init__(self, *args, **kwargs): ...

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def record(self, *args): ...

    def wait(self, *args): ...

    def wait_stream(self, *args): ...

    def wait_event(self, *args): ...

    def record_event(self, *args):
        return self

    def synchronize(self): ...

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


def _replace_cuda_runtime() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: 0
    cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1  # NeMo seeds Megatron's RNG tracker only if there is a device
    cuda.set_device = lambda device: None
    cuda.get_device_name = lambda *a: "cpu"
    cuda.device = lambda *a: contextlib.nullcontext()
    cuda.Stream = cuda.Event = cuda.ExternalStream = _NoStream
    cuda.stream = lambda *a: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda *a: _NoStream()
    for no_op in (
        "synchronize",
        "empty_cache",
        "ipc_collect",
        "reset_peak_memory_stats",
        "manual_seed",
        "manual_seed_all",
        "set_per_process_memory_fraction",
    ):
        setattr(cuda, no_op, lambda *a, **k: None)
    for no_memory in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, no_memory, lambda *a, **k: 0)
    cuda.memory_stats = lambda *a, **k: {}
    cuda.get_rng_state = lambda *a: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *a: torch.set_rng_state(state)
    cuda.get_rng_state_all = lambda: [torch.get_rng_state()]

    # it warns that the CPU generator advanced in place of the CUDA one; here they are the same
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)

    from megatron.core.distributed import param_and_grad_buffer as buffers

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, _unless_in_place(getattr(buffers, name)))

    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy_on_cpu(token_dispatcher.maybe_move_tensor_to_cpu)


def _unless_in_place(collective: Callable) -> Callable:
    """``collective(output, input, ...)``, skipped if output and input are the same memory.

    In a group of one rank, all-gather and reduce-scatter have nothing to do. NCCL returns at once, but gloo copies all
    parameters and gradients onto themselves.
    """

    def unless_in_place(output: torch.Tensor, input: torch.Tensor, *args, **kwargs):
        if output.data_ptr() == input.data_ptr() and output.numel() == input.numel():
            return None
        return collective(output, input, *args, **kwargs)

    return unless_in_place


def _as_numpy_on_cpu(move: Callable) -> Callable:
    """Megatron's ``maybe_move_tensor_to_cpu``, which then also converts tensors that are already on the CPU.

    The experts' all-to-all takes split sizes as a NumPy array, but Megatron converts only tensors from a GPU.
    """

    def moved(tensor: torch.Tensor | None, as_numpy: bool = False, record_stream: bool = False):
        tensor = move(tensor, as_numpy, record_stream)
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return moved
