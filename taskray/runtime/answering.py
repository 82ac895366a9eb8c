"""Predicting for peers that ask: the one way in which frozen and finished tasks, and forward
servers, fill the cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from taskray.data.streams.batch import Batch
from taskray.data.streams.order import Place
from taskray.exchange.arrays import to_arrays
from taskray.exchange.messages import Made
from taskray.loop.network import Network, frames_of

RECENT = 4
"""Publications that are remembered: peers come to a batch together, and all ask."""


@dataclass(frozen=True)
class Request:
    """A peer asks for a prediction on a mediator batch."""

    batch: int
    place: Place
    cached: int | None
    """The producer's step of the prediction in the cache; None where a new one is needed."""


class Answering:
    """Predicts with a network that does not train here.

    Args:
        task: name of the task.
        network: with the weights of ``step``.
        published: the quantities that peers need.
        dtype: of the arrays that travel.
        publish: hands a prediction to the cache; returns the reason of a refusal.
        reuse: keep a cached prediction of the same weights (else predict again).
    """

    def __init__(
        self,
        task: str,
        network: Network,
        published: Sequence[str],
        dtype: str,
        publish: Callable[[Made], str | None],
        reuse: bool = True,
    ) -> None:
        self.task, self.network, self.published = task, network, tuple(published)
        self.dtype, self.publish, self.reuse = dtype, publish, reuse
        self.forward_passes = 0
        self._recent: OrderedDict[tuple[int, int, int], dict[str, np.ndarray]] = OrderedDict()

    def predict_for(
        self, request: Request, inputs: Mapping[str, np.ndarray], step: int
    ) -> str | None:
        """Put a prediction on the batch into the cache, unless the one there comes from weights as
        new as those of ``step``. ``inputs``: the batch's columns. Returns why not."""
        if self.reuse and request.cached is not None and request.cached >= step:
            return None
        key = (request.batch, request.place.window, step)
        arrays = self._recent.get(key) if self.reuse else None
        if arrays is None:
            tensors = {k: torch.from_numpy(v.copy()) for k, v in inputs.items()}
            batch = Batch(tensors, request.batch, request.place)
            prediction = self.network.infer(batch, frames_of(self.network.task, self.published))
            self.forward_passes += 1
            arrays = to_arrays({q: prediction[q] for q in self.published}, self.dtype)
            self._recent[key] = arrays
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        return self.publish(Made(request.batch, request.place, step, arrays))
