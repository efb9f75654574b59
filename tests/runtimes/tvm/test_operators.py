"""Every dialect operator against its PyTorch reference: the op library through its TVM host, and TVM's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isofold.compiler.capture import capture
from isofold.compiler.dialect import OPERATORS
from isofold.runtimes.tvm.check import run_operator
from isofold.runtimes.tvm.executor import Executor
from isofold.runtimes.tvm.rules import RULES
from isofold.runtimes.tvm.rules.dialect import DECODED

from ..onnx.operator_cases import cases
from ..onnx.test_functions import assert_close

CASES = list(cases())
LIBRARY = [case for case in CASES if case[0] not in DECODED]
OWN = [case for case in CASES if case[0] in DECODED]


def test_every_operator_has_a_lowering() -> None:
    assert {operator.overload for operator in OPERATORS.values()} <= set(RULES)


def test_every_operator_is_covered_here() -> None:
    assert {name for name, _, _ in (*LIBRARY, *OWN)} == set(OPERATORS)


@pytest.mark.parametrize(("name", "what", "arguments"), LIBRARY, ids=[f"{n}-{w}" for n, w, _ in LIBRARY])
def test_the_host_computes_the_reference(
    name: str, what: str, arguments: dict[str, Any], host: Executor
) -> None:
    expected = OPERATORS[name].reference(**arguments)
    like = list(expected) if isinstance(expected, tuple) else [expected]
    declared = OPERATORS[name].overload._schema.arguments
    given = {d.name: arguments.get(d.name, d.default_value) for d in declared}
    assert_close(name, arguments, run_operator(host, name, given, like))


class Uses(nn.Module):
    """All cases in one program: their tensors are inputs, so that nothing is computed ahead."""

    def __init__(self, uses: list[tuple[str, str, dict[str, Any]]]) -> None:
        super().__init__()
        self.uses = uses

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = list(tensors)
        results = []
        for name, _, arguments in self.uses:
            own = {k: rest.pop(0) if isinstance(v, Tensor) else v for k, v in arguments.items()}
            results.append(OPERATORS[name].overload(**own))
        return tuple(results)


def test_own_kernels_compute_the_reference(execute: Callable[..., Executor]) -> None:
    tensors = tuple(v for _, _, arguments in OWN for v in arguments.values() if isinstance(v, Tensor))
    executor = execute(capture(Uses(OWN), tensors, None, None))
    got = executor.run([t.numpy() for t in tensors])
    for (name, _, arguments), found in zip(OWN, got, strict=True):
        assert_close(name, arguments, [found])


def test_weights_are_decoded_once(execute: Callable[..., Executor]) -> None:
    """What depends on weights alone is computed by `prepare` when the executable is opened."""
    codes = torch.randint(-8, 8, (5, 6), dtype=torch.int8)

    class Decoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes, self.scale = nn.Buffer(codes), nn.Buffer(torch.rand(5, 1))

        def forward(self, x: Tensor) -> Tensor:
            weight = torch.ops.isofold.dequantize_weight(self.codes, self.scale, None, 0)
            return x @ weight.T

    from isofold.runtimes.tvm.lower import lower

    x = torch.randn(3, 6)
    program = capture(Decoded(), (x,), None, None)
    lowered = lower(program)
    assert lowered.prepared >= 1
    assert "dequantize_weight" in str(lowered.module["prepare"])
    assert "dequantize_weight" not in str(lowered.module["main"])
    torch.testing.assert_close(torch.from_numpy(execute(program).run([x.numpy()])[0]), program(x))
