"""Scales and shifts go into what writes the value where that is free; the rest stays for the edge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, relative_error, run_steps
from isofold.compiler.passes import PassReport
from isofold.compiler.program import Program
from isofold.compiler.recipe import ActivationFormat, Recipe, WeightFormat
from isofold.passes.fold_edges import absorb_into_norms, run_fold_edges
from isofold.passes.sites import EdgeTransform, find_sites
from isofold.passes.transform_edges import transform_edges

aten = torch.ops.aten
WIDTH = 32
RECIPE = Recipe(weights=WeightFormat(), activations=ActivationFormat(mode="dynamic"))
X = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))


class Feed(nn.Module):
    """Residual block: norm with a gain, two readers of it, a gated product."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.gate, self.up, self.down = (
            nn.Linear(WIDTH, 64),
            nn.Linear(WIDTH, 64),
            nn.Linear(64, WIDTH),
        )
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.last(x + self.down(F.silu(self.gate(y)) * self.up(y)))


class Grouped(nn.Module):
    """Four heads of queries on two heads of keys and values."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16)
        self.v, self.o = nn.Linear(WIDTH, 16, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


def program_of(module: nn.Module) -> Program:
    for index, parameter in enumerate(module.parameters()):
        if parameter.dim() == 1:
            with torch.no_grad():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                parameter.add_(0.3 * noise)
    return canonicalize(capture(module.eval(), (X,))).program


def vector(size: int, seed: int = 2) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def site_of(program: Program, path: str) -> str:
    """The name of the site that the linear of a module reads."""
    (found,) = (s.name for s in find_sites(program, RECIPE) if path in [r.path for r in s.readers])
    return found


def folded(
    program: Program, transforms: dict[str, EdgeTransform]
) -> tuple[Program, PassReport, dict[str, EdgeTransform]]:
    """After `fold_edges`, which must be an identity up to the rounding of constants."""
    result, rest = run_fold_edges(program, RECIPE, transforms)
    assert relative_error(program.run_float64(), result.program.run_float64()) < 1e-5
    assert set(rest) == set(transforms)
    return result.program, result.report, rest


def value_at(program: Program, name: str) -> Tensor:
    """What the readers of a site see, in float64."""
    site = next(s for s in find_sites(program, RECIPE) if s.name == name)

    class Tap(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            found = super().run_node(n)
            if n.name == site.value:
                seen.append(found)
            return found

    seen: list[Tensor] = []
    with torch.no_grad():
        Tap(program.graph_module).run(X, enable_io_processing=False)
    return seen[0].double()


def test_a_free_scale_goes_into_the_gain_of_a_norm() -> None:
    program = program_of(Feed(nn.RMSNorm(WIDTH)))
    site, scale = site_of(program, "gate"), vector(WIDTH).exp()
    after, report, rest = folded(program, {site: EdgeTransform(scale)})
    assert rest[site].is_identity
    assert rest[site].scale is None
    assert [a.what for a in report.applied] == ["its scale is folded into what writes it"]
    assert not report.refused
    gain = program.tensors["norm.weight"].double() / scale
    torch.testing.assert_close(after.tensors["norm.weight"].double(), gain, rtol=1e-6, atol=0)
    torch.testing.assert_close(value_at(after, site), value_at(program, site) / scale, rtol=1e-4, atol=1e-6)
    assert after.operator_count == program.operator_count


def test_a_free_shift_and_scale_go_into_gain_and_bias() -> None:
    program = program_of(Feed(nn.LayerNorm(WIDTH)))
    site, scale, shift = site_of(program, "up"), vector(WIDTH).exp(), vector(WIDTH, 3)
    after, report, rest = folded(program, {site: EdgeTransform(scale, shift)})
    assert rest[site].is_identity
    assert len(report.applied) == 2
    wanted = (value_at(program, site) - shift) / scale
    torch.testing.assert_close(value_at(after, site), wanted, rtol=1e-4, atol=1e-5)


def test_the_linear_factor_of_a_gated_product_takes_the_scale() -> None:
    program = program_of(Feed(nn.RMSNorm(WIDTH)))
    site, scale = site_of(program, "down"), vector(64).exp()
    after, _, rest = folded(program, {site: EdgeTransform(scale)})
    assert rest[site].is_identity
    assert torch.equal(after.tensors["gate.weight"], program.tensors["gate.weight"])
    wanted = program.tensors["up.weight"].double() / scale[:, None]
    torch.testing.assert_close(after.tensors["up.weight"].double(), wanted, rtol=1e-6, atol=0)


def test_grouped_queries_share_what_the_group_has_in_common() -> None:
    """Values are written once for two heads of queries: the geometric mean of their scales folds, the rest stays."""
    program = program_of(Grouped())
    site = site_of(program, "o")
    scale = vector(WIDTH).exp()
    after, report, rest = folded(program, {site: EdgeTransform(scale)})
    assert [a.what for a in report.applied] == ["its scale is folded into what writes it"]
    left = rest[site].scale
    assert left is not None
    shared = (scale / left).reshape(2, 2, 8)
    torch.testing.assert_close(shared[:, 0], shared[:, 1])
    torch.testing.assert_close(shared[:, 0].log(), scale.reshape(2, 2, 8).log().mean(1), rtol=1e-6, atol=1e-9)
    final = transform_edges(after, recipe=RECIPE, transforms=rest).program
    assert relative_error(program.run_float64(), final.run_float64()) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_a_scale_reaches_the_bias_that_a_shift_made(bias: bool) -> None:
    program = program_of(Grouped(bias=bias))
    site = site_of(program, "o")
    scale = vector(16).exp().reshape(2, 1, 8).expand(2, 2, 8).reshape(WIDTH)
    shift = vector(16, 3).reshape(2, 1, 8).expand(2, 2, 8).reshape(WIDTH)
    after, report, rest = folded(program, {site: EdgeTransform(scale, shift)})
    assert len(report.applied) == 2
    assert rest[site].is_identity
    wanted = (value_at(program, site) - shift) / scale
    torch.testing.assert_close(value_at(after, site), wanted, rtol=1e-4, atol=1e-5)


def test_grouped_queries_with_one_scale_leave_nothing() -> None:
    program = program_of(Grouped())
    site = site_of(program, "o")
    scale = vector(16).exp().reshape(2, 1, 8).expand(2, 2, 8).reshape(WIDTH)
    _, _, rest = folded(program, {site: EdgeTransform(scale)})
    assert rest[site].scale is None


def test_what_is_pinned_stays_on_the_edge_with_the_reason() -> None:
    program = program_of(Feed(nn.RMSNorm(WIDTH)))
    site, scale = site_of(program, "last"), vector(WIDTH).exp()
    after, report, rest = folded(program, {site: EdgeTransform(scale)})
    assert not report.applied
    (refused,) = report.refused
    assert refused.reason.startswith("the scale stays on the edge: ")
    assert rest[site].scale is scale
    for name, held in program.parameters.items():
        assert torch.equal(after.tensors[name], held)


def test_a_scale_waits_for_the_shift_in_front_of_it() -> None:
    """(x - z) / s with z on the edge: a producer that scaled x would change what z is subtracted from."""
    program = program_of(Feed(nn.RMSNorm(WIDTH)))
    site, scale, shift = site_of(program, "gate"), vector(WIDTH).exp(), vector(WIDTH, 3)
    after, report, rest = folded(program, {site: EdgeTransform(scale, shift)})
    (refused,) = report.refused
    assert refused.reason.startswith("the shift stays on the edge: ")
    assert "no bias" in refused.reason
    assert rest[site].scale is scale
    assert rest[site].shift is shift
    assert torch.equal(after.tensors["norm.weight"], program.tensors["norm.weight"])


def test_hadamard_transforms_are_left_for_the_edge() -> None:
    program = program_of(Feed(nn.RMSNorm(WIDTH)))
    site = site_of(program, "gate")
    _, _, rest = folded(program, {site: EdgeTransform(vector(WIDTH).exp(), hadamard=(32,))})
    assert rest[site].hadamard == (32,)
    assert rest[site].scale is None


def norms(program: Program) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if n.target in (aten.rms_norm.default, aten.layer_norm.default)]


def test_a_norm_without_a_gain_takes_the_edge_back() -> None:
    for norm, shift in ((nn.RMSNorm, None), (nn.LayerNorm, vector(WIDTH, 3))):
        program = program_of(Feed(norm(WIDTH, elementwise_affine=False)))
        transforms = {site_of(program, "gate"): EdgeTransform(vector(WIDTH).exp(), shift)}
        steps = [
            Step(transform_edges, {"recipe": RECIPE, "transforms": transforms}),
            Step(absorb_into_norms),
        ]
        after, (moved, absorbed) = run_steps(program, steps)
        assert moved.operators_after == program.operator_count + 1 + (shift is not None)
        assert absorbed.applied
        assert absorbed.error is not None
        assert absorbed.error < 1e-6
        assert after.operator_count == program.operator_count
        (node,) = norms(after)
        assert str(node.args[2]).endswith("gain")


def test_a_norm_that_others_read_keeps_the_edge() -> None:
    class Side(Feed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.norm(x)

    program = program_of(Side(nn.RMSNorm(WIDTH, elementwise_affine=False)))
    transforms = {site_of(program, "gate"): EdgeTransform(vector(WIDTH).exp())}
    moved = transform_edges(program, recipe=RECIPE, transforms=transforms).program
    result = absorb_into_norms(moved)
    assert not result.report.applied
    assert result.program.operator_count == moved.operator_count
