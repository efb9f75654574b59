"""Riemannian Adam on orthogonal matrices and positive scales, in plain torch.

The Stiefel manifold St(n, p) holds the matrices `[n, p]` with O^T O = I (p = n: the orthogonal group). With G the
Euclidean gradient, one step is

    R  = G - O sym(O^T G)                          projection of G to the tangent space at O
    m <- b1 m + (1 - b1) R,   v <- b2 v + (1 - b2) |R|^2       (v is one number a matrix)
    O <- qf(O - lr * m^ / (sqrt(v^) + eps))        m^, v^: corrected for the start at 0, as in Adam
    m <- m - O sym(O^T m)                          carried over to the new tangent space

(Becigneul and Ganea, arXiv 1810.00760; Absil, Mahony and Sepulchre, Optimization Algorithms on Matrix
Manifolds, ch. 4). One number for v, not one an entry, keeps the step a tangent vector. qf is the Q of the QR
decomposition whose R has a positive diagonal: without that sign columns would jump to their opposite. It is
computed in float64, so the result is orthogonal to the rounding of the parameter's dtype after any number of
steps.

Positive scales are stepped in their logarithm: s <- s exp(-lr * Adam(s G)), which stays positive. Groups choose
by `manifold`: `stiefel`, `positive` or `euclidean`. Learning rates are in `param_groups`, so torch's own
schedules (CosineAnnealingLR) apply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..compiler.errors import InputError

MANIFOLDS = ("stiefel", "positive", "euclidean")


class RiemannianAdam(torch.optim.Optimizer):
    """Adam for parameters of which some are orthogonal and some positive.

    params: groups as torch's optimizers take them; `manifold` in a group (default `stiefel`) names its kind.
    A `stiefel` parameter is `[..., n, p]` with n >= p and orthonormal columns. Raises InputError where a
    parameter does not lie on its manifold at the start, or the manifold is unknown.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        manifold: str = "stiefel",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "manifold": manifold})
        for group in self.param_groups:
            for parameter in group["params"]:
                _check(parameter, group["manifold"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, manifold, (b1, b2) = self.state[parameter], group["manifold"], group["betas"]
        point, g = parameter.detach().double(), gradient.double()
        if manifold == "stiefel":
            g = to_tangent(point, g)
            square = g.square().sum((-2, -1), keepdim=True)
        else:
            g = g * point if manifold == "positive" else g
            square = g.square()
        if not state:
            state.update(steps=0, mean=torch.zeros_like(g), square=torch.zeros_like(square))
        state["steps"] += 1
        mean = state["mean"].mul_(b1).add_(g, alpha=1 - b1)
        state["square"].mul_(b2).add_(square, alpha=1 - b2)
        steps = state["steps"]
        norm = (state["square"] / (1 - b2**steps)).sqrt() + group["eps"]
        move = mean / (1 - b1**steps) / norm * -group["lr"]
        if manifold == "stiefel":
            point = retract(point, move)
            state["mean"] = to_tangent(point, mean)
        else:
            point = point * move.exp() if manifold == "positive" else point + move
        parameter.copy_(point)


def to_tangent(point: Tensor, vector: Tensor) -> Tensor:
    """The part of `vector` tangent to the Stiefel manifold at `point`, both `[..., n, p]`: V - O sym(O^T V)."""
    inner = point.mT @ vector
    return vector - point @ (inner + inner.mT) / 2


def retract(point: Tensor, move: Tensor) -> Tensor:
    """The orthonormal factor of `point + move`, with the sign that leaves an unmoved point where it is."""
    q, r = torch.linalg.qr(point + move)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q)
    return q * signs.unsqueeze(-2)


def orthogonality_error(matrix: Tensor) -> float:
    """Largest entry of `O^T O - I`, computed in float64."""
    m = matrix.detach().double()
    return float((m.mT @ m - torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)).abs().max())


def _check(parameter: Tensor, manifold: str) -> None:
    if manifold not in MANIFOLDS:
        raise InputError("Unknown manifold", expected=" | ".join(MANIFOLDS), got=repr(manifold))
    sizes = list(parameter.shape)
    if manifold == "stiefel" and (
        len(sizes) < 2 or sizes[-2] < sizes[-1] or orthogonality_error(parameter) > 1e-4
    ):
        raise InputError(
            "A parameter's columns are not orthonormal", expected="[..., n, p], n >= p", got=str(sizes)
        )
    if manifold == "positive" and float(parameter.detach().min()) <= 0:
        raise InputError(
            "A parameter of positive scales is not positive", got=f"least {float(parameter.detach().min())}"
        )
