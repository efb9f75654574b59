"""Attention written out, its masks, and grouped queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional as F

B, H, S, T, D = 2, 4, 5, 7, 8
LOW = torch.finfo(torch.float32).min


def qkv(heads: int = H, keys: int = T) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, H, S, D), torch.randn(B, heads, keys, D), torch.randn(B, heads, keys, D)


WRITTEN_OUT: dict[str, Callable[..., Tensor]] = {
    "transpose, multiply": lambda q, k, v: (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v,
    "divide": lambda q, k, v: torch.softmax(torch.matmul(q, k.transpose(2, 3)) / 4.0, dim=-1) @ v,
    "permute": lambda q, k, v: F.softmax(q @ k.permute(0, 1, 3, 2) * 0.5 * 0.5, dim=3) @ v,
    "scaled queries": lambda q, k, v: ((q * 0.25) @ k.mT).softmax(-1) @ v,
    "both scaled": lambda q, k, v: ((q * 0.5) @ (k * 0.5).mT).softmax(-1) @ v,
    "casts and dropout": lambda q, k, v: (
        F.dropout((q @ k.mT * 0.25).float().softmax(-1).to(q.dtype), 0.1, False) @ v
    ),
    "softmax in float32": lambda q, k, v: (
        F.softmax(q @ k.mT * 0.25, dim=-1, dtype=torch.float32).to(q.dtype) @ v
    ),
    "operator": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.25),
}


@pytest.mark.parametrize("spelling", WRITTEN_OUT)
def test_one_spelling(spelling: str, canonical: Any, of: Any) -> None:
    found = canonical(of(WRITTEN_OUT[spelling]), *qkv())
    assert found.text == (
        "%0 = scaled_dot_product_attention(inputs_0, inputs_1, inputs_2, None, 0, False, "
        "scale=0.25, enable_gqa=False)\nreturn [%0]"
    )


def test_default_scale_is_spelled_out(canonical: Any, of: Any) -> None:
    found = canonical(of(F.scaled_dot_product_attention), *qkv())
    assert "scale=0.3535534, enable_gqa=False" in found.text


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lead", [(3,), (2, 3, 4)])
@pytest.mark.parametrize("operator", [False, True])
def test_other_numbers_of_dimensions(
    lead: tuple[int, ...], operator: bool, masked: bool, canonical: Any, of: Any
) -> None:
    q, k, v = (torch.randn(*lead, size, D) for size in (S, T, T))
    mask = (torch.randn(*lead, S, T),) if masked else ()

    def written(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        return sum(mask, q @ k.mT * 0.25).softmax(-1) @ v

    def called(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, *mask, scale=0.25)

    batch, tokens = Dim("batch", min=2), Dim("tokens", min=2)
    shapes = tuple(
        {0: batch, len(lead): tokens} if t.shape[-2] == S else {0: batch} for t in (q, k, v, *mask)
    )
    found = canonical(of(called if operator else written), q, k, v, *mask, dynamic_shapes={"inputs": shapes})
    (attention,) = [n for n in found.program.graph.nodes if "scaled_dot" in str(n.target)]
    assert len(attention.meta["val"].shape) == 4


def test_added_biases(canonical: Any, of: Any) -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (a + q @ k.mT * 0.25 + b).softmax(-1) @ v

    found = canonical(of(biased), *qkv(), torch.randn(1, H, S, T), torch.randn(B, 1, 1, T))
    assert found.text == (
        "%0 = add.Tensor(inputs_3, inputs_4)\n"
        "%1 = scaled_dot_product_attention(inputs_0, inputs_1, inputs_2, %0, 0, False, "
        "scale=0.25, enable_gqa=False)\nreturn [%1]"
    )


MASKED: dict[str, Callable[..., Tensor]] = {
    "masked_fill": lambda q, k, v, keep: (q @ k.mT).masked_fill(~keep, LOW).softmax(-1) @ v,
    "masked_fill, -inf": lambda q, k, v, keep: (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v,
    "where": lambda q, k, v, keep: torch.where(keep, q @ k.mT, LOW).softmax(-1) @ v,
    "where a tensor": lambda q, k, v, keep: torch.where(keep, q @ k.mT, torch.full([], LOW)).softmax(-1) @ v,
    "added": lambda q, k, v, keep: (q @ k.mT + torch.where(keep, 0.0, LOW)).softmax(-1) @ v,
}


@pytest.mark.parametrize("spelling", MASKED)
def test_masks_written_out(spelling: str, canonical: Any, of: Any) -> None:
    keep = torch.rand(B, 1, S, T) > 0.4
    keep[..., 0] = True
    found = canonical(of(MASKED[spelling]), *qkv(), keep)
    assert found.text.count("scaled_dot_product_attention(") == 1
    assert "softmax" not in found.text
    assert "matmul" not in found.text


def test_a_row_without_keys_keeps_its_uniform_weights(canonical: Any, of: Any) -> None:
    keep = torch.zeros(B, 1, S, T, dtype=torch.bool)
    found = canonical(of(MASKED["masked_fill"]), *qkv(), keep)
    assert "scaled_dot_product_attention" in found.text


def test_a_bias_that_is_scaled_with_the_scores(canonical: Any, of: Any) -> None:
    found = canonical(
        of(lambda q, k, v, a: ((q @ k.mT + a) / 4.0).softmax(-1) @ v), *qkv(), torch.randn(H, S, T)
    )
    assert found.text.startswith("%0 = mul.Tensor(inputs_3, 0.25)\n%1 = scaled_dot_product_attention(")


MERGED: dict[str, Callable[..., Tensor]] = {
    "bmm": lambda q, k, a: torch.bmm(q, k) * 0.25 + a,
    "baddbmm": lambda q, k, a: torch.baddbmm(a, q, k, beta=1.0, alpha=0.25),
    "baddbmm, half the bias": lambda q, k, a: torch.baddbmm(a * 2, q, k, beta=0.5, alpha=0.25),
}


@pytest.mark.parametrize("spelling", MERGED)
def test_batch_and_heads_merged(spelling: str, canonical: Any, of: Any) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, a: Tensor, mask: Tensor) -> Tensor:
        three = [x.reshape(q.shape[0] * H, -1, D) for x in (q, k, v)]
        scores = MERGED[spelling](three[0], three[1].mT, a).view(q.shape[0], H, q.shape[2], -1)
        weights = (scores + mask).softmax(-1).view(three[0].shape[0], q.shape[2], -1)
        return torch.bmm(weights, three[2]).view(q.shape[0], H, q.shape[2], D)

    batch, queries, keys = Dim("batch", max=64), Dim("queries", max=64), Dim("keys", max=64)
    sizes = (
        {0: batch, 2: queries},
        {0: batch, 2: keys},
        {0: batch, 2: keys},
        {0: 4 * batch, 2: keys},
        {3: keys},
    )
    inputs = (*qkv(), torch.randn(B * H, 1, T), torch.randn(1, 1, 1, T))
    found = canonical(of(attend), *inputs, dynamic_shapes=(sizes,))
    assert "bmm" not in found.text
    assert "scale=0.25" in found.text


def test_a_merged_dimension_that_is_cut_elsewhere_stays(canonical: Any, of: Any) -> None:
    """`[B H, S, T]` seen as `[B, H S, T / 2, 2]` splits more than its first dimension."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.bmm(q, k.mT).view(B, S, 2 * H, 4).softmax(-1).view(B * H, S, 8)
        return torch.bmm(weights, v)

    found = canonical(
        of(attend), torch.randn(B * H, S, D), torch.randn(B * H, 8, D), torch.randn(B * H, 8, D)
    )
    assert found.text.count("bmm") == 2


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "weights returned": (
        lambda q, k, v: ((w := (q @ k.mT).softmax(-1)) @ v, w),
        "its weights are also read by something else than the product with the values",
    ),
    "scores returned": (
        lambda q, k, v: ((s := q @ k.mT * 0.5).softmax(-1) @ v, s),
        "the scores are also read by something else than the softmax",
    ),
    "soft cap": (
        lambda q, k, v: (torch.tanh(q @ k.mT / 30.0) * 30.0).softmax(-1) @ v,
        "the scores are soft-capped, which the operator cannot say",
    ),
    "scaled after the mask": (
        lambda q, k, v: (
            ((q @ k.mT).masked_fill(torch.ones(S, T, dtype=torch.bool).triu(1), LOW) * 0.5).softmax(-1) @ v
        ),
        "the scores are scaled after a mask was applied",
    ),
    "mild mask": (
        lambda q, k, v: (
            (q @ k.mT).masked_fill(torch.ones(S, T, dtype=torch.bool).triu(1), -10.0).softmax(-1) @ v
        ),
        "masked scores become -10, where a score still counts",
    ),
    "scaled by a tensor": (
        lambda q, k, v: (q @ k.mT * torch.arange(1.0, H + 1).view(1, H, 1, 1)).softmax(-1) @ v,
        "the scores are multiplied by a tensor",
    ),
    "another function": (
        lambda q, k, v: torch.relu(q @ k.mT).softmax(-1) @ v,
        "aten.relu.default stands between the product of queries and keys and the softmax",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, canonical: Any, of: Any) -> None:
    function, reason = REFUSED[case]
    found = canonical(of(function), *qkv())
    assert reason in found.refused
    assert "scaled_dot_product" not in found.text


def test_softmax_over_queries_is_no_attention(canonical: Any, of: Any) -> None:
    assert "scaled_dot" not in canonical(of(lambda q, k, v: (q @ k.mT).softmax(-2) @ v), *qkv()).text


def repeat_kv(x: Tensor, times: int) -> Tensor:
    b, heads, t, d = x.shape
    return x[:, :, None].expand(b, heads, times, t, d).reshape(b, heads * times, t, d)


GROUPED: dict[str, Callable[..., Tensor]] = {
    "expand": lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), scale=0.25),
    "repeat_interleave": lambda q, k, v: F.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, dim=1), scale=0.25
    ),
    "written out": lambda q, k, v: (q @ repeat_kv(k, 2).mT * 0.25).softmax(-1) @ repeat_kv(v, 2),
    "operator": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.25, enable_gqa=True),
}


@pytest.mark.parametrize("spelling", GROUPED)
def test_grouped_queries(spelling: str, canonical: Any, of: Any) -> None:
    found = canonical(of(GROUPED[spelling]), *qkv(heads=2))
    assert found.text == (
        "%0 = scaled_dot_product_attention(inputs_0, inputs_1, inputs_2, None, 0, False, "
        "scale=0.25, enable_gqa=True)\nreturn [%0]"
    )


def test_heads_repeated_behind_the_sequence(canonical: Any, of: Any) -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def repeated(x: Tensor) -> Tensor:
            b, t, heads, d = x.shape
            return x[:, :, :, None].expand(b, t, heads, 2, d).reshape(b, t, heads * 2, d).transpose(1, 2)

        return F.scaled_dot_product_attention(q, repeated(k), repeated(v), scale=0.25)

    q, k, v = qkv(heads=2)
    found = canonical(of(grouped), q, k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous())
    assert "enable_gqa=True" in found.text
    assert "expand" not in found.text


def test_one_head_for_all_queries(canonical: Any, of: Any) -> None:
    def shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.expand(B, H, T, D), v.expand(B, H, T, D))

    assert "inputs_1, inputs_2, None, 0, False" in (found := canonical(of(shared), *qkv(heads=1))).text
    assert "enable_gqa=True" in found.text


def test_one_head_that_broadcasts(canonical: Any, of: Any) -> None:
    found = canonical(of(lambda q, k, v: (q @ k.mT).softmax(-1) @ v), *qkv(heads=1))
    assert "inputs_2, None, 0, False, scale=1, enable_gqa=True" in found.text


def test_broadcasts_are_refused(canonical: Any, of: Any) -> None:
    q, k, v = qkv()
    batch = canonical(of(lambda q, k, v: (q @ k.mT).softmax(-1) @ v), q, k[:1], v[:1])
    assert batch.refused == ["queries, keys and values are broadcast against each other"]
    bias = canonical(
        of(lambda q, k, v, b: (q @ k.mT + b).softmax(-1) @ v), q[:1], k[:1], v[:1], torch.randn(3, H, S, T)
    )
    assert bias.refused == ["a bias or mask is larger than the scores it is added to"]


def test_repeated_blocks_are_refused(canonical: Any, of: Any) -> None:
    blocks = canonical(
        of(lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))),
        *qkv(heads=2),
    )
    assert blocks.refused == ["whole blocks of heads are repeated, so query head h reads key head h % groups"]
    q, k, v = qkv()
    uneven = canonical(
        of(lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k, 2), v)), q, k[:, :2], v
    )
    assert uneven.refused == ["keys and values are not repeated alike"]
    assert "enable_gqa=True" not in blocks.text + uneven.text


FREE = tuple({0: Dim("b", min=1, max=9), 2: Dim("s", min=1, max=99)} for _ in range(3))


def self_attention() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, H, S, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)


def positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[2])


CAUSAL: dict[str, Callable[[Tensor], Tensor]] = {
    "compare": lambda q: positions(q)[None, :] <= positions(q)[:, None],
    "tril": lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(),
    "not triu": lambda q: ~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1),
    "shifted": lambda q: positions(q) < positions(q).view(-1, 1) + 1,
    "expanded": lambda q: (positions(q) <= positions(q)[:, None])[None, None].expand(q.shape[0], -1, -1, -1),
    "gathered": lambda q: positions(q)[positions(q)][None] <= positions(q)[:, None],
    "and true": lambda q: (positions(q) <= positions(q)[:, None]) & (positions(q) >= 0),
}


@pytest.mark.parametrize("spelling", CAUSAL)
@pytest.mark.parametrize("additive", [False, True])
def test_causal_masks(spelling: str, additive: bool, canonical: Any, of: Any) -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = CAUSAL[spelling](q)
        if additive:
            return (q @ k.mT * 0.25 + torch.where(mask, 0.0, LOW)).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.25)

    found = canonical(of(causal), *self_attention(), dynamic_shapes=((*FREE,),))
    assert found.text == (
        "%0 = scaled_dot_product_attention(inputs_0, inputs_1, inputs_2, None, 0, True, "
        "scale=0.25, enable_gqa=False)\nreturn [%0]"
    )


def test_a_static_causal_buffer(canonical: Any, of: Any) -> None:
    def cut(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask.bool()[:, :, : q.shape[2], : q.shape[2]])

    triangle = torch.ones(1, 1, 16, 16).tril()
    found = canonical(of(cut, mask=triangle), *self_attention())
    assert ", None, 0, True," in found.text


NOT_CAUSAL: dict[str, Callable[[Tensor], Tensor]] = {
    "strict": lambda q: positions(q) < positions(q)[:, None],
    "reversed": lambda q: positions(q) >= positions(q)[:, None],
    "window": lambda q: (positions(q) <= positions(q)[:, None]) & (positions(q) > positions(q)[:, None] - 3),
    "one ahead": lambda q: positions(q) <= positions(q)[:, None] + 1,
}


@pytest.mark.parametrize("spelling", NOT_CAUSAL)
def test_other_masks_stay(spelling: str, canonical: Any, of: Any) -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, NOT_CAUSAL[spelling](q), scale=0.25)

    found = canonical(of(masked), *self_attention(), dynamic_shapes=((*FREE,),))
    assert "True, scale" not in found.text
    assert "None, 0, False" not in found.text


def test_a_window_is_rebuilt_without_copies(canonical: Any, of: Any) -> None:
    def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = NOT_CAUSAL["window"](q).expand(q.shape[0], H, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, mask)

    found = canonical(of(windowed), *self_attention(), dynamic_shapes=((*FREE,),))
    assert "expand" not in found.text
    assert found.text.count("le.Tensor(") == 2


def test_a_mask_that_is_always_true_goes(canonical: Any, of: Any) -> None:
    def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = (positions(q)[:, None] >= 0).expand(-1, q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, mask)

    assert ", None, 0, False," in canonical(of(nothing), *self_attention(), dynamic_shapes=((*FREE,),)).text


def test_a_padding_mask_loses_its_copies(canonical: Any, of: Any) -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = keep[:, None, None, :].expand(-1, 1, q.shape[2], -1) & (positions(q)[:, None] >= 0)
        return F.scaled_dot_product_attention(q, k, v, mask)

    keep = torch.rand(B, S) > 0.3
    keep[:, 0] = True
    free = (*FREE, {0: FREE[0][0], 1: FREE[0][2]})
    found = canonical(of(padded), *self_attention(), keep, dynamic_shapes=((*free,),))
    assert found.text.splitlines()[:2] == ["%0 = unsqueeze(inputs_3, 1)", "%1 = unsqueeze(%0, 2)"]
    assert "inputs_2, %1, 0, False" in found.text


def test_a_mask_with_an_offset_is_rebuilt(canonical: Any, of: Any) -> None:
    def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = (positions(q) <= positions(q)[:, None] + 2).expand(q.shape[0], H, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, mask)

    found = canonical(of(windowed), *self_attention(), dynamic_shapes=((*FREE,),))
    assert "expand" not in found.text
    assert "add.Tensor" in found.text
