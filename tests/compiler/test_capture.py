"""Capture: modules, exported programs and files; tied weights; errors with the user's line and what to try."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_map

from isofold.compiler.capture import capture
from isofold.compiler.errors import ArtefactError, CaptureError, InputError
from isofold.compiler.graph import module_path, source_line


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.table.weight
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.table(ids)))


IDS = torch.tensor([[1, 2, 3]])


def test_tied_weights_stay_one_tensor_with_two_readers() -> None:
    program = capture(Tied(), (IDS,))
    assert len(program.parameters) == 1
    (read,) = [n for n in program.graph.nodes if n.op == "get_attr"]
    assert len(read.users) == 2
    assert program.weight_bytes == 10 * 4 * 4


def test_the_module_keeps_its_mode_and_shares_its_memory() -> None:
    model = Tied()
    model.head.eval()
    program = capture(model, (IDS,))
    assert (model.training, model.head.training, model.dropout.training) == (True, False, True)
    (tensor,) = program.parameters.values()
    assert tensor.data_ptr() == model.table.weight.data_ptr()
    assert torch.equal(program(IDS), model.eval()(IDS))


def test_views_of_one_tensor_that_differ_stay_apart() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(4, 6)
            self.register_buffer("whole", whole)
            self.register_buffer("first", whole[:2])
            self.register_buffer("turned", whole.t())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.turned @ self.whole + (x @ self.first.t()).sum()

    model = Halves()
    x = torch.randn(3, 6)
    program = capture(model, (x,))
    assert len(program.parameters) == 3
    assert torch.allclose(program(x), model(x))


def test_exported_programs_and_files_bring_examples_and_dynamic_shapes(tmp_path: Path) -> None:
    exported = torch.export.export(
        Tied().eval(), (IDS.repeat(2, 1),), dynamic_shapes=({0: Dim("batch"), 1: Dim("length")},)
    )
    torch.export.save(exported, tmp_path / "model.pt2")
    for program in (capture(exported), capture(tmp_path / "model.pt2")):
        assert len(program.parameters) == 1
        assert program(torch.zeros(5, 7, dtype=torch.int64)).shape == (5, 7, 10)
        again = program.to_exported_program()
        assert again.module()(torch.zeros(6, 8, dtype=torch.int64)).shape == (6, 8, 10)
    assert capture(program) is program


def test_nodes_know_their_module_and_the_users_line() -> None:
    program = capture(Tied(), (IDS,))
    (node,) = [n for n in program.graph.nodes if n.target == torch.ops.aten.linear.default]
    assert module_path(node) == "head"
    line = source_line(node)
    assert line is not None
    assert line.startswith(__file__)
    assert line.endswith("return self.head(self.dropout(self.table(ids)))")


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


def test_a_data_dependent_branch_is_reported_with_its_line_and_what_to_try() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Branches(), (torch.ones(3),))
    assert caught.value.what.startswith("The model's control flow or shapes depend on the values of tensors")
    assert caught.value.where is not None
    assert Path(__file__).name in caught.value.where
    assert "torch.where / torch.cond" in str(caught.value)


def test_dynamic_shapes_that_do_not_hold_are_explained() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 6)

    with pytest.raises(CaptureError, match=r"declared dynamic shapes do not hold[\s\S]*try: "):
        capture(Fixed(), (torch.ones(3, 4),), dynamic_shapes=({0: Dim("rows", min=1, max=9)},))


def test_a_model_that_fails_is_reported_with_its_line() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(5)

    model = Broken()
    model.train()
    with pytest.raises(
        CaptureError, match=rf"torch.export could not trace the model\n  where: .*{Path(__file__).name}"
    ):
        capture(model, (torch.ones(3, 4),))
    assert model.training


def test_what_cannot_be_captured_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs example inputs[\s\S]*where: Tied[\s\S]*pass args="):
        capture(Tied())
    with pytest.raises(InputError, match=r"cannot be captured[\s\S]*got: int"):
        capture(3)  # type: ignore[arg-type] # the point of the test
    with pytest.raises(ArtefactError, match="no such file"):
        capture(tmp_path / "missing.pt2")


def test_one_tensor_given_twice_stays_two_inputs() -> None:
    class Difference(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - 2 * b

    x = torch.randn(3)
    program = capture(Difference(), (x, x))
    assert torch.equal(program(torch.ones(3), torch.zeros(3)), torch.ones(3))


def _decoder() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval()


def test_a_decoder_without_a_cache_is_asked_for_none() -> None:
    model, ids = _decoder(), torch.arange(6).reshape(1, 6)
    assert model.config.use_cache is True
    program = capture(model, kwargs={"input_ids": ids})
    assert model.config.use_cache is True
    found = program(input_ids=ids)
    assert list(found) == ["logits"]
    assert torch.allclose(found["logits"], model(ids).logits, atol=1e-6)


def test_a_cache_object_is_refused_with_what_to_do() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(_decoder(), kwargs={"input_ids": torch.arange(6).reshape(1, 6), "use_cache": True})
    assert str(caught.value).startswith("The model takes or returns an object that is no tensor")
    assert "DynamicCache" in str(caught.value)
    assert "examples/decode_with_coded_caches.py" in str(caught.value)


@pytest.mark.parametrize("inside", [False, True])
def test_exported_graphs_have_no_mode_to_switch(inside: bool) -> None:
    x = torch.randn(3, 4)
    source = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    exported = torch.export.export(source, (x,), dynamic_shapes=({0: Dim("rows")},)).module()
    with pytest.raises(NotImplementedError):
        exported.eval()
    model = nn.Sequential(exported, nn.Dropout(0.5)) if inside else exported
    before = [module.training for module in model.modules()]
    program = capture(model, (x,), dynamic_shapes=({0: Dim("rows")},))
    assert [module.training for module in model.modules()] == before
    more = torch.randn(7, 4)
    assert torch.equal(program(more), source(more))


class Counting(nn.Module):
    """Counts its calls; `averaging`: and subtracts a moving average of what it saw."""

    calls: Tensor
    mean: Tensor

    def __init__(self, averaging: bool) -> None:
        super().__init__()
        self.averaging = averaging
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if not self.averaging:
            return x * 2
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - self.mean


def test_a_state_that_results_depend_on_is_refused_and_a_counter_is_left_out() -> None:
    program = capture(Counting(averaging=False), (torch.ones(2, 3),))
    assert not program.parameters
    with pytest.raises(CaptureError) as caught:
        capture(Counting(averaging=True), (torch.ones(2, 3),))
    text = str(caught.value)
    assert "keeps a state" in text
    assert "got: mean" in text
    assert "test_capture.py" in text
    assert "forward(x, state)" in text


class Coded(Tensor):
    """A float tensor that is kept as codes and a scale, as quantizers make of parameters."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Tensor:
        made: Tensor = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)
        return made

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], _meta: None, _size: object, _stride: object) -> Tensor:
        return Coded(parts["codes"], parts["scale"])

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        plain = tree_map(lambda a: a.codes * a.scale if isinstance(a, Coded) else a, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


def test_parameters_made_of_codes_and_scales_that_ask_for_gradients() -> None:
    model = nn.Linear(4, 6)
    codes = torch.randint(-8, 8, (6, 4), dtype=torch.int8)
    model.weight = nn.Parameter(Coded(codes, torch.rand(6, 1)))
    x = torch.randn(3, 4)
    program = capture(model, (x,))
    assert model.weight.requires_grad
    assert {t.dtype for t in program.parameters.values()} == {torch.int8, torch.float32}
    torch.testing.assert_close(program(x), model(x))


def test_masks_of_torchs_transformer_layers_are_taken_as_given() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    example = torch.randn(2, 5, 8), nn.Transformer.generate_square_subsequent_mask(5)
    with torch.no_grad():
        torch.testing.assert_close(capture(model, example)(*example), model(*example))


def test_a_size_that_must_be_left_out_is_named() -> None:
    class Sliced(nn.Module):
        table: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, None] * x[:, None] + self.table[: x.shape[1], : x.shape[1]]

    with pytest.raises(CaptureError, match="max=15"):
        capture(Sliced(), (torch.randn(2, 5),), None, ({1: Dim("t", min=2, max=16)},))
