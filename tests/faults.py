"""Tasks that go wrong on purpose, for jobs in tests: ``task: {name: faults:DepthThatRaises}``."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from taskray.models.unet import UNet
from taskray.relations.depth_normals import DepthNormals
from taskray.relations.relation import Relation
from taskray.tasks.depth import Depth
from taskray.tasks.normals import Normals
from taskray.tasks.task import Task


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


class DepthWhoseLossIsATensor(Depth):
    """Its author forgot the name of the loss."""

    def loss(self, prediction, batch):  # type: ignore[no-untyped-def, override]
        return next(iter(super().loss(prediction, batch).values()))


class DepthWithALossPerFrame(Depth):
    """Its author forgot to average over the batch."""

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"l1": (prediction["depth"] - batch["depth"]).abs().mean(dim=(1, 2, 3))}


class NetworkForOneSize(UNet):
    """It can be built, and not used."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.nn.functional.linear(super().forward(image), torch.ones(2, 7))


class RelationThatIsATensor(DepthNormals):
    """Its author forgot the name of the term."""

    def __call__(self, predictions, batch):  # type: ignore[no-untyped-def, override]
        return next(iter(super().__call__(predictions, batch).values()))


class Nameless(Task):
    """A task that does not name its quantities."""

    labels = ("depth",)
    out_channels: Mapping[str, int] = {"depth": 1}

    def predict(self, output: Tensor) -> dict[str, Tensor]:
        return {"depth": output}

    def loss(
        self, prediction: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {}

    def metric(self) -> None:  # type: ignore[override]
        return None


class OneNamed(Depth):
    """Its author forgot the comma."""

    quantities = "depth"  # type: ignore[assignment]
