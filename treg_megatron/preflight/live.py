"""Dispatch mode that tracks the bytes of live tensors and the traffic of collectives."""

import weakref
from collections import Counter

import torch
from torch._C._distributed_c10d import FakeWork
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

c10d = torch.ops.c10d


class LiveTensors(TorchDispatchMode):
    """Counts every storage that an operation returns until it is freed.

    Works on real tensors, to measure a running program, and on meta tensors, for which collectives return immediately.

    Args:
        at_rest: tensors whose storages are not counted (weights, gradient buffers, optimizer state).

    Attributes:
        now: bytes alive.
        peaks: peak of the bytes alive in each phase, see :meth:`end_phase`.
        moved: bytes that this rank passes to collectives, by (name of the process group, operation).
    """

    def __init__(self, at_rest: list[torch.Tensor]):
        super().__init__()
        self.now = self._peak = 0
        self.peaks: dict[str, int] = {}
        self.moved: Counter[tuple[str, str]] = Counter()
        self._seen: dict[int, weakref.ref] = {}
        self._at_rest = [tensor.untyped_storage() for tensor in at_rest]  # kept alive, so that their ids stay unique
        self._ignored = {id(storage) for storage in self._at_rest}

    def end_phase(self, name: str) -> None:
        """Attribute what ran since the last call to phase ``name``; phases with the same name are merged."""
        self.peaks[name] = max(self._peak, self.peaks.get(name, 0))
        self._peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in collective_ops:
            self._note_collective(func, args, kwargs)
            if any(tensor.is_meta for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)):
                return _done_at_once(func, args)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        identity = id(storage)
        if identity in self._ignored or identity in self._seen:
            return
        nbytes = storage.nbytes()

        def freed(_):
            self._seen.pop(identity, None)
            self.now -= nbytes

        self._seen[identity] = weakref.ref(storage, freed)
        self.now += nbytes
        self._peak = max(self._peak, self.now)

    def _note_collective(self, func, args, kwargs) -> None:
        if func in sync_ops:
            return
        group = CollectiveOp.get_process_group(func, args)
        operation = func.name().removeprefix("c10d::").strip("_")
        self.moved[group.group_name, operation] += CollectiveOp.get_comm_tensor_size(func, None, args, kwargs)


def _done_at_once(func, args):
    """The result of a collective on meta tensors: its output argument and a completed work handle."""
    work = FakeWork().boxed()
    if func in (c10d.alltoall_base_.default, c10d.send.default, c10d.recv_.default):
        return work
    return args[0], work
