"""The head with a split vocabulary against full logits, and the plain PyTorch layers against Megatron's own."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from tests.support.forked import run_ranks
from tests.support.training import RECIPE
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.models import head
from treg_megatron.models.head import response_logps

VOCAB, ROWS, HIDDEN = 30, 11, 8


def megatron_world(tensor: int = 1) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    model_parallel_cuda_manual_seed(1)


def head_on_this_rank(vocabulary: int, chunk_bytes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probs and both gradients: this rank's, and those of full logits in float64."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    megatron_world(tensor=2)
    head.CHUNK_BYTES = chunk_bytes
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    upstream = torch.randn(ROWS, generator=generator)
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    mine = weight.chunk(size)[rank].clone().requires_grad_()
    logps = response_logps(
        copy_to_tensor_model_parallel_region(hidden),
        mine,
        targets,
        VOCAB,
        parallel_state.get_tensor_model_parallel_group(),
        block_vocab=4,
    )
    (logps * upstream).sum().backward()

    full_hidden, full_weight = hidden.detach().double().requires_grad_(), weight.double().requires_grad_()
    expected = (full_hidden @ full_weight[:VOCAB].T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (expected * upstream).sum().backward()
    return [
        (logps.detach(), expected.detach()),
        (hidden.grad, full_hidden.grad),
        (mine.grad, full_weight.grad.chunk(size)[rank]),
    ]


@pytest.mark.parametrize("vocabulary", [30, 32, 60], ids=["exact", "padded", "a rank of padding only"])
@pytest.mark.parametrize("chunk_bytes", [0, head.CHUNK_BYTES], ids=["projected again", "kept"])
def test_split_vocabulary_equals_full_logits(vocabulary, chunk_bytes):
    for results in run_ranks(2, head_on_this_rank, vocabulary, chunk_bytes):
        for ours, theirs in results:
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def rotation_and_megatrons(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Values and gradients of ours and Megatron's rotation: batched, packed, and over half the channels."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from treg_megatron.kernels.rotary import rotated_by

    results = []
    generator = torch.Generator().manual_seed(4)
    for shape, channels in (((7, 2, 3, 8), 8), ((7, 1, 3, 8), 8), ((7, 2, 3, 8), 4)):
        angles = torch.randn(7, 1, 1, channels // 2, generator=generator) * 100
        x = torch.randn(shape, generator=generator).to(dtype)
        upstream = torch.randn(shape, generator=generator).to(dtype)
        for values in zip(
            *(
                _value_and_gradient(f, x, torch.cat((angles, angles), -1), upstream)
                for f in (rotated_by, _apply_rotary_pos_emb_bshd)
            )
        ):
            results.append(values)
    return results


def _value_and_gradient(apply, x, angles, upstream):
    x = x.clone().requires_grad_()
    y = apply(x, angles)
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotation_equals_megatrons(dtype):
    [results] = run_ranks(1, rotation_and_megatrons, dtype)
    for ours, theirs in results:
        rtol = 0.016 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=torch.finfo(dtype).eps)


def block_outputs() -> dict[str, torch.Tensor]:
    """Outputs and gradients of two layers with Megatron's local spec and with ours, for each kernel set and for each
    fast kernel on its own; also the outputs of ours with packing."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from treg_megatron.kernels import onednn
    from treg_megatron.kernels.attention import Span
    from treg_megatron.kernels.core_attention import PackedRow
    from treg_megatron.kernels.kernels import Kernels
    from treg_megatron.kernels.onednn import ProductsByOneDNN
    from treg_megatron.models.layers import torch_block_spec
    from treg_megatron.models.policy import ResponseGPTModel

    megatron_world()
    onednn.mkl_is_slow, onednn.SMALLEST = lambda: True, 1
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )
    lengths = [5, 9]
    tokens = torch.randint(0, 40, (2, max(lengths)), generator=torch.Generator().manual_seed(2))
    everything = dataclasses.replace(Kernels.fast_cpu(), linear=ProductsByOneDNN)
    specs = {
        "local": get_gpt_layer_local_spec(normalization="RMSNorm"),
        "fast": torch_block_spec(config, everything),
        "reference": torch_block_spec(config, Kernels.reference()),
    } | {
        f"only {part.name}": torch_block_spec(
            config, dataclasses.replace(Kernels.reference(), **{part.name: getattr(everything, part.name)})
        )
        for part in dataclasses.fields(Kernels)
    }
    outputs, weights = {}, None
    for name, spec in specs.items():
        model = ResponseGPTModel(config, spec, vocab_size=40, max_sequence_length=16, position_embedding_type="rope")
        weights = weights or model.state_dict()
        model.load_state_dict(weights, strict=False)
        logits = model(tokens, torch.arange(9).expand(2, 9), None)
        logits[0, : lengths[0]].square().sum().backward()
        outputs[name] = logits.detach()
        outputs[name + " gradient"] = model.embedding.word_embeddings.weight.grad
        outputs[name + " layers' gradients"] = torch.cat(
            [p.grad.flatten() for n, p in sorted(model.named_parameters()) if n.startswith("decoder.layers")]
        )
        if name != "local":
            packed = PackedRow("thd", max_seqlen_q=9, max_seqlen_kv=9, spans=[Span(n) for n in lengths])
            row = torch.cat([tokens[0, :5], tokens[1]])[None]
            outputs[name + " packed"] = model(
                row, torch.cat([torch.arange(5), torch.arange(9)])[None], None, packed_seq_params=packed
            ).detach()[0]
    return outputs


def test_layers_with_any_kernels_equal_megatrons_and_packed_equals_padded():
    (outputs,) = run_ranks(1, block_outputs)
    sets = [name.removesuffix(" packed") for name in outputs if name.endswith(" packed")]
    assert len(sets) == 7
    for name in sets:
        for what in ("", " gradient", " layers' gradients"):
            torch.testing.assert_close(outputs[name + what], outputs["local" + what], rtol=1e-5, atol=1e-5)
        packed = outputs[f"{name} packed"]
        torch.testing.assert_close(packed[:5], outputs[name][0, :5], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed[5:], outputs[name][1], rtol=1e-5, atol=1e-5)


def attention_of_a_shared_row() -> list[list[torch.Tensor]]:
    """Output and gradients of a row of pairs, computed in one call and span by span."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from treg_megatron.kernels.attention import Span
    from treg_megatron.kernels.core_attention import PackedRow, SdpaAttention
    from treg_megatron.kernels.packed_attention import PackedSdpaAttention

    megatron_world()
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0
    )
    # a pair that shares a prompt of 2 tokens; three sequences that share prefixes which begin in one and end in another
    spans = [Span(5), Span(7, [(0, 2)]), Span(4), Span(3, [(2, 3)]), Span(2, [(2, 3), (3, 2)]), Span(3, [(2, 1)])]
    row = PackedRow("thd", max_seqlen_q=9, max_seqlen_kv=9, spans=[*spans, Span(6)])
    generator = torch.Generator().manual_seed(6)
    tensors = [torch.randn(30, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)]  # 24 and padding
    upstream = torch.randn(30, 32, generator=generator)
    results = []
    for core_attention in (PackedSdpaAttention, SdpaAttention):
        attention = core_attention(config, 1, AttnMaskType.causal, "self")
        out = attention(*tensors, packed_seq_params=row)
        results.append([out.detach(), *torch.autograd.grad((out * upstream).sum(), tensors)])
    return results


def test_a_shared_row_in_one_call_equals_span_by_span():
    [(in_one_call, span_by_span)] = run_ranks(1, attention_of_a_shared_row)
    torch.testing.assert_close(in_one_call, span_by_span, rtol=1e-5, atol=1e-6)


def attention_in_one_call(window: int | None) -> list[list[torch.Tensor]]:
    """Output and gradients of a packed row by the kernel for GPUs, with a stand-in for it, and sequence by sequence."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from treg_megatron.kernels import varlen_attention
    from treg_megatron.kernels.attention import Span, causal_attention
    from treg_megatron.kernels.core_attention import PackedRow, SdpaAttention

    def stand_in(query, key, value, ends, ends_k, longest, longest_k, *, scale, window_size, enable_gqa):
        """torch's kernel as its documentation describes it: (w, 0) is causal with w tokens before the query's own."""
        assert enable_gqa and torch.equal(ends, ends_k) and longest == longest_k == ends.diff().max()
        before, after = window_size
        assert after == 0
        sequences = [x.split(ends.diff().tolist()) for x in (query, key, value)]
        parts = [
            causal_attention(*(x.transpose(0, 1)[None] for x in part), scale, None if before == -1 else before)
            for part in zip(*sequences, strict=True)
        ]
        return torch.cat([part[0].transpose(0, 1) for part in parts])

    megatron_world()
    varlen_attention.varlen_attn, varlen_attention.has_kernel = stand_in, lambda query: True
    options = {} if window is None else {"window_size": (window, 0)}
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0, **options
    )
    ends = torch.tensor([0, 5, 14, 17], dtype=torch.int32)
    row = PackedRow("thd", max_seqlen_q=9, max_seqlen_kv=9, spans=[Span(5), Span(9), Span(3)], ends=ends)
    generator = torch.Generator().manual_seed(6)
    tensors = [torch.randn(17, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    upstream = torch.randn(17, 32, generator=generator)
    results = []
    for core_attention in (varlen_attention.VarlenAttention, SdpaAttention):
        attention = core_attention(config, 1, AttnMaskType.causal, "self")
        out = attention(*tensors, packed_seq_params=row)
        results.append([out.detach(), *torch.autograd.grad((out * upstream).sum(), tensors)])
    return results


@pytest.mark.parametrize("window", [None, 3])
def test_a_packed_row_in_one_call_on_a_gpu_equals_sequence_by_sequence(window):
    [(in_one_call, one_by_one)] = run_ranks(1, attention_in_one_call, window)
    torch.testing.assert_close(in_one_call, one_by_one, rtol=1e-5, atol=1e-6)


def test_the_installed_kernel_takes_the_arguments_and_no_other_tensors():
    from treg_megatron.kernels import varlen_attention

    assert varlen_attention._arguments_are_known()
    on_cpu = torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    assert not varlen_attention.has_kernel(on_cpu)


def test_when_prompts_are_shared(monkeypatch):
    from treg_megatron.errors import UserError
    from treg_megatron.models import build
    from treg_megatron.models import policy as model

    def shares(setting: bool | None, *overrides: str, experts: int | None = None) -> bool:
        recipe = load_recipe(RECIPE, [f"data.share_prompts={'null' if setting is None else setting}", *overrides])
        return build.shares_prompts({"num_moe_experts": experts}, section(recipe, "parallel"), section(recipe, "data"))

    assert shares(True) and shares(None) and not shares(False)
    assert (
        not shares(None, "data.layout=padded")
        and not shares(None, "parallel.context=2")
        and not shares(None, experts=8)
    )
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(build, "uses_cpu_kernels", lambda: False)
        assert shares(True) and not shares(None)
    monkeypatch.setattr(model, "HAVE_TE", True)
    assert not shares(None) and not shares(False)
    with pytest.raises(UserError, match="data.share_prompts: Transformer Engine's attention"):
        shares(True)


def test_transformer_engines_cross_entropy_is_refused():
    from nemo.collections import llm

    from treg_megatron.errors import UserError
    from treg_megatron.models.policy import policy_config_class

    config = policy_config_class(llm.LlamaConfig, llm.LlamaModel)(
        num_layers=1, hidden_size=8, num_attention_heads=1, apply_rope_fusion=False, cross_entropy_fusion_impl="te"
    )
    with pytest.raises(UserError, match="cross_entropy_fusion_impl=te: .* leave it at native"):
        config.configure_model(None)
