"""Model folders and checkpoints of the tests: reading, comparing and certifying them."""

import dataclasses
import json
from pathlib import Path

from treg_megatron.checkpoint.layout import CheckpointMetadata, fingerprints, read_metadata, write_metadata
from treg_megatron.checkpoint.safetensors_stream import tensors_in_folder


def certify(checkpoint: Path, metadata: CheckpointMetadata | None = None) -> Path:
    """Write treg.json for the files that are there, with ``metadata`` or that of the checkpoint."""
    metadata = metadata or read_metadata(checkpoint)
    write_metadata(checkpoint, dataclasses.replace(metadata, files=fingerprints(checkpoint)))
    return checkpoint


def small_checkpoint(checkpoint: Path, metadata: CheckpointMetadata | None = None) -> Path:
    """A complete checkpoint whose weights are a few bytes that nothing reads."""
    (checkpoint / "weights").mkdir(parents=True, exist_ok=True)
    (checkpoint / "weights" / "__0_0.distcp").write_bytes(b"weights")
    return certify(checkpoint, metadata or CheckpointMetadata("LlamaForCausalLM", {}, "float32", "source", "test"))


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
