"""The process of the prediction cache. It imports no torch, which takes long."""

from __future__ import annotations

from typing import Any

import ray

from taskray.exchange.cache import PredictionCache
from taskray.exchange.shared_memory import remove_leftovers
from taskray.exchange.transport import CacheTransport
from taskray.runtime.cache_link import get_object, object_store_bytes


class CacheActor(PredictionCache):
    """The prediction cache of one run, which keeps its predictions on this machine."""

    def __init__(self, run_id: str, **arguments: Any) -> None:
        remove_leftovers()  # of a run that was killed on this machine
        transport = CacheTransport(ray.put, get_object, object_store_bytes())
        transport.create(run_id)
        super().__init__(transport=transport, **arguments)
