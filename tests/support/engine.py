"""The real Python modules of Transformer Engine on a machine without a GPU, for tests that build its layers.

Its wheel ``transformer_engine`` is pure Python and small; what it calls is compiled, in two others that need CUDA. Here
the first is imported as it is. In place of the compiled extension, of Triton and of onnxscript, which it imports to
compute and to export, stand modules whose names exist and compute nothing. So its layers can be built, described, saved
and loaded with real values, and its checks of arguments run; nothing is computed by them.
"""

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

EXTENSION = "transformer_engine_torch"
#: what is called while modules are imported, as a decorator or to make an argument of one
DECORATORS = (
    *("triton", "triton.language", "triton.language.core", "triton.language.standard"),
    *("onnxscript", "onnxscript.onnx_types"),
)


class NotCompiledError(Exception):
    """Something called the compiled part of Transformer Engine."""


class _Name(type):
    """A name in an absent module, for annotations, comparisons and subclasses."""

    def __getattr__(cls, name: str) -> "_Name":
        return _named(cls, name, cls.__module__, f"{cls.__qualname__}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ not in DECORATORS:
            raise NotCompiledError(f"{cls.__module__}.{cls.__qualname__} is compiled, and not here")
        return args[0] if len(args) == 1 and isinstance(args[0], types.FunctionType) else cls


class _Absent(types.ModuleType):
    def __init__(self, name: str):
        super().__init__(name)
        self.__version__, self.__path__, self.__spec__ = "0", [], ModuleSpec(name, None)

    def __getattr__(self, name: str) -> _Name:
        return _named(self, name, self.__name__, name)


def _named(owner: Any, name: str, module: str, qualified: str) -> _Name:
    if name.startswith("__"):
        raise AttributeError(name)
    value = _Name(name, (), {"__module__": module, "__qualname__": qualified})
    setattr(owner, name, value)
    return value


def use_engine(folder: Path) -> None:
    """Import Transformer Engine from ``folder``, where its wheel is unpacked, and put this process on the CPU.

    For a process of its own: call it first, before anything imports Megatron.
    """
    import torch._dynamo
    import torch._inductor.utils  # noqa: F401  # both before Triton's names exist, which they would try to use

    sys.path.insert(0, str(folder))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own switch: do not look for CUDA's libraries
    for name in (EXTENSION, *DECORATORS):
        sys.modules[name] = _Absent(name)
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine.pytorch")
    for name in DECORATORS:
        del sys.modules[name]

    from treg_megatron.distributed.cpu_redirect import use_cpu

    use_cpu()  # hides what is not imported yet


@contextlib.contextmanager
def on_an_h100() -> Iterator[None]:
    """Inside the block, Transformer Engine finds the GPU and the cuDNN that its layers ask for before they compute."""
    import torch
    import transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention as attention

    from treg_megatron.utils.substitute import substituted

    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="NVIDIA H100", total_memory=80 << 30)
    with (
        substituted(torch.cuda, "is_available", lambda: True),
        substituted(torch.cuda, "current_device", lambda: torch.device("cpu")),
        substituted(torch.cuda, "get_device_properties", lambda *device: properties),
        substituted(torch.cuda, "get_device_capability", lambda *device: (9, 0)),
        substituted(torch.cuda.nvtx, "range", lambda *name: contextlib.nullcontext()),
        substituted(attention, "get_cudnn_version", lambda: (9, 13, 0)),
    ):
        yield
