"""Tasks that go wrong on purpose, for jobs in tests: ``task: {name: faults:DepthThatRaises}``."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from taskray.relations.relation import Relation
from taskray.tasks.depth import Depth
from taskray.tasks.normals import Normals


class _FaultyDepth(Depth):
    """A fault that strikes after a number of supervised steps."""

    def __init__(self, at: int = 5) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        self.calls += 1
        terms = super().loss(prediction, batch)
        return self.strike(terms) if self.calls > self.at else terms

    def strike(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError


class DepthThatBecomesNaN(_FaultyDepth):
    def strike(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value * float("nan") for name, value in terms.items()}


class DepthThatRaises(_FaultyDepth):
    def strike(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        raise RuntimeError("the label store is on fire")


class SlowDepth(Depth):
    """Far slower than its peers: it sleeps in every forward pass."""

    def __init__(self, seconds: float = 0.3) -> None:
        super().__init__()
        self.seconds = seconds

    def predict(self, output: Tensor) -> dict[str, Tensor]:
        time.sleep(self.seconds)
        return super().predict(output)


class HalfSizeDepth(Depth):
    """Predicts at half the size of its frames."""

    def predict(self, output: Tensor) -> dict[str, Tensor]:
        return super().predict(output[:, :, ::2, ::2])


class OverflowingDepth(Depth):
    """Predicts values that float16 cannot hold: they reach the cache as infinity."""

    def predict(self, output: Tensor) -> dict[str, Tensor]:
        return {"depth": super().predict(output)["depth"] * 0 + 1e6}


class RaisingNormals(Normals):
    """Predicts nothing, ever."""

    def predict(self, output: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("out of normals")


class OfShapesAlone(Relation):
    """Ties segmentation to nothing but itself."""

    quantities = ("segmentation",)

    def __call__(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"zero": 0 * predictions["segmentation"].mean()}
