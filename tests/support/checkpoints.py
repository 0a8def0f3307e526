"""Model folders of the parallel tests: their configuration, and whether two hold the same tensors."""

import json
from pathlib import Path

from treg_megatron.checkpoint.safetensors_stream import tensors_in_folder


def config_of(hf: Path) -> dict:
    return json.loads((hf / "config.json").read_text())


def assert_same_tensors(actual: Path, expected: Path) -> None:
    actual_tensors, expected_tensors = tensors_in_folder(actual), tensors_in_folder(expected)
    assert actual_tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        other = actual_tensors[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert raw_bytes(other) == raw_bytes(tensor), name


def raw_bytes(tensor) -> bytes:
    with open(tensor.file, "rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.nbytes)
