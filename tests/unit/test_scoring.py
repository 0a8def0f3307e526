"""Log-probs of response tokens: each value belongs to its token, whatever the batching."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from treg_megatron.data.alignment import score_positions
from treg_megatron.errors import UserError
from treg_megatron.kernels import onednn
from treg_megatron.labelling.scoring import ScoredSequence, huggingface, shared_prefixes
from treg_megatron.labelling.scoring.huggingface import HuggingFaceScorer
from treg_megatron.models.huggingface import model_identity

pytestmark = pytest.mark.slow

TINY = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.2,
)


def some_sequences(vocab: int, count: int = 9) -> list[ScoredSequence]:
    random = np.random.default_rng(0)
    return [
        ScoredSequence(
            random.integers(0, vocab, random.integers(1, 30)).tolist(),
            random.integers(0, vocab, random.integers(1, 40)).tolist(),
        )
        for _ in range(count)
    ]


def plain_logps(folder, sequence: ScoredSequence) -> np.ndarray:
    """Baseline: one sequence at a time, all logits, each response token looked up by its index."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = [*sequence.prompt_ids, *sequence.response_ids]
    with torch.no_grad():
        logps = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return np.array([logps[i - 1, tokens[i]] for i in range(len(sequence.prompt_ids), len(tokens))])


@pytest.mark.parametrize("batch_tokens, logits_at_once", [(1, 64), (100, 1000), (100_000, 1 << 25)])
def test_batching_and_chunking_change_nothing(tiny_folder, monkeypatch, batch_tokens, logits_at_once):
    monkeypatch.setattr(huggingface, "_LOGITS_AT_ONCE", logits_at_once)
    sequences, told = some_sequences(384), []
    scorer = HuggingFaceScorer(tiny_folder, "float32", "cpu", batch_tokens)
    for sequence, logps in zip(sequences, scorer.score(sequences, lambda *counts: told.append(counts)), strict=True):
        assert logps.dtype == np.float32 and logps.shape == (len(sequence.response_ids),)
        np.testing.assert_allclose(logps, plain_logps(tiny_folder, sequence), atol=2e-5)
    assert np.sum(told, axis=0).tolist() == [len(sequences), sum(s.length for s in sequences)]


def related_sequences(vocab: int) -> list[ScoredSequence]:
    """Sequences with shared prompts, prompts that are prefixes of others, equal sequences, and an unrelated one."""
    random = np.random.default_rng(1)
    trunk, branch, leaf = (random.integers(1, vocab, length).tolist() for length in (30, 20, 12))
    return [
        ScoredSequence(trunk + branch, leaf),
        ScoredSequence(trunk, leaf),
        ScoredSequence(trunk + branch, leaf[:5] + [3]),
        ScoredSequence(trunk, branch + leaf),
        ScoredSequence([0, *leaf], trunk),
        ScoredSequence(trunk, leaf),
        ScoredSequence(trunk + branch[:3], [7]),
        ScoredSequence(trunk[:2], trunk[2:9]),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("batch_tokens", [1, 70, 100_000])
@pytest.mark.parametrize("window", [None, 11])
def test_sharing_prefixes_changes_nothing(tmp_path, batch_tokens, window):
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**TINY))
        if window is None
        else Gemma2ForCausalLM(Gemma2Config(**TINY, sliding_window=window))
    )
    model.save_pretrained(tmp_path)
    sequences = related_sequences(64)
    for sequence, logps in zip(sequences, HuggingFaceScorer(tmp_path, "float32", "cpu", batch_tokens).score(sequences)):
        np.testing.assert_allclose(logps, plain_logps(tmp_path, sequence), atol=2e-5)


def test_products_of_layers_and_head_go_to_onednn_where_mkl_is_slow(tiny_folder, monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    sequences = some_sequences(384)
    scorer = HuggingFaceScorer(tiny_folder, "float32", "cpu")
    layers = sum(isinstance(module, torch.nn.Linear) for module in scorer._model.modules())
    products, product_of = [], onednn.product_of

    def counted(*call):
        product = product_of(*call)
        products.extend([] if product is None else [product])
        return product

    monkeypatch.setattr(onednn, "product_of", counted)
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(onednn, "SMALLEST", 1)
    found = scorer.score(sequences)
    assert len(products) == layers, "all layers and the head, in one pass"
    for sequence, logps in zip(sequences, found, strict=True):
        np.testing.assert_allclose(logps, plain_logps(tiny_folder, sequence), atol=2e-5)


def test_a_row_holds_shared_prefixes_once():
    trunk = np.arange(40)
    sequences = [trunk, trunk[:25], np.concatenate([trunk[:30], [90, 91]]), np.arange(50, 60)]
    order = shared_prefixes.in_order(sequences)
    row = shared_prefixes.one_row([sequences[i] for i in order], torch.device("cpu"))
    assert len(row.tokens) == 40 + 2 + 10
    for i, rows in zip(order, row.rows, strict=True):
        assert row.tokens[rows].tolist() == sequences[i].tolist()
        assert row.positions[rows].tolist() == list(range(len(sequences[i])))


def test_logit_softcapping_is_honoured(tmp_path):
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(**TINY, final_logit_softcapping=3.0, sliding_window=8)).save_pretrained(tmp_path)
    sequences = some_sequences(64)
    for sequence, logps in zip(sequences, HuggingFaceScorer(tmp_path, "float32", "cpu").score(sequences)):
        np.testing.assert_allclose(logps, plain_logps(tmp_path, sequence), atol=2e-5)


def test_unknown_ways_to_make_logits_are_refused(tmp_path):
    GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=8.0)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="GraniteForCausalLM computes attention or logits in a way"):
        HuggingFaceScorer(tmp_path, "float32", "cpu")


def test_value_t_belongs_to_token_t(tmp_path):
    """A hand-built model that predicts v + 1 after v: attention and MLP are zero, embeddings one-hot."""
    vocab, certainty = 32, 1.0
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "vocab_size": vocab, "tie_word_embeddings": False}))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocab))
        model.lm_head.weight.copy_(certainty * torch.eye(vocab).roll(1, dims=0))
    model.save_pretrained(tmp_path)
    scale = certainty / np.sqrt(1 / vocab + model.config.rms_norm_eps)  # the norm divides by the root mean square
    likely, unlikely = (logit - np.log(np.exp(scale) + vocab - 1) for logit in (scale, 0.0))
    (logps,) = HuggingFaceScorer(tmp_path, "float32", "cpu").score([ScoredSequence([7, 3], [4, 5, 9, 10, 0])])
    np.testing.assert_allclose(logps, [likely, likely, unlikely, likely, unlikely], atol=1e-6)


def test_positions_need_a_prompt():
    assert list(range(9))[score_positions(3, 4)] == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="at least one prompt token"):
        score_positions(0, 4)


def test_bfloat16_is_close(tiny_folder):
    sequences = some_sequences(384)
    exact = HuggingFaceScorer(tiny_folder, "float32", "cpu").score(sequences)
    rounded = HuggingFaceScorer(tiny_folder, "bfloat16", "cpu").score(sequences)
    assert max(np.abs(a - b).max() for a, b in zip(exact, rounded)) < 0.3
    assert rounded[0].dtype == np.float32


def test_identity_depends_on_the_weights_not_the_path(tiny_folder, tmp_path):
    copy = tmp_path / tiny_folder.name
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((tiny_folder / name).read_bytes())
    assert model_identity(copy) == model_identity(tiny_folder)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_identity(copy) != model_identity(tiny_folder)


def test_unusable_models(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="config.json does not exist"):
        HuggingFaceScorer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="does not load"):
        HuggingFaceScorer(tmp_path)
    with pytest.raises(UserError, match="device nonsense cannot be used"):
        HuggingFaceScorer(tiny_folder, device="nonsense")
