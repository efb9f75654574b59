"""Complex numbers as pairs, Fourier transforms as products, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fft, nn

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.canonicalize.complex_numbers import split_complex_numbers
from isofold.compiler.canonicalize.fourier import DIRECT
from isofold.compiler.capture import capture
from isofold.compiler.driver import relative_error
from isofold.compiler.editor import Editor
from isofold.compiler.program import Program
from isofold.passes.layers import layers


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _spectrum_of_a_slice(x: Tensor) -> Tensor:
    held = torch.zeros(2, 9, dtype=torch.cfloat)
    held[:, :5] = fft.rfft(x)[:, :5]
    return held.abs()


def _short_time(x: Tensor) -> Tensor:
    window = torch.hann_window(8)
    spectrum = torch.stft(x, 8, 2, window=window, return_complex=True)
    return torch.istft(spectrum * torch.exp(torch.tensor(0.3j)), 8, 2, window=window, length=x.shape[-1])


LARGE = 4 * DIRECT - 4  # 1020 = 30 x 34: two steps
CASES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "real part": (lambda x: fft.fft(x).real, (2, 8)),
    "prime": (lambda x: torch.view_as_real(fft.fft(x, norm="ortho")), (2, 7)),
    "large prime": (lambda x: fft.fft(x).abs(), (1, 509)),
    "two steps": (lambda x: torch.view_as_real(fft.rfft(x, norm="forward")), (1, LARGE)),
    "two steps back": (lambda x: fft.irfft(fft.rfft(x) * fft.rfft(x).conj(), n=LARGE), (1, LARGE)),
    "two steps back, odd": (lambda x: fft.irfft(fft.rfft(x) * 2, n=315), (1, 315)),
    "several dimensions": (lambda x: fft.ifftn(fft.fftn(x)).real + fft.fft2(x).imag, (3, 4, 5)),
    "inner dimensions": (lambda x: fft.irfft2(fft.rfft2(x, dim=(0, 2)), s=(4, 5), dim=(0, 2)), (4, 2, 5)),
    "padded and cut": (lambda x: fft.irfft(fft.rfft(x, n=20), n=16), (2, 12)),
    "angle of a real sum": (lambda x: fft.rfft(x).angle(), (3, 6)),
    "written slice": (_spectrum_of_a_slice, (2, 12)),
    "short-time": (_short_time, (2, 40)),
    "arithmetic": (
        lambda x: torch.view_as_real(
            (torch.complex(x, x + 1) * (2 - 1j) / torch.complex(x - 3, x * x) + 1j - x) * x / 2
            - torch.polar(x.abs(), x)
        ),
        (3, 4),
    ),
    "numbers": (lambda x: (torch.full((3,), 2 - 1j) * x.to(torch.complex64)).square().abs(), (3,)),
    "products": (
        lambda x: torch.view_as_real(
            torch.einsum("ij,kj->ik", torch.complex(x, x + 1), torch.complex(x, x * 2)) @ torch.complex(x, x)
        ),
        (3, 3),
    ),
}


def captured(function: Callable[[Tensor], Tensor], x: Tensor) -> Program:
    return capture(Function(function), (x,))


@pytest.mark.parametrize("case", CASES)
def test_pairs_compute_the_same(case: str) -> None:
    function, size = CASES[case]
    x = torch.randn(size)
    result = split_complex_numbers(captured(function, x))
    assert not result.report.refused
    assert not any(
        isinstance(v := node.meta.get("val"), Tensor) and v.is_complex()
        for node in result.program.graph.nodes
    )
    assert relative_error([function(x)], [result.program(x)]) < 1e-6


def test_equal_tables_are_one() -> None:
    program = split_complex_numbers(
        captured(lambda x: fft.fft(fft.fft(x).real).real, torch.randn(2, 8))
    ).program
    assert len(program.parameters) == 1


def test_a_matrix_of_a_transform_is_no_layer() -> None:
    program = canonicalize(captured(lambda x: fft.fft(x).real, torch.randn(2, 64))).program
    assert any(node.target == torch.ops.aten.linear.default for node in program.graph.nodes)
    assert not list(layers(Editor(program)))


def test_complex_results_and_unknown_sizes_are_left_alone() -> None:
    result = split_complex_numbers(captured(fft.fft, torch.randn(2, 8)))
    assert "takes or returns complex" in result.report.refused[0].reason
    size = torch.export.Dim("size", min=4, max=64)
    program = capture(Function(lambda x: fft.fft(x).real), (torch.randn(2, 8),), None, ({1: size},))
    assert "without a static size" in split_complex_numbers(program).report.refused[0].reason


class Rotated(nn.Module):
    """Rotary embedding with complex numbers, as in Meta's Llama."""

    turns: Tensor

    def __init__(self) -> None:
        super().__init__()
        angle = torch.outer(torch.arange(6.0), torch.rand(4))
        self.register_buffer("turns", torch.polar(torch.ones_like(angle), angle))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * self.turns[: x.shape[1], None]).flatten(3)


def test_complex_rotary_embedding_is_recognized() -> None:
    x = torch.randn(2, 6, 3, 8)
    model = Rotated()
    sequence: Any = torch.export.Dim("sequence", min=2, max=5)
    for shapes in (None, ({1: sequence},)):
        given = x if shapes is None else x[:, :4]
        program = canonicalize(capture(model, (given,), None, shapes)).program
        targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert torch.ops.isofold.rotary.default in targets
        assert relative_error([model(given)], [program(given)]) < 1e-6
