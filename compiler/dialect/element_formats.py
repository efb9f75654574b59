"""Weights as codes of small floats or of a table: the formats, the value of every code, and rounding to it.

| format | element | bits | scale of a group | group sizes |
|---|---|---|---|---|
| `nf4` | 16 quantiles of a normal distribution (QLoRA) | 4 | float16 | 32, 64, 128 |
| `table4` | 16 float32 entries of the layer's own | 4 | float16 | 32, 64, 128 |
| `e4m3`, `e5m2` | FP8 (OCP OFP8; E4M3 has no infinity) | 8 | float32 a row, or float16 | 0 (the row), 32, 64, 128 |
| `mxfp4` | E2M1 | 4 | E8M0 | 32 |
| `mxfp6_e3m2`, `mxfp6_e2m3` | E3M2, E2M3 | 6 | E8M0 | 32 |
| `mxfp8_e4m3`, `mxfp8_e5m2` | FP8 | 8 | E8M0 | 32 |
| `nvfp4` | E2M1 | 4 | E4M3, times one float32 a tensor | 16 |

A code of a small float is sign, exponent, mantissa from its highest bit down; with exponent field e (bias b) and
mantissa m of M bits its value is `(-1)^s 2^(e - b) (1 + m / 2^M)`, for e = 0 `(-1)^s 2^(1 - b) m / 2^M`. E8M0 is
`2^(code - 127)`, 255 is NaN. Example: E2M1 code 0b1101 is s = 1, e = 2, m = 1: -2^1 * 1.5 = -3.

Rounding: to nearest; a tie goes to the even code in small floats (roundTiesToEven of IEEE 754, which OFP8 and MX
v1.0 ask for) and to the lower entry in tables (bitsandbytes). Values beyond the largest saturate (OFP8's and
MX's saturating conversion). Sources: OCP 8-bit Floating Point Specification v1.0, OCP Microscaling Formats v1.0,
Dettmers et al., QLoRA (arXiv 2305.14314), appendix E.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError

ScaleKind = Literal["float", "e8m0", "e4m3"]

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a standard normal distribution, scaled to -1..1, with an exact zero, as QLoRA publishes them."""


@dataclass(frozen=True)
class ElementFormat:
    """One format of codes.

    exponent, mantissa, bias: of a small float; exponent 0 for tables. group_sizes: allowed ones, the first is the
    default. scale: how a group's scale is stored.
    """

    name: str
    bits: int
    scale: ScaleKind
    group_sizes: tuple[int, ...]
    exponent: int = 0
    mantissa: int = 0
    bias: int = 0

    @property
    def is_table(self) -> bool:
        """Whether codes are indices of 16 entries without an order of bits."""
        return self.exponent == 0

    @property
    def largest_exponent(self) -> int:
        """Exponent of the largest value (emax of the MX specification)."""
        top = 2**self.exponent - 1
        return top - self.bias - (1 if (self.exponent, self.mantissa) == (5, 2) else 0)

    @property
    def largest(self) -> float:
        """The largest finite value."""
        values = self.values()
        return float(values[values.isfinite()].max())

    def values(self, table: Tensor | None = None) -> Tensor:
        """Value of every code, float64 `[2^bits]`; NaN and infinity where the format has them.

        table: the entries of a `table4`. Raises InputError where there is none.
        """
        if self.name == "table4":
            if table is None or table.shape != (16,):
                got = "none" if table is None else f"{list(table.shape)}"
                raise InputError("The format table4 needs a table", expected="float32 [16]", got=got)
            return table.to(torch.float64)
        return _values(self.name)


def _small_float(exponent: int, mantissa: int, bias: int) -> Tensor:
    codes = torch.arange(2 ** (1 + exponent + mantissa))
    field, fraction = (codes >> mantissa) & (2**exponent - 1), (codes & (2**mantissa - 1)).double()
    normal = torch.ldexp(1 + fraction / 2**mantissa, field - bias)
    subnormal = torch.ldexp(fraction / 2**mantissa, torch.tensor(1 - bias))
    values = torch.where(field > 0, normal, subnormal)
    return torch.where(codes >> (exponent + mantissa) > 0, -values, values)


@cache
def _values(name: str) -> Tensor:
    form = FORMATS[name]
    if form.is_table:
        return torch.tensor(NF4, dtype=torch.float64)
    values = _small_float(form.exponent, form.mantissa, form.bias)
    if (form.exponent, form.mantissa) == (4, 3):
        values[[0x7F, 0xFF]] = torch.nan
    if (form.exponent, form.mantissa) == (5, 2):
        values[[0x7C, 0xFC]] = torch.tensor([torch.inf, -torch.inf], dtype=torch.float64)
        values[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = torch.nan
    return values


_E2M1, _E3M2, _E2M3, _E4M3, _E5M2 = (2, 1, 1), (3, 2, 3), (2, 3, 1), (4, 3, 7), (5, 2, 15)
_GROUPS = (64, 32, 128)

FORMATS: dict[str, ElementFormat] = {
    form.name: form
    for form in (
        ElementFormat("nf4", 4, "float", _GROUPS),
        ElementFormat("table4", 4, "float", _GROUPS),
        ElementFormat("e4m3", 8, "float", (0, 32, 64, 128), *_E4M3),
        ElementFormat("e5m2", 8, "float", (0, 32, 64, 128), *_E5M2),
        ElementFormat("mxfp4", 4, "e8m0", (32,), *_E2M1),
        ElementFormat("mxfp6_e3m2", 6, "e8m0", (32,), *_E3M2),
        ElementFormat("mxfp6_e2m3", 6, "e8m0", (32,), *_E2M3),
        ElementFormat("mxfp8_e4m3", 8, "e8m0", (32,), *_E4M3),
        ElementFormat("mxfp8_e5m2", 8, "e8m0", (32,), *_E5M2),
        ElementFormat("nvfp4", 4, "e4m3", (16,), *_E2M1),
    )
}
"""All formats by name."""


def element_format(name: str) -> ElementFormat:
    """The format called `name`. Raises InputError."""
    if name not in FORMATS:
        raise InputError("Unknown weight format", expected=" | ".join(FORMATS), got=repr(name))
    return FORMATS[name]


def check_group_size(form: ElementFormat, group_size: int) -> None:
    """Raise InputError where the format has no groups of this size."""
    if group_size not in form.group_sizes:
        raise InputError(
            f"The format {form.name} has no groups of {group_size}",
            expected=" | ".join(map(str, sorted(form.group_sizes))),
            got=str(group_size),
        )


def encode(x: Tensor, form: ElementFormat, table: Tensor | None = None) -> Tensor:
    """The codes of `x` (float, already divided by its scale), uint8 in its shape; saturating, see the module.

    Raises InputError for NaN and infinity.
    """
    if not bool(torch.isfinite(x).all()):
        raise InputError("Values to encode hold NaN or infinity", expected="finite values", got=form.name)
    x = x.to(torch.float32)
    if form.is_table:
        entries, order = form.values(table).to(torch.float32).sort(stable=True)
        return order[torch.bucketize(x, (entries[:-1] + entries[1:]) / 2)].to(torch.uint8)
    dtype = {(4, 3): torch.float8_e4m3fn, (5, 2): torch.float8_e5m2}.get((form.exponent, form.mantissa))
    if dtype is not None:
        return x.clamp(-form.largest, form.largest).to(dtype).view(torch.uint8)
    magnitudes = form.values()[: 2 ** (form.bits - 1)].to(torch.float32)
    middles = (magnitudes[:-1] + magnitudes[1:]) / 2
    # A tie above an odd code goes up to the even one: for it the boundary is the next number below the middle.
    middles[1::2] = middles[1::2].nextafter(torch.tensor(0.0))
    code = torch.bucketize(x.abs(), middles)
    sign = ((x < 0) & (code > 0)).to(torch.int64) << (form.bits - 1)
    return (code | sign).to(torch.uint8)


def decode(codes: Tensor, form: ElementFormat, dtype: torch.dtype, table: Tensor | None = None) -> Tensor:
    """Values of codes uint8, in `dtype` (float32 or float64; exact in both)."""
    return form.values(table).to(dtype)[codes.to(torch.int64)]


def scale_values(scale: Tensor, form: ElementFormat, dtype: torch.dtype) -> Tensor:
    """Values of stored scales: floats as they are, E8M0 and E4M3 codes (uint8) decoded."""
    if form.scale == "float":
        return scale.to(dtype)
    if form.scale == "e4m3":
        return FORMATS["e4m3"].values().to(dtype)[scale.to(torch.int64)]
    powers = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 127)
    powers[255] = torch.nan
    return powers.to(dtype)[scale.to(torch.int64)]


def check_codes(codes: Tensor, scale: Tensor, form: ElementFormat, table: Tensor | None = None) -> None:
    """Raise InputError where codes uint8 or scales stand for NaN or infinity, or codes are wider than the format."""
    if codes.dtype != torch.uint8:
        raise InputError(f"Codes of {form.name} have the wrong type", expected="uint8", got=str(codes.dtype))
    if codes.numel() and int(codes.max()) >= 2**form.bits:
        raise InputError(
            f"Codes do not fit {form.name}", expected=f"0..{2**form.bits - 1}", got=str(int(codes.max()))
        )
    bad = ~torch.isfinite(form.values(table))
    count = int(bad[codes.to(torch.int64)].sum()) if bool(bad.any()) else 0
    scales = int((~torch.isfinite(scale_values(scale, form, torch.float32))).sum())
    if count or scales:
        raise InputError(
            f"Codes of {form.name} stand for NaN or infinity",
            expected="finite weights",
            got=f"{count} of {codes.numel()} codes, {scales} of {scale.numel()} scales",
        )
