"""config.json of 59 published models and thousands of broken copies: read as transformers reads them, or refused."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from treg_megatron.errors import UserError
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
REQUIRED = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_local_experts", "num_key_value_heads"),  # transformers' default need not divide the number of heads
}
# no field is made of these
UNREAD = {"cache_implementation", "model_type", "use_cache", "output_router_logits", "router_aux_loss_coef"}


def mutations(config: dict) -> Iterator[tuple[str, Any, dict]]:
    """Every key with every value of the wrong kind, and with some of the right one."""
    layers = config["num_hidden_layers"]
    optional = {"head_dim", "layer_types", "rope_scaling", "sliding_window", "use_sliding_window", "attention_bias"}
    for key in sorted({*config, *optional} - {"architectures", *UNREAD}):
        own = config.get(key)
        values = [*VALUES, str(own), [own]]
        if isinstance(own, int):
            values += [float(own), own * 2, own + 1, -own]
        if key == "rope_scaling":
            values += [{"type": t, "factor": 2.0} for t in ("default", "linear", "dynamic", "llama3", "mrope", None, 7)]
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

    read = AutoConfig.for_model(**{k: json.loads(json.dumps(v)) for k, v in config.items()})
    heads, layers = read.num_attention_heads, read.num_hidden_layers
    window = getattr(read, "sliding_window", None) if read.model_type != "llama" else None
    sliding = [window is not None] * layers
    if read.model_type in ("qwen2", "qwen3", "gemma2"):
        sliding = [t == "sliding_attention" for t in read.layer_types]
        assert window is not None or not any(sliding)
    fields = {
        "num_layers": layers,
        "hidden_size": read.hidden_size,
        "ffn_hidden_size": read.intermediate_size,
        "num_attention_heads": heads,
        "num_query_groups": heads if read.num_key_value_heads is None else read.num_key_value_heads,
        "kv_channels": getattr(read, "head_dim", None) or read.hidden_size // heads,
        "vocab_size": read.vocab_size,
        "seq_length": read.max_position_embeddings,
        "share_embeddings_and_output_weights": bool(read.tie_word_embeddings),
        "layernorm_epsilon": read.rms_norm_eps,
        "init_method_std": read.initializer_range,
        "activation": read.hidden_activation if read.model_type == "gemma2" else read.hidden_act,
        "attention_dropout": read.attention_dropout,
        "rotary_base": read.rope_theta,
        "window_size": (window - 1, 0) if any(sliding) else None,
    }
    if any(sliding) and not all(sliding):
        fields["window_attn_skip_freq"] = [int(s) for s in sliding]
    rope = getattr(read, "rope_scaling", None) or {}
    if rope.get("rope_type", "default") != "default":
        assert rope["rope_type"] == "llama3"
        fields["scale_factor"], fields["old_context_len"] = rope["factor"], rope["original_max_position_embeddings"]
        fields |= {k: rope[k] for k in ("low_freq_factor", "high_freq_factor")}
    if read.model_type == "gemma2":
        for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
            fields[key] = getattr(read, key)
    if read.model_type == "mixtral":
        fields |= {"num_moe_experts": read.num_local_experts, "moe_router_topk": read.num_experts_per_tok}
    return fields


OURS = {
    *("normalization", "gated_linear_unit", "add_bias_linear", "position_embedding_type", "hidden_dropout"),
    *("add_qkv_bias", "qk_layernorm", "layernorm_zero_centered_gamma"),
    *("moe_router_load_balancing_type", "moe_aux_loss_coeff"),
}


def assert_as_transformers(config: dict, fields: dict[str, Any]) -> None:
    expected = by_transformers(config)
    found = {"window_size": None, **{k: v for k, v in fields.items() if k not in OURS}}
    assert found == expected
    for name in ("num_layers", "hidden_size", "kv_channels", "vocab_size", "seq_length"):
        assert type(found[name]) is int, name


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
                names = [key, "rope scaling", *LLAMA3_SCALING] if key == "rope_scaling" else [key]
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
    assert seen["read"] > 8_000 and seen.total() > 30_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_rotary_settings_as_transformers_5_writes_them(name):
    config = PUBLISHED[name]
    theta = config.get("rope_theta", 10000.0)
    older = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    rope = {"rope_type": "default", "rope_theta": theta, **(config.get("rope_scaling") or {})}
    for newer in (rope, {"full_attention": rope, "sliding_attention": rope}):
        assert model_fields(older | {"rope_parameters": newer}) == model_fields(config)
    for newer in (
        rope | {"rope_theta": 7.0},
        {"full_attention": rope, "sliding_attention": rope | {"rope_theta": 7.0}},
    ):
        with pytest.raises(UserError, match="rope_theta twice|rope_parameters is .* the same for all layers"):
            model_fields(config | {"rope_theta": theta, "rope_parameters": newer})
