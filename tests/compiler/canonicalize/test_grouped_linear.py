"""Products of rows with a chosen matrix: every spelling is `linear_grouped`, or it is refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  # registers transformers::grouped_mm_fallback
from torch import Tensor
from torch.export import Dim

E, N, K = 4, 6, 8
ROWS = ({0: Dim("rows", min=2, max=64)},)


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, w, offs=offsets)


def offsets_of(ids: Tensor) -> Tensor:
    counts = torch.histc(ids.float(), bins=E, min=0, max=E - 1)
    return counts.cumsum(0, dtype=torch.int32)


def chosen(x: Tensor) -> Tensor:
    """An expert for each row, by its first numbers."""
    return x[:, :E].topk(1, -1).indices.reshape(-1)


def indexed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    ids = chosen(x)
    return torch.bmm(w[ids], x.unsqueeze(-1)).squeeze(-1) + b[ids]


def indexed_transposed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    ids = chosen(x)
    return b[ids] + torch.matmul(x.unsqueeze(1), w.transpose(1, 2)[ids]).squeeze(1)


def indexed_and_selected(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    ids = chosen(x)
    return torch.bmm(w[ids], x[..., None])[..., 0] + b[ids]


def sorted_rows(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    ids, order = torch.sort(chosen(x))
    y = grouped_mm(x[order], w.transpose(1, 2), offsets_of(ids)) + b[ids]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return y[inverse]


@pytest.mark.parametrize("spelling", [indexed, indexed_transposed, indexed_and_selected, sorted_rows])
def test_one_spelling_for_all(spelling: Any, canonical: Any, of: Any) -> None:
    module = of(spelling, w=torch.randn(E, N, K), b=torch.randn(E, N))
    found = canonical(module, torch.randn(9, K), dynamic_shapes=(ROWS,))
    linear = [line for line in found.text.splitlines() if "linear_grouped" in line]
    assert len(linear) == 1
    assert linear[0].endswith(f", c[{E},{N},{K}], c[{E},{N}])")
    for gone in ("bmm", "matmul", "grouped_mm", "sort", "histc", "index", "add("):
        assert gone not in found.text, gone


def test_weights_that_are_stored_inputs_first_are_turned_once(canonical: Any, of: Any) -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        ids, order = torch.sort(chosen(x))
        return grouped_mm(x[order], w, offsets_of(ids))

    found = canonical(of(run, w=torch.randn(E, K, N)), torch.randn(9, K))
    assert f"c[{E},{N},{K}]" in found.text
    assert "transpose" not in found.text


def test_other_offsets_are_counted(canonical: Any, of: Any) -> None:
    """Offsets as an input: rows behind the last have no expert."""

    def run(x: Tensor, offsets: Tensor, w: Tensor) -> Tensor:
        return grouped_mm(x, w.transpose(1, 2), offsets)

    module, x = of(run, w=torch.randn(E, N, K)), torch.randn(9, K)
    found = canonical(module, x, torch.tensor([2, 2, 3, 7], dtype=torch.int32))
    assert "linear_grouped" in found.text
    for offsets in ([0, 0, 0, 0], [9, 9, 9, 9], [0, 1, 8, 9]):
        ends = torch.tensor(offsets, dtype=torch.int32)
        torch.testing.assert_close(found.program(x, ends), module(x, ends))


def test_an_index_that_may_be_negative_is_refused(canonical: Any, of: Any) -> None:
    def run(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(w[ids], x.unsqueeze(-1)).squeeze(-1)

    found = canonical(of(run, w=torch.randn(E, N, K)), torch.randn(3, K), torch.tensor([0, -1, 2]))
    assert "linear_grouped" not in found.text
    assert any("may be negative" in reason for reason in found.refused)


def test_sorted_numbers_that_may_be_negative_are_counted(canonical: Any, of: Any) -> None:
    """A histogram leaves them out, so that the offsets are those of the rows that are left."""

    def run(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        ids, order = torch.sort(ids)
        return grouped_mm(x[order], w.transpose(1, 2), offsets_of(ids))

    found = canonical(of(run, w=torch.randn(E, N, K)), torch.randn(4, K), torch.tensor([0, -1, 2, 3]))
    assert "linear_grouped" in found.text
    assert "histc" in found.text


def test_repeated_rows_and_a_gate_need_no_sorting(canonical: Any, of: Any) -> None:
    """What transformers writes for a whole block: rows twice, gate and up in one, weights of the router."""

    def run(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        best, ids = (x @ router).softmax(-1).topk(2, -1)
        ids, order = torch.sort(ids.reshape(-1))
        ends = offsets_of(ids)
        gate, up = grouped_mm(x[order // 2], w1.transpose(1, 2), ends).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        y = grouped_mm(inner, w2.transpose(1, 2), ends) * best.reshape(-1)[order].unsqueeze(-1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return y[inverse].view(-1, 2, K).sum(1)

    tensors = {"router": torch.randn(K, E), "w1": torch.randn(E, 2 * N, K), "w2": torch.randn(E, K, N)}
    found = canonical(of(run, **tensors), torch.randn(5, K), dynamic_shapes=(ROWS,))
    assert found.text.count("linear_grouped(") == 2
    for gone in ("sort", "index", "histc", "arange", "floor_divide"):
        assert gone not in found.text, gone


def test_rows_that_meet_each_other_stay_sorted(canonical: Any, of: Any) -> None:
    def run(x: Tensor) -> Tensor:
        ids, order = torch.sort(chosen(x))
        y = x[order].cumsum(0)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return y[inverse] * ids.unsqueeze(-1)

    found = canonical(of(run), torch.randn(9, K))
    assert "sort" in found.text
    assert any("rows stay sorted: cumsum" in reason for reason in found.refused)


def in_turn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    ids = chosen(x)
    y = torch.bmm(w[ids], x.unsqueeze(-1)).squeeze(-1) + b[ids]
    return torch.sigmoid(y[..., ::2]) * y[..., 1::2]


def in_turn_plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = torch.nn.functional.linear(x, w[0], b[0])
    return y[..., 2::3] + y[:, 0:6:3]


@pytest.mark.parametrize(("spelling", "parts"), [(in_turn, {"0:3", "3:6"}), (in_turn_plain, {"0:2", "4:6"})])
def test_outputs_in_turn_lie_in_blocks(spelling: Any, parts: set[str], canonical: Any, of: Any) -> None:
    found = canonical(of(spelling, w=torch.randn(E, N, K), b=torch.randn(E, N)), torch.randn(9, K))
    slices = [n.args[1:] for n in found.program.graph.nodes if n.target == torch.ops.aten.slice.Tensor]
    assert parts <= {f"{start}:{end}" for _, start, end, _ in slices}
    assert all(step == 1 for *_, step in slices)


def test_outputs_that_are_read_otherwise_stay_in_turn(canonical: Any, of: Any) -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, w)
        return y[..., ::2] * y[..., 1::2] + y[..., :3]

    found = canonical(of(run, w=torch.randn(N, K)), torch.randn(9, K))
    assert ", 2)" in found.text
