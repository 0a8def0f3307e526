"""Values of Arrow columns as JSON would hold them."""

import datetime
import json
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from treg_megatron.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

Conversion = Callable[[Any], Any]

MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})
_TO_DO = "leave this column out, or store it as text, numbers, lists and structs"
_EXTENSION = b"ARROW:extension:name"  # in a field's metadata where this pyarrow does not know the extension


def conversions(schema: "pa.Schema") -> dict[str, Conversion]:
    """How to convert the values of those columns that pyarrow does not hand out as JSON-like values already.

    Raises:
        UserError: a column's type has no JSON-like values.
    """
    found = {field.name: _conversion(field, field.name) for field in schema}
    return {name: convert for name, convert in found.items() if convert is not None}


def plain(value: Any, column: str) -> Any:
    """A Python value as JSON would hold it: decimals become numbers, dates and bytes become text.

    Raises:
        UserError: bytes that are not text, or a type without a JSON-like value.
    """
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return as_messages({key: plain(inner, f"{column}.{key}") for key, inner in value.items()})
    if isinstance(value, (list, tuple)):
        return [plain(inner, column) for inner in value]
    if isinstance(value, Decimal):
        return int(value) if value.as_tuple().exponent == 0 else float(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise UserError(f"column {column!r} holds bytes that are not text; {_TO_DO}") from None
    raise UserError(f"column {column!r} holds {type(value).__name__} objects; {_TO_DO}")


def as_messages(value: dict) -> Any:
    """A struct of lists, as ``datasets`` stores a sequence of messages, as a list of messages; others unchanged."""
    if any(keys <= value.keys() for keys in MESSAGE_KEYS) and all(isinstance(v, list) for v in value.values()):
        if len({len(items) for items in value.values()}) == 1:
            return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return value


def with_messages(row: Any) -> Any:
    """A row, each column of which went through :func:`as_messages`."""
    if type(row) is dict:
        for name, value in row.items():
            if type(value) is dict:
                row[name] = as_messages(value)
    return row


def _conversion(field: "pa.Field", column: str) -> Conversion | None:
    import pyarrow as pa

    kind, is_a = field.type, pa.types
    extension = getattr(kind, "extension_name", None) or (field.metadata or {}).get(_EXTENSION, b"").decode()
    if extension == "arrow.json":
        return lambda text: _decoded(text, column)
    if extension and extension != "arrow.uuid":
        raise UserError(f"column {column!r} has the extension type {extension}, which is not read; {_TO_DO}")
    if is_a.is_dictionary(kind):
        return _conversion(pa.field(field.name, kind.value_type), column)
    if is_a.is_struct(kind):
        return _struct(kind, column)
    if is_a.is_list(kind) or is_a.is_large_list(kind) or is_a.is_fixed_size_list(kind) or _is_list_view(kind):
        inner = _conversion(kind.value_field, column)
        return inner and (lambda items: None if items is None else [inner(item) for item in items])
    if is_a.is_decimal(kind) or is_a.is_temporal(kind) or is_a.is_float16(kind) or _is_binary(kind) or extension:
        if not is_a.is_interval(kind):
            return lambda value: plain(value, column)
    elif is_a.is_primitive(kind) or is_a.is_null(kind) or _is_text(kind):
        return None
    raise UserError(f"column {column!r} has the type {kind}, which is not read; {_TO_DO}")


def _struct(kind: Any, column: str) -> Conversion | None:
    import pyarrow as pa

    inner = {field.name: _conversion(field, f"{column}.{field.name}") for field in kind}
    changing = {name: convert for name, convert in inner.items() if convert is not None}
    of_lists = any(keys <= inner.keys() for keys in MESSAGE_KEYS) and all(pa.types.is_nested(f.type) for f in kind)
    if not changing and not of_lists:
        return None

    def convert(value: dict | None) -> Any:
        if value is None:
            return None
        for name, change in changing.items():
            value[name] = change(value[name])
        return as_messages(value)

    return convert


def _decoded(text: str | None, column: str) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"column {column!r} is of type arrow.json, but holds what does not parse: {error}") from None


def _is_list_view(kind: Any) -> bool:
    return str(kind).startswith(("list_view<", "large_list_view<"))


def _is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


def _is_binary(kind: Any) -> bool:
    return str(kind).startswith(("binary", "large_binary", "fixed_size_binary"))
