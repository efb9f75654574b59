"""Additive codebooks (AQLM): groups of 8 weights as sums of vectors; the one encoder and the one decoder.

    W[n, 8 g + j] ~ scale[n] sum_m codebooks[m, c[n, g, m], j]          j = 0..7, m = 0..M-1

M codebooks of 2^b vectors, b = 8 or 16; the layout is called "Mxb" (1x16, 2x8, 1x8, kx8). For codes c `[N, G, M]`,
G = ceil(K / 8), `Np = ceil(N, 16)`, `Kp = ceil(K, 32)`:

    P[p, g, r, m] = c[16 p + r, g, m]        uint8 (b = 8) or uint16 (b = 16) `[Np/16, Kp/8, 16, M]`

A panel is 16 rows, contiguous over K: the codes of 8 inputs of 16 rows are 16 M (32 M) consecutive bytes.
scale: float32 `[Np/16, 1, 16]`. codebooks: float16 `[M, 2^b, 8]`. Rows >= N have codes and scale 0, groups >= G
code 0; where K is no multiple of 8 the last vectors reach beyond it. All columns >= K meet zero activations.

Example (2x8, one row, K = 16, codes (3, 5) and (7, 9)): bytes P[0, 0, 0] = 3 5, P[0, 1, 0] = 7 9.

Source of the format: Egiazarian et al., Extreme Compression of Large Language Models via Additive Quantization
(arXiv 2401.06118); the published checkpoints' shapes are those of `from_aqlm`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .packing import LANES, ceil_to

GROUP = 8
"""Weights of one vector."""


@dataclass(frozen=True)
class CodebookMatrix:
    """A matrix as additive codes: codes uint8 or uint16 `[N, G, M]`, codebooks float `[M, 2^b, 8]`, scale float `[N]`.

    k: real inputs, `8 (G - 1) < k <= 8 G`.
    """

    codes: Tensor
    codebooks: Tensor
    scale: Tensor
    k: int

    @property
    def layout(self) -> str:
        """`2x8`: codebooks, and bits of a code."""
        return f"{self.codes.shape[2]}x{8 if self.codes.dtype == torch.uint8 else 16}"

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight `[N, k]`."""
        return dequantize_codebook_codes(self.codes, self.codebooks, self.scale, self.k, dtype)


@dataclass(frozen=True)
class PackedCodebook:
    """Tensors of one packed matrix of additive codes."""

    weight: Tensor
    codebooks: Tensor
    scale: Tensor
    n: int
    k: int
    layout: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in (self.weight, self.codebooks, self.scale))


def dequantize_codebook_codes(
    codes: Tensor, codebooks: Tensor, scale: Tensor, k: int, dtype: torch.dtype
) -> Tensor:
    """`scale * sum_m codebooks[m, codes[..., m]]`: `[N, k]` in `dtype`; the sum in the order of m, then one product."""
    total: Tensor | None = None
    for m, book in enumerate(codebooks.to(dtype)):
        vectors = book[codes[:, :, m].to(torch.int32).to(torch.int64)]
        total = vectors if total is None else total + vectors
    assert total is not None
    return (total.flatten(1) * scale.to(dtype)[:, None])[:, :k].contiguous()


def check_codebooks(matrix: CodebookMatrix) -> None:
    """Raise InputError where shapes or types do not fit, or a codebook or scale is not finite."""
    codes, codebooks, scale = matrix.codes, matrix.codebooks, matrix.scale
    bits = {torch.uint8: 8, torch.uint16: 16}.get(codes.dtype)
    if bits is None or codes.dim() != 3:
        raise InputError(
            "Additive codes have the wrong type",
            expected="uint8 or uint16 [N, ceil(K / 8), M]",
            got=f"{codes.dtype} {list(codes.shape)}",
        )
    n, groups, count = codes.shape
    wanted = (list(codebooks.shape), list(scale.shape), groups)
    shapes = ([count, 2**bits, GROUP], [n], ceil_to(matrix.k, GROUP) // GROUP)
    if wanted != shapes:
        raise InputError(
            "Codes, codebooks and scales do not fit each other",
            expected=f"codebooks {shapes[0]}, scale {shapes[1]}, {shapes[2]} groups for K = {matrix.k}",
            got=f"codebooks {wanted[0]}, scale {wanted[1]}, {wanted[2]} groups",
        )
    if not bool(torch.isfinite(codebooks).all() and torch.isfinite(scale).all()):
        raise InputError("Codebooks or their scales hold NaN or infinity", expected="finite values")
    if not torch.equal(codebooks.to(torch.float16).to(codebooks.dtype), codebooks):
        raise InputError(
            "Codebooks are not representable in the packed layout",
            expected="float16 values",
            hint="round the codebooks to float16 before choosing codes",
        )


def pack_codebook(matrix: CodebookMatrix) -> PackedCodebook:
    """Pack additive codes. Raises InputError (`check_codebooks`)."""
    check_codebooks(matrix)
    codes = matrix.codes
    n, groups, count = codes.shape
    wide = ceil_to(matrix.k, 32) // GROUP
    rows = F.pad(codes, (0, 0, 0, wide - groups, 0, ceil_to(n, LANES) - n))
    packed = rows.reshape(-1, LANES, wide, count).permute(0, 2, 1, 3).contiguous()
    scale = F.pad(matrix.scale.to(torch.float32), (0, ceil_to(n, LANES) - n)).reshape(-1, 1, LANES)
    books = matrix.codebooks.to(torch.float16).contiguous()
    return PackedCodebook(packed, books, scale, n, matrix.k, matrix.layout)


def unpack_codebook_codes(packed: Tensor, n: int, k: int) -> Tensor:
    """Packed codes → `[n, ceil(k / 8), M]`; inverse of the layout above."""
    rows = packed.permute(0, 2, 1, 3).flatten(0, 1)
    return rows[:n, : ceil_to(k, GROUP) // GROUP].contiguous()


def unpack_codebook(
    weight: Tensor, codebooks: Tensor, scale: Tensor, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    """Decode to `[n, k]` of `dtype` (float32 or float64): the truth every kernel answers to."""
    codes = unpack_codebook_codes(weight, n, k)
    return dequantize_codebook_codes(codes, codebooks, scale.flatten()[:n], k, dtype)


def from_aqlm(codes: Tensor, codebooks: Tensor, scales: Tensor, k: int | None = None) -> CodebookMatrix:
    """Ready codes in the shapes that AQLM publishes.

    Args:
        codes: integers `[N, K / 8, M]`; AQLM stores them as int8 or int16 with the same bits as unsigned ones.
        codebooks: float `[M, 2^b, 1, 8]` (out group 1, in group 8).
        scales: float `[N, 1, 1, 1]`.
        k: real inputs (default: all).

    Raises:
        InputError: other group sizes, or shapes that do not fit.
    """
    if codebooks.dim() != 4 or codebooks.shape[2:] != (1, GROUP):
        raise InputError(
            "Codebooks have groups that no kernel reads",
            expected="[M, 2^b, 1, 8]: one output feature, eight inputs",
            got=str(list(codebooks.shape)),
        )
    size = int(codebooks.shape[1])
    if size not in (256, 65536):
        raise InputError("Codebooks have a size that no kernel reads", expected="256 or 65536", got=str(size))
    bits, dtype = (8, torch.uint8) if size == 256 else (16, torch.uint16)
    whole = codes.to(torch.int64)
    if codes.numel() and not (-(2 ** (bits - 1)) <= int(whole.min()) and int(whole.max()) < 2**bits):
        raise InputError(
            f"Codes do not fit codebooks of {size}",
            expected=f"0..{size - 1}, or the same bits signed",
            got=f"{int(whole.min())}..{int(whole.max())}",
        )
    unsigned = (whole % 2**bits).to(torch.int32).to(dtype)
    books = codebooks[:, :, 0].to(torch.float32)
    matrix = CodebookMatrix(unsigned, books, scales.flatten().to(torch.float32), k or 8 * codes.shape[1])
    check_codebooks(matrix)
    return matrix
