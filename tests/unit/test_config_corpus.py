"""config.json of 75 published models and thousands of broken copies: read as transformers reads them, or refused."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from treg_megatron.errors import UserError
from treg_megatron.kernels.rotary import yarn_frequencies
from treg_megatron.models.families import model_fields

CORPUS = json.loads((Path(__file__).parents[1] / "data" / "published_configs.json").read_text())
PUBLISHED = {
    name: {"architectures": [architecture], **family["common"], **own}
    for architecture, family in CORPUS.items()
    for name, own in family["models"].items()
}

DROPPED = object()
VALUES = (
    *(DROPPED, None, True, False, 0, -1, 1, 1.5, 10**30, -(10**400), 10**400, math.inf, math.nan),
    *("", "text", "null", [], [1], {}, {"full_attention": {"rope_theta": 5}}, {"type": "yarn", "factor": 4.0}),
)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_OPTIONS = (
    *({}, {"truncate": False}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"attention_factor": 1.5}),
    *({"mscale": 0.7, "mscale_all_dim": 1.2}, {"mscale": 0.7}, {"attention_factor": None}, {"beta_fast": None}),
    *(
        {"factor": 0.5},
        {"factor": "4"},
        {"truncate": "no"},
        {"mscale": -1.0},
        {"original_max_position_embeddings": None},
    ),
)
REQUIRED = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_local_experts", "num_key_value_heads"),  # transformers' default need not divide the number of heads
    *("attention_bias", "mlp_bias"),  # Megatron has both or neither
}
# no field is made of these
UNREAD = {
    *("cache_implementation", "model_type", "use_cache", "output_router_logits", "router_aux_loss_coef"),
    *("embd_pdrop", "original_max_position_embeddings", "use_bidirectional_attention"),
}


def mutations(config: dict) -> Iterator[tuple[str, Any, dict]]:
    """Every key with every value of the wrong kind, and with some of the right one."""
    layers = config["num_hidden_layers"]
    optional = {"head_dim", "layer_types", "rope_scaling", "sliding_window", "use_sliding_window", "attention_bias"}
    optional |= {"mlp_bias"} if config["model_type"] == "llama" else set()
    for key in sorted({*config, *optional} - {"architectures", *UNREAD}):
        own = config.get(key)
        values = [*VALUES, str(own), [own]]
        if isinstance(own, int):
            values += [float(own), own * 2, own + 1, -own]
        if key == "rope_scaling":
            values += [{"type": t, "factor": 2.0} for t in ("default", "linear", "dynamic", "llama3", "mrope", None, 7)]
            yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
            values += [yarn | more for more in YARN_OPTIONS]
            scaled = LLAMA3_SCALING
            values += [{k: v for k, v in scaled.items() if k != gone} for gone in (None, *scaled)]
            values += [scaled | {k: v} for k in scaled for v in (None, "8", True, -1, 0, [2], 10**400)]
        if key == "layer_types":
            slid, full = "sliding_attention", "full_attention"
            values += [[full] * layers, [slid, *[full] * (layers - 1)], [full] * (layers + 1), ["chunked"] * layers]
        for value in values:
            changed = {k: v for k, v in config.items() if k != key}
            yield key, value, changed if value is DROPPED else changed | {key: value}


def by_transformers(config: dict) -> dict[str, Any]:
    """The fields that follow from transformers' own reading of a config.json."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    read = AutoConfig.for_model(**{k: json.loads(json.dumps(v)) for k, v in config.items()})
    heads, layers = read.num_attention_heads, read.num_hidden_layers
    window = getattr(read, "sliding_window", None) if read.model_type != "llama" else None
    sliding = [window is not None] * layers
    if read.model_type in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
        sliding = [t == "sliding_attention" for t in read.layer_types]
        assert window is not None or not any(sliding)
    fields = {
        "num_layers": layers,
        "hidden_size": read.hidden_size,
        "ffn_hidden_size": read.moe_intermediate_size if read.model_type == "qwen3_moe" else read.intermediate_size,
        "num_attention_heads": heads,
        "num_query_groups": heads if read.num_key_value_heads is None else read.num_key_value_heads,
        "kv_channels": getattr(read, "head_dim", None) or read.hidden_size // heads,
        "vocab_size": read.vocab_size,
        "seq_length": read.max_position_embeddings,
        "share_embeddings_and_output_weights": bool(read.tie_word_embeddings),
        "layernorm_epsilon": read.rms_norm_eps,
        "init_method_std": read.initializer_range,
        "activation": read.hidden_activation if read.model_type.startswith("gemma") else read.hidden_act,
        "attention_dropout": read.attention_dropout,
        "rotary_base": read.rope_theta,
        "window_size": (window - 1, 0) if any(sliding) else None,
    }
    if any(sliding) and not all(sliding):
        fields["window_attn_skip_freq"] = [int(s) for s in sliding]
    rope = getattr(read, "rope_scaling", None) or {}
    match rope.get("rope_type", rope.get("type", "default")):
        case "llama3":
            fields["scale_factor"], fields["old_context_len"] = rope["factor"], rope["original_max_position_embeddings"]
            fields |= {k: rope[k] for k in ("low_freq_factor", "high_freq_factor")}
        case "linear":
            fields["seq_len_interpolation_factor"] = rope["factor"]
        case "yarn":
            read.head_dim = fields["kv_channels"]  # it stops at null, although it gives the key no other meaning
            fields["yarn"] = ROPE_INIT_FUNCTIONS["yarn"](read, "cpu")
        case scaling:
            assert scaling in ("default", "dynamic")
    if read.model_type.startswith("gemma"):
        for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
            fields[key] = getattr(read, key)
    match read.model_type:
        case "gemma3_text":
            fields["local_rotary_base"] = read.rope_local_base_freq
        case "llama":
            assert bool(read.attention_bias) == bool(read.mlp_bias)
            fields["add_bias_linear"] = bool(read.mlp_bias)
        case "phi3" if read.partial_rotary_factor != 1:
            fields["rotary_percent"] = read.partial_rotary_factor
        case "mixtral" | "qwen3_moe":
            experts = read.num_local_experts if read.model_type == "mixtral" else read.num_experts
            fields |= {"num_moe_experts": experts, "moe_router_topk": read.num_experts_per_tok}
            fields["moe_router_pre_softmax"] = not getattr(read, "norm_topk_prob", True)
    return fields


OURS = {
    *("normalization", "gated_linear_unit", "position_embedding_type", "hidden_dropout"),
    *("add_qkv_bias", "qk_layernorm", "layernorm_zero_centered_gamma"),
    *("moe_router_load_balancing_type", "moe_aux_loss_coeff"),
}


def assert_as_transformers(config: dict, fields: dict[str, Any]) -> None:
    expected = by_transformers(config)
    found = {"window_size": None, **{k: v for k, v in fields.items() if k not in OURS}}
    expected.setdefault("add_bias_linear", False)
    if "yarn" in expected:
        assert_yarn(found, *expected.pop("yarn"))
    assert found == expected
    for name in ("num_layers", "hidden_size", "kv_channels", "vocab_size", "seq_length"):
        assert type(found[name]) is int, name


def assert_yarn(found: dict[str, Any], frequencies: torch.Tensor, attention_factor: float) -> None:
    """The same angles as transformers' and, as it scales queries and keys, the square of its factor on the scores."""
    width = found["kv_channels"]
    unscaled = found["rotary_base"] ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    ours = yarn_frequencies(unscaled, found["rotary_base"], **found.pop("yarn"))
    torch.testing.assert_close(ours, frequencies, rtol=1e-5, atol=0)
    assert found.pop("softmax_scale") == pytest.approx(attention_factor**2 / math.sqrt(width))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_as_transformers_reads_them(name):
    assert_as_transformers(PUBLISHED[name], model_fields(PUBLISHED[name]))


@pytest.mark.slow
def test_a_broken_config_is_read_as_transformers_reads_it_or_refused_by_the_name_of_its_field():
    seen = Counter()
    for name, config in PUBLISHED.items():
        for key, value, changed in mutations(config):
            case = f"{name}: {key}={'(dropped)' if value is DROPPED else repr(value)[:60]}"
            try:
                fields = model_fields(changed)
            except UserError as error:
                names = [key]
                if key == "rope_scaling":
                    names += ["rope scaling", *LLAMA3_SCALING, *(name for option in YARN_OPTIONS for name in option)]
                assert any(name in str(error) for name in names), f"{case}: {error}"
                assert "\n" not in str(error) and len(str(error)) < 300, f"{case}: {error}"
                assert value is not DROPPED or key in REQUIRED, f"{case}: {error}"
                seen["refused"] += 1
            else:
                try:
                    assert_as_transformers(changed, fields)
                except AssertionError as error:
                    raise AssertionError(f"{case}: {error}") from None
                seen["read"] += 1
    assert seen["read"] > 8_000 and seen.total() > 40_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_rotary_settings_as_transformers_5_writes_them(name):
    config = PUBLISHED[name]
    theta = config.get("rope_theta", 10000.0)
    older = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    scaling = {"rope_type" if k == "type" else k: v for k, v in (config.get("rope_scaling") or {}).items()}
    rope = {"rope_type": "default", "rope_theta": theta, **scaling}
    local = {"rope_type": "default", "rope_theta": older["rope_local_base_freq"]} if "gemma3" in str(config) else rope
    for newer in (rope, {"full_attention": rope, "sliding_attention": local}):
        assert model_fields(older | {"rope_parameters": newer}) == model_fields(config)
    for newer in (
        rope | {"rope_theta": 7.0},
        {"full_attention": rope, "sliding_attention": local | {"rope_theta": 7.0}},
    ):
        with pytest.raises(UserError, match="rope_theta twice|rope_parameters is .* the same for all layers"):
            model_fields(config | {"rope_theta": theta, "rope_parameters": newer})


def test_only_layers_with_a_window_have_a_rotary_base_of_their_own():
    config = {k: v for k, v in PUBLISHED["gemma-3-4b, text"].items() if not k.startswith("rope_")}
    tables = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert model_fields(config | {"rope_parameters": tables}) == model_fields(PUBLISHED["gemma-3-4b, text"])
    tables["sliding_attention"]["rope_type"] = "linear"
    with pytest.raises(UserError, match="rope_parameters is .*, which should be default in layers with a sliding win"):
        model_fields(config | {"rope_parameters": tables})
