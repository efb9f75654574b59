"""Linears, folded constants, batch norm and weight norm, no-ops, slices, equal calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from isofold.compiler.canonicalize import strip_no_ops
from isofold.compiler.capture import capture

LINEAR: dict[str, Callable[..., Tensor]] = {
    "transposed": lambda x, w, b: x @ w.T + b,
    "bias first": lambda x, w, b: b + torch.matmul(x, w.transpose(0, 1)),
    "einsum": lambda x, w, b: torch.einsum("bsk,nk->bsn", x, w) + b,
    "einsum, dots": lambda x, w, b: torch.einsum("...k,nk->...n", x, w) + b,
    "operator": F.linear,
    "operator and bias": lambda x, w, b: F.linear(x, w) + b,
    "wide bias": lambda x, w, b: F.linear(x, w) + b.view(1, 1, -1),
}


@pytest.mark.parametrize("spelling", LINEAR)
def test_one_spelling(spelling: str, canonical: Any, of: Any) -> None:
    found = canonical(of(LINEAR[spelling], w=torch.randn(6, 8), b=torch.randn(6)), torch.randn(2, 3, 8))
    assert found.text == "%0 = linear(inputs_0, c[6,8], c[6])\nreturn [%0]"


def test_a_matrix_the_other_way_round_is_transposed_once(canonical: Any, of: Any) -> None:
    found = canonical(of(lambda x, w: (x @ w, torch.mm(x[0], w)), w=torch.randn(8, 6)), torch.randn(2, 3, 8))
    assert found.text.count("linear(") == 2
    assert "c[6,8]" in found.text
    assert "c[8,6]" not in found.text


def test_addmm(canonical: Any, of: Any) -> None:
    tensors = {"w": torch.randn(8, 6), "b": torch.randn(6)}
    plain = canonical(of(lambda x, w, b: torch.addmm(b, x, w), **tensors), torch.randn(3, 8))
    assert plain.text == "%0 = linear(inputs_0, c[6,8], c[6])\nreturn [%0]"
    scaled = canonical(of(lambda x, w, b: torch.addmm(b, x, w, alpha=2.0), **tensors), torch.randn(3, 8))
    assert scaled.refused == ["addmm scales its operands by alpha or beta"]


def test_leading_dimensions_are_not_merged_around_a_linear(canonical: Any, of: Any) -> None:
    def rows(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(b, x.view(-1, x.shape[-1]), w).view(*x.shape[:-1], 6)

    free = (({0: Dim("batch", max=64), 1: Dim("sequence", max=64)},),)
    tensors = {"w": torch.randn(8, 6), "b": torch.randn(6)}
    found = canonical(of(rows, **tensors), torch.randn(2, 3, 8), dynamic_shapes=free)
    assert "reshape" not in found.text
    assert "linear(inputs_0, c[6,8], c[6])" in found.text


def test_rows_that_are_read_merged_stay_merged(canonical: Any, of: Any) -> None:
    def rows(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        merged = F.linear(x.view(-1, 8), w)
        return merged.view(2, 3, 6), merged.sum(0)

    found = canonical(of(rows, w=torch.randn(6, 8)), torch.randn(2, 3, 8))
    assert found.text.count("reshape") == 2


def test_two_biases_become_one(canonical: Any, of: Any) -> None:
    found = canonical(
        of(lambda x, w, b, c: F.linear(x, w, b) + c, w=torch.randn(6, 8), b=torch.randn(6), c=torch.randn(6)),
        torch.randn(3, 8),
    )
    assert found.text == "%0 = linear(inputs_0, c[6,8], c[6])\nreturn [%0]"


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: ((y := F.linear(x, w)) + b, y),  # the linear has another reader
        lambda x, w, b: F.linear(x, w) + b[:, None],  # runs over rows
        lambda x, w, b: torch.add(F.linear(x, w), b, alpha=2),
    ],
)
def test_what_is_no_bias_stays_a_sum(function: Any, canonical: Any, of: Any) -> None:
    found = canonical(of(function, w=torch.randn(6, 8), b=torch.randn(6)), torch.randn(6, 8))
    assert "add.Tensor" in found.text


def test_a_diagonal_is_no_linear(canonical: Any, of: Any) -> None:
    found = canonical(
        of(lambda x, w: torch.einsum("kk,nk->kn", x, w), w=torch.randn(6, 8)), torch.randn(8, 8)
    )
    assert "linear" not in found.text


def test_products_of_activations_stay(canonical: Any, of: Any) -> None:
    found = canonical(of(lambda x, y: x @ y.mT), torch.randn(2, 3, 8), torch.randn(2, 5, 8))
    assert "linear" not in found.text


def test_tied_weights_stay_one_tensor(canonical: Any, of: Any) -> None:
    def tied(ids: Tensor, w: Tensor) -> Tensor:
        return F.embedding(ids, w) @ w.t()

    found = canonical(of(tied, w=torch.randn(16, 8)), torch.randint(0, 16, (2, 3)))
    assert found.text == "%0 = embedding(c[16,8], inputs_0)\n%1 = linear(%0, c[16,8])\nreturn [%1]"
    assert len(found.program.tensors) == 1


class Normed(nn.Module):
    """A layer and a batch norm with random statistics."""

    def __init__(self, layer: nn.Module, channels: int, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.layer, self.norm = layer, kind(channels, **options)
        for tensor in [*self.norm.parameters(), *self.norm.buffers()]:
            if tensor.dtype.is_floating_point:
                tensor.data = torch.rand_like(tensor) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


FOLDED = {
    "conv2d": (lambda: Normed(nn.Conv2d(4, 6, 3, padding=1), 6, nn.BatchNorm2d), (2, 4, 5, 5)),
    "no bias": (lambda: Normed(nn.Conv2d(4, 6, 3, bias=False), 6, nn.BatchNorm2d), (2, 4, 5, 5)),
    "groups": (lambda: Normed(nn.Conv2d(4, 6, 3, groups=2), 6, nn.BatchNorm2d), (2, 4, 5, 5)),
    "not affine": (lambda: Normed(nn.Conv1d(4, 6, 3), 6, nn.BatchNorm1d, affine=False), (2, 4, 9)),
    "transposed": (lambda: Normed(nn.ConvTranspose1d(4, 6, 3, 2), 6, nn.BatchNorm1d), (2, 4, 9)),
    "transposed, groups": (
        lambda: Normed(nn.ConvTranspose2d(4, 6, 3, groups=2), 6, nn.BatchNorm2d),
        (2, 4, 5, 5),
    ),
    "linear": (lambda: Normed(nn.Linear(4, 6), 6, nn.BatchNorm1d), (3, 4)),
}


@pytest.mark.parametrize("case", FOLDED)
def test_batch_norm_is_folded(case: str, canonical: Any) -> None:
    make, size = FOLDED[case]
    module = make()
    found = canonical(module, torch.randn(size))
    assert found.program.operator_count == 1
    assert "batch norm folded into the weight before it" in found.applied


def test_batch_norm_refusals(canonical: Any) -> None:
    class Shared(Normed):
        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return self.norm(y) + y

    shared = canonical(Shared(nn.Conv1d(4, 6, 3), 6, nn.BatchNorm1d), torch.randn(2, 4, 9))
    assert shared.refused == ["the convolution or linear before it has other readers"]
    alone = canonical(Normed(nn.ReLU(), 4, nn.BatchNorm1d), torch.randn(2, 4, 9))
    assert alone.refused == ["there is no convolution or linear right before it"]
    sequence = canonical(Normed(nn.Linear(9, 9), 4, nn.BatchNorm1d), torch.randn(2, 4, 9))
    assert sequence.refused == [
        "the linear's features are its last dimension, the batch norm's channels the second"
    ]


def test_a_weight_shared_with_another_layer_keeps_its_value(canonical: Any) -> None:
    class Twice(Normed):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer(x)) + F.conv1d(x, self.layer.weight)

    found = canonical(Twice(nn.Conv1d(4, 6, 3), 6, nn.BatchNorm1d), torch.randn(2, 4, 9))
    assert found.text.count("conv1d(") == 2


def test_weight_norm_is_folded(canonical: Any) -> None:
    old = torch.nn.utils.weight_norm(nn.Conv1d(4, 6, 3))
    new = parametrizations.weight_norm(nn.Conv1d(4, 6, 3), dim=2)
    for module in (old, new):
        found = canonical(module, torch.randn(2, 4, 9))
        assert found.program.operator_count == 1
        assert "c[6,4,3], c[6]" in found.text


def test_constants_are_folded_once_and_rounded_once(canonical: Any, of: Any) -> None:
    gain = torch.rand(8)
    found = canonical(of(lambda x, g: x * (1 + g).exp().sqrt(), g=gain), torch.randn(2, 8))
    assert found.text == "%0 = mul.Tensor(inputs_0, c[8])\nreturn [%0]"
    held = next(iter(found.program.tensors.values()))
    assert torch.equal(held, (1 + gain.double()).exp().sqrt().float())


def test_a_constant_that_would_grow_is_kept(canonical: Any, of: Any) -> None:
    found = canonical(
        of(lambda x, g: x + g.expand(512, 512).exp(), g=torch.rand(1, 512)), torch.randn(512, 512)
    )
    assert found.refused == ["its 262144 elements come from far fewer: kept as an expression"]


def test_random_numbers_are_no_constant(of: Any) -> None:
    from isofold.compiler.canonicalize import canonicalize

    program = canonicalize(capture(of(lambda x: x + torch.rand(4)), (torch.randn(4),))).program
    assert any("rand" in str(node.target) for node in program.graph.nodes)


NO_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "cast": lambda x: x.to(torch.float32).float(),
    "type of itself": lambda x: x.type_as(x),
    "clone": lambda x: x.clone().contiguous(),
    "dropout": lambda x: F.dropout(x, 0.5, False),
    "whole slice": lambda x: x[:, :, 0:].narrow(1, 0, 3),
    "views": lambda x: x.view(6, 8).reshape(2, 24).view(2, 3, 8),
    "transposes": lambda x: x.transpose(1, 2).permute(0, 2, 1),
    "one": lambda x: x * 1.0 / 1,
    "expand": lambda x: x.expand(2, 3, 8),
}


@pytest.mark.parametrize("case", NO_OPS)
def test_no_ops_go(case: str, canonical: Any, of: Any) -> None:
    found = canonical(of(lambda x: torch.relu(NO_OPS[case](x))), torch.randn(2, 3, 8))
    assert found.text == "%0 = relu(inputs_0)\nreturn [%0]"
    assert found.error == 0.0


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "cast": lambda x: x.half(),
    "slice": lambda x: x[:, 1:],
    "strided slice": lambda x: x[:, ::2],
    "zero": lambda x: x + 0.0,  # turns -0.0 into 0.0
    "transpose": lambda x: x.transpose(1, 2),
    "two": lambda x: x * 2.0,
}


@pytest.mark.parametrize("case", OPS)
def test_what_changes_values_stays(case: str, of: Any) -> None:
    captured = capture(of(lambda x: torch.relu(OPS[case](x))), (torch.randn(2, 3, 8),))
    assert strip_no_ops(captured).program.operator_count == 2


def test_parts_are_slices(canonical: Any, of: Any) -> None:
    def mixed(parts: Any, rest: Any) -> Any:
        return parts[0] * parts[1] + rest

    parts = canonical(of(lambda x: mixed(x.split([2, 2, 4], -1), x[..., 6:])), torch.randn(3, 8))
    chunks = canonical(of(lambda x: mixed(x.chunk(4, -1), x[..., -2:])), torch.randn(3, 8))
    assert parts.text == chunks.text
    assert parts.text.startswith(
        "%0 = slice.Tensor(inputs_0, 1, 0, 2, 1)\n%1 = slice.Tensor(inputs_0, 1, 2, 4, 1)"
    )


def test_a_slice_of_a_concatenation_is_its_part(canonical: Any, of: Any) -> None:
    def parts(x: Tensor) -> Tensor:
        joined = torch.cat([x.exp(), x, x.sin()], -1)
        a, b, c = joined.chunk(3, -1)
        return a * b - c + joined[..., 3:7].sum(-1, keepdim=True)

    found = canonical(of(parts), torch.randn(3, 4))
    assert "sub.Tensor" in found.text
    assert found.text.count("slice") == 1
    assert "3, 7, 1)" in found.text


def test_an_index_of_a_dimension_that_was_cut_off_is_a_slice(canonical: Any, of: Any) -> None:
    def parts(x: Tensor) -> Tensor:
        q, k, v = (x.view(*x.shape[:-1], 2, 3, 4)[..., i, :] for i in (0, 1, -1))
        return q * k + v

    found = canonical(of(parts), torch.randn(5, 7, 24), dynamic_shapes=(({0: Dim("batch", max=64)},),))
    assert "select" not in found.text
    assert found.text.count("reshape") == 1
    assert [f"slice.Tensor(%1, 3, {start}, {start + 4}, 1)" in found.text for start in (0, 4, 8)] == [
        True
    ] * 3


def test_heads_are_cut_out_of_what_they_are_views_of(canonical: Any, of: Any) -> None:
    def heads(x: Tensor) -> Tensor:
        parts = x.view(x.shape[0], 7, 6, 4)
        return parts[:, :, :-2] * parts[:, :, [-1]]

    found = canonical(of(heads), torch.randn(5, 7, 24), dynamic_shapes=(({0: Dim("batch", max=64)},),))
    assert "slice.Tensor(inputs_0, 2, 0, 16, 1)" in found.text
    assert "slice.Tensor(inputs_0, 2, 20, 24, 1)" in found.text


def test_constant_indices_in_a_row_are_a_slice(canonical: Any, of: Any) -> None:
    found = canonical(of(lambda x: x[..., [-2, -1], :] * x[:, [0]].sum()), torch.randn(5, 6, 4))
    assert "slice.Tensor(inputs_0, 1, 4, 6, 1)" in found.text
    assert "slice.Tensor(inputs_0, 1, 0, 1, 1)" in found.text
    assert "index" not in found.text


def test_other_constant_indices_stay(canonical: Any, of: Any) -> None:
    found = canonical(of(lambda x: x[:, [0, 2]] * x[:, [-1, 0]]), torch.randn(5, 6, 4))
    assert found.text.count("index.Tensor") == 2


def test_an_index_of_another_dimension_stays(canonical: Any, of: Any) -> None:
    found = canonical(of(lambda x: x.view(5, 2, 3, 4)[:, 1]), torch.randn(10, 12))
    assert "select" in found.text


@pytest.mark.parametrize("unbound", [True, False])
def test_parts_of_a_permuted_view_are_slices(unbound: bool, canonical: Any, of: Any) -> None:
    def parts(x: Tensor) -> Tensor:
        heads = x.view(x.shape[0], 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0) if unbound else (heads[i] for i in (0, 1, -1))
        return q * k + v

    found = canonical(of(parts), torch.randn(5, 7, 24), dynamic_shapes=(({0: Dim("batch", max=64)},),))
    assert "select" not in found.text
    assert "unbind" not in found.text
    assert all(f"slice.Tensor(inputs_0, 2, {start}, {start + 8}, 1)" in found.text for start in (0, 8, 16))


def test_equal_calls_are_one(canonical: Any, of: Any) -> None:
    found = canonical(of(lambda x: torch.exp(x) + torch.exp(x.clone()) * torch.exp(-x)), torch.randn(3, 2))
    assert found.text.count("exp(") == 2


def test_the_same_program_comes_out_twice(canonical: Any, of: Any) -> None:
    module = of(lambda x, w, b: torch.softmax(F.linear(x, w) + b, -1), w=torch.randn(6, 8), b=torch.randn(6))
    first, second = (canonical(copy.deepcopy(module), torch.ones(2, 8)) for _ in range(2))
    assert first.text == second.text
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.program.tensors.values(), second.program.tensors.values(), strict=True)
    )


POINTWISE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sequence": lambda x, w, b: F.conv1d(x.transpose(1, 2), w[:, :, None], b).transpose(1, 2),
    "image": lambda x, w, b: (
        F.conv2d(x[:, :, None].permute(0, 3, 1, 2), w[:, :, None, None], b).permute(0, 2, 3, 1).squeeze(2)
    ),
}


@pytest.mark.parametrize("case", POINTWISE)
def test_a_pointwise_convolution_of_channels_last_is_a_linear(case: str, canonical: Any, of: Any) -> None:
    found = canonical(of(POINTWISE[case], w=torch.randn(6, 8), b=torch.randn(6)), torch.randn(2, 3, 8))
    assert "conv" not in found.text
    assert "c[6,8], c[6])" in found.text
    assert "transpose" not in found.text
    assert "permute" not in found.text


def test_a_block_of_pointwise_convolutions_is_one_of_linears(canonical: Any, of: Any) -> None:
    def block(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        first = F.conv1d(x.transpose(1, 2), up)
        return F.conv1d(F.gelu(first), down).transpose(1, 2)

    found = canonical(of(block, up=torch.randn(6, 8, 1), down=torch.randn(8, 6, 1)), torch.randn(2, 3, 8))
    assert found.text == "%0 = linear(inputs_0, c[6,8])\n%1 = gelu(%0)\n%2 = linear(%1, c[8,6])\nreturn [%2]"


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.conv1d(x, w),  # channels first from the start
        lambda x, w: F.conv1d(x.transpose(1, 2), w, stride=2),
        lambda x, w: F.conv1d(x.transpose(1, 2), w, padding=1),
        lambda x, w: F.conv1d(x.transpose(1, 2), w[:, :2], groups=4),
        lambda x, w: F.conv1d(F.pad(x.transpose(1, 2), [1, 1]), w.expand(-1, -1, 3)),
        lambda x, w: F.conv1d(x.permute(2, 1, 0), w),  # the channels are not the last dimension
    ],
)
def test_convolutions_that_stay(function: Any, canonical: Any, of: Any) -> None:
    found = canonical(of(function, w=torch.randn(8, 8, 1)), torch.randn(8, 8, 8))
    assert "conv1d" in found.text
    assert "linear" not in found.text


def test_parts_without_elements_are_left_out_of_concatenations(canonical: Any, of: Any) -> None:
    """What a cache begins with: transformers joins the first tokens behind an empty tensor."""
    x, y = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    alone = canonical(of(lambda x, e: torch.cat([e, x], 1) + 1.0, e=torch.empty(0)), x)
    assert "cat" not in alone.text
    two = canonical(of(lambda x, y, e: torch.cat([x, e, y], 1), e=torch.empty(2, 0, 8)), x, y)
    assert two.text.count("cat(") == 1
    assert "c[2,0,8]" not in two.text
    kept = canonical(of(lambda x, e: torch.cat([e, x], 1), e=torch.empty(2, 0, 8, dtype=torch.float64)), x)
    assert "cat(" in kept.text  # it decides the type of the result


def test_squeezed_dimensions_that_are_not_one_are_left_out(canonical: Any, of: Any) -> None:
    found = canonical(of(lambda x: (x.squeeze(1), x.squeeze((0, 1, 2)))), torch.randn(2, 3, 1))
    assert found.text == "%0 = squeeze.dims(inputs_0, [2])\nreturn [inputs_0, %0]"
