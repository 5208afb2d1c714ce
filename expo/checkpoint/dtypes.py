"""The one table of safetensors dtypes. Nothing here needs torch."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Dtype(NamedTuple):
    """A safetensors dtype."""

    bits: int
    """Of one element."""
    torch: str | None
    """torch's name for it, also used in settings and config.json; None if torch has no such type."""
    kind: Literal["float", "exact", "other"] = "other"
    """float can be extrapolated; exact (buffers and the like) must be equal on both sides; other can only be copied."""


DTYPES = {
    "F64": Dtype(64, "float64", "float"),
    "F32": Dtype(32, "float32", "float"),
    "F16": Dtype(16, "float16", "float"),
    "BF16": Dtype(16, "bfloat16", "float"),
    "BOOL": Dtype(8, "bool", "exact"),
    "I64": Dtype(64, "int64", "exact"),
    "I32": Dtype(32, "int32", "exact"),
    "I16": Dtype(16, "int16", "exact"),
    "I8": Dtype(8, "int8", "exact"),
    "U64": Dtype(64, "uint64", "exact"),
    "U32": Dtype(32, "uint32", "exact"),
    "U16": Dtype(16, "uint16", "exact"),
    "U8": Dtype(8, "uint8", "exact"),
    "C64": Dtype(64, "complex64"),
    "F8_E4M3": Dtype(8, "float8_e4m3fn"),
    "F8_E5M2": Dtype(8, "float8_e5m2"),
    "F8_E8M0": Dtype(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": Dtype(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": Dtype(8, "float8_e5m2fnuz"),
    "F6_E2M3": Dtype(6, None),
    "F6_E3M2": Dtype(6, None),
    "F4": Dtype(4, None),
}
"""By the name in safetensors headers."""

FLOAT_DTYPES = frozenset(name for name, dtype in DTYPES.items() if dtype.kind == "float")
EXACT_DTYPES = frozenset(name for name, dtype in DTYPES.items() if dtype.kind == "exact")
FROM_TORCH = {dtype.torch: name for name, dtype in DTYPES.items() if dtype.torch is not None}
"""torch's name → safetensors' name."""
