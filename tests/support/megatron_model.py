"""A plain Megatron-core GPTModel on forked CPU ranks with any TP x PP, loaded from and saved to a checkpoint."""

import multiprocessing.util

import torch
import torch.distributed as dist
import torch.nn.functional as F


def build(fields: dict, tensor: int, pipeline: int, vocab_multiple: int):
    """This rank's Megatron-core GPTModel with the torch-native layer spec and padded vocabulary."""
    from treg_megatron.distributed.cpu_redirect import use_cpu

    use_cpu()
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor, pipeline)
    model_parallel_cuda_manual_seed(1)
    taken = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "normalization",
        "layernorm_epsilon",
        "init_method_std",
        "gated_linear_unit",
        "add_bias_linear",
        "attention_dropout",
        "hidden_dropout",
    )
    config = TransformerConfig(
        **{name: fields[name] for name in taken},
        activation_func=getattr(F, fields["activation"]),
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=-(-fields["vocab_size"] // vocab_multiple) * vocab_multiple,
        max_sequence_length=fields["seq_length"],
        position_embedding_type="rope",
        rotary_base=fields["rotary_base"],
        rope_scaling="scale_factor" in fields,
        rope_scaling_factor=fields.get("scale_factor", 1.0),
        share_embeddings_and_output_weights=fields["share_embeddings_and_output_weights"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def sharded_state_dict(model) -> dict:
    """The sharded state dict that NeMo uses: keys prefixed with ``module.``, layers stacked."""
    return model.sharded_state_dict(prefix="module.", metadata={"singleton_local_shards": False})


def load(model, weights: str) -> None:
    """Load a checkpoint with Megatron-core's loader; every tensor of the model is required."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(sharded_state_dict(model), weights, strict="raise_unexpected")
    model.load_state_dict({k.removeprefix("module."): v for k, v in loaded.items() if k.startswith("module.")})


def save(model, weights: str) -> None:
    """Save with Megatron-core's writer, as training does; must be the last thing that a rank does."""
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(sharded_state_dict(model), weights)
    # run the exit handlers of multiprocessing: otherwise the writer's manager process outlives a forked rank
    multiprocessing.util._exit_function()


def token_logprobs(model, tokens: torch.Tensor, vocab: int) -> torch.Tensor | None:
    """log p(token t+1 | tokens up to t), [batch, length - 1], on the ranks of the last pipeline stage, else None."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    model.eval()
    batch, length = tokens.shape
    with torch.no_grad():
        if not parallel_state.is_pipeline_first_stage():
            hidden = torch.empty(length, batch, model.config.hidden_size)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        output = model(tokens, torch.arange(length).expand(batch, -1), attention_mask=None)
        if not parallel_state.is_pipeline_last_stage():
            dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        logits = gather_from_tensor_model_parallel_region(output)[..., :vocab]
        return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
