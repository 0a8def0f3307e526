"""Conversion checked against Megatron-core's own model, loader and writer, on forked CPU ranks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import megatron_model
from tests.support.checkpoints import assert_same_tensors, certify, config_of
from tests.support.forked import run_ranks
from tests.support.tiny import tiny_llama
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.checkpoint.layout import read_metadata
from treg_megatron.checkpoint.to_hf import export_checkpoint
from treg_megatron.models.families import family_of, model_fields

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
VOCAB = 389  # prime: padded at every tensor-parallel size
PADDED_TO = 16


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def imported(request, tmp_path_factory) -> tuple[Path, Path]:
    """A tiny Hugging Face folder and the checkpoint imported from it."""
    folder = tmp_path_factory.mktemp("imported")
    tiny_llama(folder / "hf", layers=2, vocab=VOCAB, tied=request.param)
    import_checkpoint(folder / "hf", folder / "checkpoint")
    return folder / "hf", folder / "checkpoint"


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tensor, pipeline", LAYOUTS)
def test_imported_model_gives_the_logprobs_of_transformers(imported, tokens, tensor, pipeline):
    hf, checkpoint = imported
    expected = transformers_logprobs(hf, tokens)
    for actual in run_ranks(tensor * pipeline, load_and_score, config_of(hf), checkpoint, tokens, tensor, pipeline):
        if actual is not None:
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tensor, pipeline", LAYOUTS)
def test_export_of_what_megatron_saved_is_the_original_bit_for_bit(imported, tmp_path, tensor, pipeline):
    hf, checkpoint = imported
    (tmp_path / "trained" / "weights").mkdir(parents=True)
    run_ranks(tensor * pipeline, load_and_save, config_of(hf), checkpoint, tmp_path / "trained", tensor, pipeline)
    certify(tmp_path / "trained", read_metadata(checkpoint))
    export_checkpoint(tmp_path / "trained", hf, tmp_path / "exported")
    assert_same_tensors(tmp_path / "exported", hf)


def test_real_model_gives_the_logprobs_of_transformers_and_returns_bit_for_bit(smollm2, tmp_path):
    import_checkpoint(smollm2, tmp_path / "checkpoint")
    config = config_of(smollm2)
    tokens = torch.randint(0, config["vocab_size"], (1, 64), generator=torch.Generator().manual_seed(1))
    actual = run_ranks(2, load_and_score, config, tmp_path / "checkpoint", tokens, 1, 2)[-1]
    torch.testing.assert_close(actual, transformers_logprobs(smollm2, tokens), atol=1e-4, rtol=0)
    export_checkpoint(tmp_path / "checkpoint", smollm2, tmp_path / "back")
    assert_same_tensors(tmp_path / "back", smollm2)


def test_padded_vocabulary_rows_are_zero(imported):
    hf, checkpoint = imported
    for rows in run_ranks(2, load_and_read_padding, config_of(hf), checkpoint, 2, 1):
        assert all(not any(row) for row in rows)


def test_llama3_rope_scaling_gives_the_logprobs_of_transformers(tmp_path):
    tiny_llama(tmp_path / "hf", vocab=VOCAB)
    # long enough that the scaled low frequencies rotate noticeably
    tokens = torch.randint(0, VOCAB, (1, 1500), generator=torch.Generator().manual_seed(1))
    unscaled = transformers_logprobs(tmp_path / "hf", tokens)
    config = config_of(tmp_path / "hf")
    config["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    import_checkpoint(tmp_path / "hf", tmp_path / "checkpoint")
    [actual] = run_ranks(1, load_and_score, config, tmp_path / "checkpoint", tokens, 1, 1)
    expected = transformers_logprobs(tmp_path / "hf", tokens)
    assert (expected - unscaled).abs().max() > 0.01
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_megatron_loads_fp32_norms_among_bf16_weights(tmp_path, tokens):
    tiny_llama(tmp_path / "hf", vocab=VOCAB)
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        tensors[name] = torch.rand_like(tensor) + 0.5 if "norm" in name else tensor.bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    import_checkpoint(tmp_path / "hf", tmp_path / "checkpoint")
    expected = transformers_logprobs(tmp_path / "hf", tokens)
    for actual in run_ranks(2, load_and_score, config_of(tmp_path / "hf"), tmp_path / "checkpoint", tokens, 2, 1):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_map_names_every_parameter_of_the_megatron_model(tmp_path, tied):
    tiny_llama(tmp_path, tied=tied)
    config = config_of(tmp_path)
    [(names, keys)] = run_ranks(1, parameter_names, config)
    parameters = family_of(config).parameters(model_fields(config))
    assert names == {
        (p.local_name or p.name).format(layer=layer) for p in parameters for layer in range(2 if p.stacking else 1)
    }
    assert keys == {"module." + p.key for p in parameters}


def load_and_score(config: dict, checkpoint: Path, tokens: torch.Tensor, tensor: int, pipeline: int):
    fields = model_fields(config)
    model = megatron_model.build(fields, tensor, pipeline, PADDED_TO)
    megatron_model.load(model, str(checkpoint / "weights"))
    return megatron_model.token_logprobs(model, tokens, fields["vocab_size"])


def load_and_save(config: dict, checkpoint: Path, output: Path, tensor: int, pipeline: int) -> None:
    model = megatron_model.build(model_fields(config), tensor, pipeline, PADDED_TO)
    megatron_model.load(model, str(checkpoint / "weights"))
    megatron_model.save(model, str(output / "weights"))


def load_and_read_padding(config: dict, checkpoint: Path, tensor: int, pipeline: int) -> list[list[float]]:
    from megatron.core import parallel_state

    model = megatron_model.build(model_fields(config), tensor, pipeline, PADDED_TO)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    megatron_model.load(model, str(checkpoint / "weights"))
    weight = (
        model.shared_embedding_or_output_weight()
        if model.share_embeddings_and_output_weights
        else model.output_layer.weight
    )
    first_row = parallel_state.get_tensor_model_parallel_rank() * len(weight)
    return weight[max(0, VOCAB - first_row) :].tolist()


def parameter_names(config: dict) -> tuple[set[str], set[str]]:
    model = megatron_model.build(model_fields(config), 1, 1, PADDED_TO)
    keys = {
        entry.key
        for name, entry in megatron_model.sharded_state_dict(model).items()
        if not name.endswith("_extra_state")
    }
    return {name for name, _ in model.named_parameters()}, keys


def transformers_logprobs(hf: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(hf)(tokens).logits
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
