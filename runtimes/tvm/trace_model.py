"""How fast a schedule will be, from those of the same function that were measured: MetaSchedule's cost model here.

Every store of a lowered schedule has features (MetaSchedule's: arithmetic, vectors, strides, reuse). Kernel ridge
regression predicts the logarithm of the time from their largest values and sums; with the hundred measurements that
there may be, a few milliseconds of linear algebra, and no library beside NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

LEAST = 6
"""Measurements below which nothing is predicted."""
SLOWEST = 30.0
"""Times above this many times the default's are not told apart."""
RIDGE = 0.1
"""What is added to the kernel's diagonal: noise, against a spread of 1."""

Floats = NDArray[np.float64]


@derived_object
class Kinship(ms.cost_model.PyCostModel):
    """Schedules with similar features take similar times. measured: `(candidate, time against the default's)`."""

    def __init__(self, measured: Sequence[tuple[Any, float]], seed: int) -> None:
        super().__init__()
        self.measured = list(measured)
        self.random = np.random.default_rng(seed)
        self.fitted: Regression | None = None
        self.extractor = ms.feature_extractor.PerStoreFeature()

    def load(self, path: str) -> None:
        """Nothing is kept in files: measurements are in the tuning database."""

    def save(self, path: str) -> None:
        """As `load`."""

    def update(self, context: Any, candidates: Any, results: Any) -> None:
        """Results come with the next question."""

    def predict(self, context: Any, candidates: Any) -> Floats:
        """Speeds against the default's; random ones where too little was measured."""
        if self.fitted is None and len(self.measured) >= LEAST:
            times = np.array([time for _, time in self.measured])
            features = self.features(context, [candidate for candidate, _ in self.measured])
            self.fitted = Regression(features, np.log(np.minimum(times, SLOWEST)))
        if self.fitted is None:
            return self.random.random(len(candidates))
        return np.exp(-self.fitted(self.features(context, candidates)))

    def features(self, context: Any, candidates: Sequence[Any]) -> Floats:
        """`[candidates, 2 features]`: of all stores of a schedule the largest value and the sum."""
        rows = [tensor.numpy() for tensor in self.extractor.extract_from(context, list(candidates))]
        return np.array([np.concatenate([r.max(axis=0), r.sum(axis=0)]) for r in rows], np.float64)


class Regression:
    """Kernel ridge regression with a Gaussian kernel as wide as the median distance of what it has seen."""

    def __init__(self, features: Floats, values: Floats) -> None:
        self.centre, self.scale = features.mean(axis=0), features.std(axis=0)
        self.known = self._normal(features)
        self.mean = float(values.mean())
        distances = self._distances(self.known)
        self.width = float(np.median(distances)) or 1.0
        kernel = np.exp(-distances / self.width)
        spread = float(values.std()) or 1.0
        solved = np.linalg.solve(kernel + RIDGE * np.eye(len(values)), (values - self.mean) / spread)
        self.weights = spread * solved

    def __call__(self, features: Floats) -> Floats:
        near: Floats = np.exp(-self._distances(self._normal(features)) / self.width)
        return self.mean + near @ self.weights

    def _normal(self, features: Floats) -> Floats:
        normal: Floats = (features - self.centre) / np.where(self.scale > 0, self.scale, 1.0)
        return normal

    def _distances(self, features: Floats) -> Floats:
        """Squared, `[features, known]`."""
        found: Floats = ((features[:, None, :] - self.known[None, :, :]) ** 2).sum(axis=2)
        return found
