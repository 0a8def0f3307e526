"""The rotary position embedding of config.json: its base, its scaling, and the channels that it rotates."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.models.families.fields import LAYER_TYPES, architecture, number, refuse, shown, size

UNSCALED = "default"


def rope_settings(hf_config: dict, theta: float = 10000.0, layers: str | None = None) -> dict[str, Any]:
    """The rotary settings: ``rope_type``, ``rope_theta`` and what scaling of that type has.

    Transformers 4 writes ``rope_theta`` and ``rope_scaling``; transformers 5 writes both as ``rope_parameters``, for
    some architectures once for each type of layer. Where a file has several of them, they must agree.

    Args:
        theta: what an absent ``rope_theta`` means to transformers.
        layers: the type of layer whose settings are wanted, of those in :data:`LAYER_TYPES`; None: the one setting that
            all have.

    Raises:
        UserError: they disagree, or one is not a table.
    """
    settings: dict[str, Any] = {}
    tables = [(key, _rope_table(hf_config, key, layers)) for key in ("rope_parameters", "rope_scaling")]
    if "rope_theta" in hf_config:
        tables.append(("rope_theta", {"rope_theta": hf_config["rope_theta"]}))
    for key, table in tables:
        for name, value in table.items():
            if settings.setdefault(name, value) != value:
                raise UserError(
                    f"config.json of a {architecture(hf_config)} gives {name} twice: {shown(settings[name])}, and "
                    f"{shown(value)} in {key}; keep the one that the model was trained with"
                )
    return {"rope_type": UNSCALED, "rope_theta": theta, **settings}


def local_rope_settings(hf_config: dict) -> dict[str, Any]:
    """``rope_local_base_freq``, the base of layers with a sliding window, where they have one of their own.

    Raises:
        UserError: transformers 5's table of these layers contradicts it, or scales their angles.
    """
    tables = hf_config.get("rope_parameters")
    table = tables.get("sliding_attention") if isinstance(tables, dict) else None
    spelled = {**hf_config, "rope_parameters": table, "rope_scaling": None}
    spelled.pop("rope_theta", None)
    if "rope_local_base_freq" in hf_config:
        spelled["rope_theta"] = number(hf_config, "rope_local_base_freq")
    settings = rope_settings(spelled)
    if settings["rope_type"] != UNSCALED:
        refuse(hf_config, "rope_parameters", f"{UNSCALED} in layers with a sliding window")
    return {"architectures": hf_config["architectures"], "rope_local_base_freq": settings["rope_theta"]}


def _rope_table(hf_config: dict, key: str, layers: str | None) -> dict[str, Any]:
    table = hf_config.get(key)
    if table is None:
        return {}
    if not isinstance(table, dict):
        refuse(hf_config, key, "null or a table of rotary settings")
    by_layer_type = {name: value for name, value in table.items() if name in LAYER_TYPES}
    if by_layer_type:
        wanted = by_layer_type.get(layers or min(by_layer_type))
        alike = layers is not None or all(value == wanted for value in by_layer_type.values())
        if len(by_layer_type) < len(table) or not alike:
            refuse(hf_config, key, "the same for all layers")
        return _rope_table({**hf_config, key: wanted}, key, None)
    names = {"type": "rope_type"}  # its name before transformers 4.43
    settings: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            refuse(hf_config, key, f"one table, or one for each of {' and '.join(LAYER_TYPES)}")
        if settings.setdefault(names.get(name, name), value) != value:
            refuse(hf_config, key, "of one type")
    if key == "rope_scaling" and "rope_type" not in settings:
        refuse(hf_config, key, "null or a table with rope_type")
    return settings


def rope_fields(
    hf_config: dict,
    fields: dict[str, Any],
    theta: float = 10000.0,
    known: Sequence[str] = ("default", "linear", "dynamic", "yarn"),
    layers: str | None = None,
    partial: bool = False,
) -> dict[str, Any]:
    """``rotary_base`` and the fields of its scaling, whose type is among ``known``.

    Args:
        fields: those of :func:`treg_megatron.models.families.fields.decoder_fields`.
        theta, layers: see :func:`rope_settings`.
        partial: whether transformers can leave channels of a head of this architecture unrotated.

    Raises:
        UserError: another type of scaling, or settings that disagree.
        KeyError: config.json lacks a setting that this type of scaling needs.
    """
    rope = {"architectures": hf_config["architectures"], **rope_settings(hf_config, theta, layers)}
    for table in () if partial else (rope, hf_config):
        if table.get("partial_rotary_factor") not in (None, 1):
            refuse(hf_config, "partial_rotary_factor", "1", table["partial_rotary_factor"])
    if rope["rope_type"] not in known:
        raise UserError(
            f"rope scaling of type {shown(rope['rope_type'])} is not supported for {architecture(hf_config)}; "
            f"known: {', '.join(known)}"
        )
    return {
        "rotary_base": base(rope),
        **(_partial({**hf_config, **rope}, fields) if partial else {}),
        **SCALINGS[rope["rope_type"]](rope, fields),
    }


def base(rope: dict, key: str = "rope_theta") -> int | float:
    """The base of rotary angles; NeMo types it as an integer, and every published one is one."""
    value = number(rope, key)
    return int(value) if float(value).is_integer() else value


def _partial(settings: dict, fields: dict[str, Any]) -> dict[str, Any]:
    """The first ``partial_rotary_factor`` of a head's channels are rotated."""
    share = number(settings, "partial_rotary_factor", "a number above 0 and up to 1")
    channels = int(fields["kv_channels"] * share)
    if share > 1 or channels == 0 or channels % 2:
        refuse(settings, "partial_rotary_factor", f"up to 1, and an even part of {fields['kv_channels']} channels")
    return {"rotary_percent": share} if share < 1 else {}


def _unscaled(rope: dict, fields: dict[str, Any]) -> dict[str, Any]:
    return {}


def _linear(rope: dict, fields: dict[str, Any]) -> dict[str, Any]:
    """Positions divided by ``factor``."""
    return {"seq_len_interpolation_factor": number(rope, "factor")}


def _dynamic(rope: dict, fields: dict[str, Any]) -> dict[str, Any]:
    """A base that grows with sequences beyond max_position_embeddings, which no sequence here exceeds."""
    number(rope, "factor")
    return {}


def _llama3(rope: dict, fields: dict[str, Any]) -> dict[str, Any]:
    low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    if low >= high:
        refuse(rope, "high_freq_factor", f"above low_freq_factor, {low}")
    return {
        "scale_factor": number(rope, "factor"),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "old_context_len": size(rope, "original_max_position_embeddings"),
    }


def _yarn(rope: dict, fields: dict[str, Any]) -> dict[str, Any]:
    """YaRN (arXiv 2309.00071): slower angles, and scores multiplied by the square of its attention factor, which
    transformers applies to queries and keys."""
    rope = {name: value for name, value in rope.items() if value is not None}  # null is absent here
    factor, truncate = number(rope, "factor"), rope.get("truncate", True)
    if not 1 < number(rope, "rope_theta") < 2**63:
        refuse(rope, "rope_theta", "above 1 and below 2 ** 63, for yarn")
    if not isinstance(truncate, bool):
        refuse(rope, "truncate", "true or false")
    original = {"original_max_position_embeddings": fields["seq_length"], **rope}
    return {
        "yarn": {
            "factor": factor,
            "beta_fast": number({"beta_fast": 32, **rope}, "beta_fast"),
            "beta_slow": number({"beta_slow": 1, **rope}, "beta_slow"),
            "original_max_position_embeddings": size(original, "original_max_position_embeddings"),
            "truncate": truncate,
        },
        "softmax_scale": _attention_factor(rope, factor) ** 2 / math.sqrt(fields["kv_channels"]),
    }


def _attention_factor(rope: dict, factor: float) -> float:
    """0.1 log(factor) + 1 unless config.json says otherwise (arXiv 2309.00071, equation 22)."""

    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    if "attention_factor" in rope:
        return number(rope, "attention_factor")
    ratio = [number(rope, key, zero=True) for key in ("mscale", "mscale_all_dim") if key in rope]
    return grown(ratio[0]) / grown(ratio[1]) if len(ratio) == 2 and all(ratio) else grown(1)


#: fields of each type of scaling
SCALINGS: dict[str, Callable[[dict, dict[str, Any]], dict[str, Any]]] = {
    UNSCALED: _unscaled,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
