"""Device labels: values stay on the CPU, but each storage carries the device that the code believes it is on.

On CPU ranks everything is one device, so a CPU tensor in an operation on the GPU, a CPU tensor given to NCCL, or a wait
for the GPU in the middle of a step go unnoticed. ``TREG_CPU_DEVICES=labelled`` makes :func:`use_cpu
<treg_megatron.distributed.cpu_redirect.use_cpu>` install two modes on top of its own. One sees torch's Python calls: it
labels what was asked for on CUDA, turns moves between devices into copies, and answers questions about the device by
the label. The other sees every operator: it passes labels on and refuses what CUDA and NCCL would refuse, with
:class:`DeviceFault`. The error names the place in the code.

Host syncs (``item``, ``tolist``, ``nonzero``, a boolean index, blocking copies, ``synchronize``) are refused only
between the start of a micro-batch's forward pass and the end of its backward pass, where the GPU would run dry.
"""

import contextlib
import functools
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from treg_megatron.distributed import cpu_redirect

CUDA = torch.device("cuda", 0)

#: (end of the file's path, function) -> why the fault is tolerated. A fixed one loses its line here.
KNOWN_FAULTS = {
    ("treg_megatron/kernels/rms_norm.py", "forward"): "LoRA validates at step 0 before NeMo moves frozen weights",
    ("megatron/core/transformer/moe/moe_utils.py", "permute"): "masked_select of tokens by expert, without TE",
    ("megatron/core/transformer/moe/token_dispatcher.py", "_maybe_dtoh_and_synchronize"): "counts of the all-to-all",
}


class DeviceFault(RuntimeError):
    """Code that works on a CPU but would fail, or wait for the device, on CUDA."""


class DeviceLabels:
    """The labels of this process: what is checked now, and what was seen.

    Attributes:
        raises: raise :class:`DeviceFault`; otherwise faults are only counted.
        faults: number of known or not raised faults, by their message.
        launches: number of operators on labelled tensors that launch a kernel.
    """

    def __init__(self) -> None:
        self.raises = True
        self.faults: Counter[str] = Counter()
        self.launches = 0
        self.in_flight = 0  # micro-batches between the start of forward and the end of backward
        self.checks = True
        self.answers = True  # questions about the device are answered by the label
        self.inherits = False  # tensors that torch itself creates now are on CUDA
        self.copies = False  # Python asked for a copy; gloo's own copies are none of NCCL's
        self.gloo_groups: set[str] = set()

    def fault(self, what: str) -> None:
        if not self.checks:
            return
        file, line, function = _place()
        message = f"{file}:{line} ({function}): {what}"
        known = any(file.endswith(end) and function == name for end, name in KNOWN_FAULTS)
        if self.raises and not known:
            raise DeviceFault(message)
        self.faults[message] += 1

    def host_sync(self, what: str) -> None:
        if self.in_flight:
            self.fault(f"{what} makes the host wait for the device inside a micro-batch")

    @contextlib.contextmanager
    def set(self, **values: Any) -> Iterator[None]:
        """Other values of attributes while the block runs."""
        before = {name: getattr(self, name) for name in values}
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)


labels: DeviceLabels | None = None


def is_labelled() -> bool:
    """Whether storages carry device labels in this process."""
    return labels is not None


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """No checks while the block runs: for code that only a test runs inside a micro-batch."""
    with labels.set(checks=False) if labels else contextlib.nullcontext():
        yield


def install() -> DeviceLabels:
    """Label devices in this process from now on; requires :func:`cpu_redirect.use_cpu`. Idempotent."""
    global labels
    if labels is None:
        labels = DeviceLabels()
        mode = _PythonCalls(labels)
        mode.__enter__()
        cpu_redirect.modes.append(mode)  # the backward pass enters it, too
        _Operators(labels).__enter__()
        _label_libraries(labels)
    return labels


def on_cuda(tensor: Tensor) -> bool:
    """Whether the tensor's label is CUDA."""
    with torch._C.DisableTorchFunction():
        return _storage(tensor) is not None and getattr(_storage(tensor), "on_cuda", False)


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # inside vmap
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return None
    return tensor.untyped_storage()


def _label(result: Any, cuda: bool = True) -> Any:
    with torch._C.DisableTorchFunction():
        for tensor in _tensors(result):
            if (storage := _storage(tensor)) is not None:
                storage.on_cuda = cuda  # torch keeps a storage's Python object for as long as its memory
    return result


def _tensors(values: Any) -> list[Tensor]:
    """Tensors in arguments or results: lists, tuples and dicts of tensors included."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


_T = torch.Tensor
_FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, _T.new_tensor}  # they copy values that Python holds


class _PythonCalls(TorchFunctionMode):
    """Labels what is asked for on CUDA, copies between devices, and answers what device a tensor is on."""

    def __init__(self, labels: DeviceLabels):
        super().__init__()
        self.labels = labels
        self.answers: dict[Any, Callable] = {
            _T.device.__get__: lambda: CUDA,
            _T.is_cuda.__get__: lambda: True,
            _T.is_cpu.__get__: lambda: False,
            _T.get_device: lambda: 0,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.answers:
            labelled = self.labels.answers and on_cuda(args[0])
            return self.answers[func]() if labelled else func(*args, **kwargs)
        if func in (_T.to, _T.cuda, _T.cpu):
            return self.moved(func, args, kwargs)
        if func is _T.tolist and on_cuda(args[0]):
            self.labels.host_sync("tolist")
        if func in (_T.numpy, _T.__array__) and on_cuda(args[0]):
            self.labels.fault("a CUDA tensor has no NumPy view")
        asked = _is_cuda(kwargs.get("device"))
        inherits = asked is None and any(map(on_cuda, _tensors([args, kwargs])))
        by_index = func in (_T.__getitem__, _T.__setitem__)  # a list of indices becomes a CPU tensor on CUDA as well
        copies = func in (_T.copy_, _T.__setitem__)
        with self.labels.set(inherits=inherits and not by_index, copies=copies):
            result = func(*args, **kwargs)
        if func in _FROM_HOST and (asked or inherits):
            if not any(map(on_cuda, _tensors([args]))) or func is _T.new_tensor:
                self.labels.host_sync(f"{func.__name__} of host values on the device")
                result = result.clone()  # as_tensor shares memory with its argument
            return _label(result)
        return result if asked is None else _label(result, asked)

    def moved(self, func, args, kwargs):
        tensor = args[0]
        cuda = {_T.cuda: True, _T.cpu: False}.get(func)
        for target in (*args[1:], kwargs.get("device"), kwargs.get("other")) if cuda is None else ():
            cuda = _is_cuda(target) if cuda is None else cuda
        with self.labels.set(answers=False):
            result = func(*args, **kwargs)
        if cuda is None or cuda == on_cuda(tensor):
            return result
        waits = not kwargs.get("non_blocking") and not (func is _T.cuda and any(a is True for a in args[1:]))
        if waits:
            self.labels.host_sync(f"{func.__name__}: a blocking copy {'to' if cuda else 'from'} the device")
        with torch._C.DisableTorchFunction():
            if result.data_ptr() == tensor.data_ptr():
                result = result.clone()
        return _label(result, cuda)


def _is_cuda(device: Any) -> bool | None:
    """Whether a device argument names CUDA; None if it names neither CUDA nor the CPU."""
    if isinstance(device, Tensor):
        return on_cuda(device)
    if type(device) is int:
        return True
    if isinstance(device, str):
        device = torch.device(device)
    if isinstance(device, torch.device):
        return {"cuda": True, "cpu": False}.get(device.type)
    return None


_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._foreach_copy_.default}
_SYNCS = {
    _aten._local_scalar_dense.default: "reading a value (item, bool, int, float)",
    _aten.nonzero.default: "nonzero",
    _aten.masked_select.default: "masked_select",
    _aten.equal.default: "equal",
    _aten._unique2.default: "unique",
    _aten.unique_consecutive.default: "unique_consecutive",
    _aten.unique_dim.default: "unique",
    _aten.bincount.default: "bincount",
}
_INDEXED = {_aten.index.Tensor, _aten._unsafe_index.Tensor}
_INDEX_PUTS = {_aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
#: beside pointwise operators, those that take a CPU scalar among CUDA tensors
_TAKE_SCALARS = {_aten.fill_.Tensor, _aten.masked_fill.Tensor, _aten.masked_fill_.Tensor}
#: collectives without data
_WITHOUT_DATA = {"c10d::barrier"}


class _Operators(TorchDispatchMode):
    """Passes labels on from operator to operator, and refuses what CUDA and NCCL would."""

    def __init__(self, labels: DeviceLabels):
        super().__init__()
        self.labels = labels

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            tensors = _tensors([args, kwargs])
            on = [on_cuda(tensor) for tensor in tensors]
            if func.namespace == "c10d":
                self.check_collective(func, args, on)
                return func(*args, **kwargs)
            if any(on) and self.labels.checks:
                self.check(func, args, kwargs, tensors, on)
            self.labels.launches += any(on) and _launches(func)
            result = func(*args, **kwargs)
            if func not in _COPIES and (any(on) or (not tensors and self.labels.inherits)):
                _label(result)
            return result

    def check(self, func, args, kwargs, tensors, on) -> None:
        labels = self.labels
        if func in _SYNCS:
            labels.host_sync(_SYNCS[func])
        elif func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            labels.host_sync("repeat_interleave without output_size")
        elif func in _COPIES:
            waits = not (args[2:] and args[2]) and not kwargs.get("non_blocking")
            if labels.copies and waits and len(set(on)) == 2:
                labels.host_sync("copy_: a blocking copy between the host and the device")
        elif func in _INDEXED | _INDEX_PUTS and on[0]:
            indices = [index for index in args[1] if index is not None]
            if not all(map(on_cuda, indices)):
                labels.host_sync("an index on the host (a blocking copy to the device)")
            # one value written through one mask is a masked_fill
            fills = func in _INDEX_PUTS and len(indices) == 1 and args[2].numel() == 1
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not fills:
                labels.host_sync("a boolean index")
        elif not all(on):
            self.check_mix(func, tensors, on)

    def check_mix(self, func, tensors, on) -> None:
        takes_scalars = torch.Tag.pointwise in func.tags or func in _TAKE_SCALARS or "_foreach_" in func.name()
        elsewhere = [tensor for tensor, cuda in zip(tensors, on, strict=True) if not cuda]
        writes_to_cpu = func._schema.is_mutable and not on[0]
        if writes_to_cpu or not takes_scalars or any(tensor.dim() for tensor in elsewhere):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in elsewhere)
            self.labels.fault(f"{func.name()} mixes CUDA tensors with CPU tensors of shape {shapes}")

    def check_collective(self, func, args, on) -> None:
        if all(on) or func.name() in _WITHOUT_DATA or not self.labels.checks:
            return
        for argument in args:
            if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
                group = torch._C._distributed_c10d.ProcessGroup.unbox(argument)
                if group.group_name in self.labels.gloo_groups:
                    return
        self.labels.fault(f"{func.name()} of a CPU tensor in a group that NCCL serves")


@functools.cache
def _launches(func: torch._ops.OpOverload) -> bool:
    """Whether an operator launches a kernel: neither a view nor an allocation."""
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return not views and not func.name().startswith(("aten::empty", "aten::new_empty", "aten::_local_scalar_dense"))


def _place() -> tuple[str, int, str]:
    """File, line and function of the innermost caller outside torch, the standard library and the redirect."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_machinery(frame.f_code.co_filename):
        frame = frame.f_back
    file = frame.f_code.co_filename
    return file.rpartition("site-packages/")[2], frame.f_lineno, frame.f_code.co_name


@functools.cache
def _is_machinery(file: str) -> bool:
    if file in (__file__, cpu_redirect.__file__) or file.startswith(("<", str(Path(torch.__file__).parent))):
        return True
    if file.endswith("typing_extensions.py"):  # torch's decorator of deprecated functions
        return True
    return file.startswith(sysconfig.get_path("stdlib")) and "site-packages" not in file


def _label_libraries(labels: DeviceLabels) -> None:
    """What libraries decide by backend or accelerator is decided as on GPUs."""
    from lightning.pytorch.accelerators.cpu import CPUAccelerator
    from megatron.core.pipeline_parallel import schedules
    from nemo.lightning.pytorch.strategies import megatron_strategy
    from torch.distributed import distributed_c10d

    from treg_megatron.distributed.micro_batches import watch_micro_batches
    from treg_megatron.kernels import varlen_attention

    torch.Tensor.record_stream = lambda self, stream: None  # there are no streams
    varlen_attention.has_kernel = lambda query: False  # it is compiled for CUDA alone
    torch.cuda.synchronize = lambda device=None: labels.host_sync("torch.cuda.synchronize")
    torch.cuda.Stream.synchronize = lambda self: labels.host_sync("synchronize of a stream or an event")
    CPUAccelerator.get_parallel_devices = staticmethod(lambda devices: [CUDA] * devices)
    CPUAccelerator.setup_device = lambda self, device: None
    megatron_strategy.CPUAccelerator = type("NoCPU", (), {})  # NeMo moves the model to CUDA unless it is on a CPU

    new_group, object_device = dist.new_group, distributed_c10d._get_object_coll_device

    @functools.wraps(new_group)
    def new_group_of(ranks=None, timeout=None, backend=None, *args, **kwargs):
        group = new_group(ranks, timeout, backend, *args, **kwargs)
        if backend == "gloo" and isinstance(group, dist.ProcessGroup):
            labels.gloo_groups.add(group.group_name)  # on GPUs, too
        return group

    def object_device_of(group=None):
        by_gloo = group is not None and group.group_name in labels.gloo_groups
        return object_device(group) if by_gloo else "cuda"

    def without_answers(function):
        def call(*args, **kwargs):
            with labels.set(answers=False):
                return function(*args, **kwargs)

        return call

    init_process_group = dist.init_process_group

    @functools.wraps(init_process_group)
    def init_process_group_by_gloo(backend=None, *args, **kwargs):
        return init_process_group("gloo" if backend == "nccl" else backend, *args, **kwargs)

    dist.init_process_group = init_process_group_by_gloo
    dist.new_group = distributed_c10d.new_group = new_group_of
    distributed_c10d._get_object_coll_device = object_device_of
    dist.batch_isend_irecv = without_answers(dist.batch_isend_irecv)  # it looks up a backend by the tensor's device

    backward_step = schedules.backward_step

    def backward_on_the_device(*args, **kwargs):
        with labels.set(inherits=True):
            return backward_step(*args, **kwargs)

    schedules.backward_step = backward_on_the_device
    watch_micro_batches(lambda in_flight: setattr(labels, "in_flight", in_flight))
