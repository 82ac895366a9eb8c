"""Ray Data, as far as taskray needs it: a function mapped over pieces of work, in order.

This is the only file of the room that touches Ray, and it imports it when called.

Three facts shape it. Every execution of a plan costs seconds, so whoever reads pass after pass
starts the next one early (``source.StreamSource``). A plan hangs, silently, when actors hold
every CPU; so work is then asked for without CPUs, a little at a time. And order is not kept
unless one asks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.data import Dataset

    Block = ObjectRef["Arrays"]

MOST_BLOCKS = 256
"""Into how many tasks a plan is cut at most; each costs the driver about a millisecond."""

Arrays = dict[str, np.ndarray]
Work = Callable[[Any], Iterator[Any]]
"""Makes tables, or dicts of arrays ``[N, ...]``, of one JSON-able piece of work."""


def stream_tables(pieces: Sequence[Any], work: Work) -> Iterator[pa.Table]:
    """What ``work`` makes of the pieces, as tables in the order of the pieces."""
    yield from _plan(pieces, work).iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=1
    )


def stream_arrays(pieces: Sequence[Any], work: Work) -> Iterator[Arrays]:
    """What ``work`` makes of the pieces, as arrays in the order of the pieces."""
    yield from _plan(pieces, work).iter_batches(
        batch_size=None, batch_format="numpy", prefetch_batches=1
    )


def materialize_arrays(pieces: Sequence[Any], work: Work) -> list[ObjectRef[Arrays]]:
    """The same, held in the object store: one object for each block, in order.

    They belong to the calling process and live as long as it does. Whoever gets one reads it
    without a copy, and read-only.
    """
    import ray

    # ``Dataset.to_numpy_refs`` would need free CPUs, and twice the memory.
    return [ray.put(block) for block in stream_arrays(pieces, work)]


def fetch(blocks: Sequence[ObjectRef[Arrays]]) -> list[Arrays]:
    """The blocks that ``materialize_arrays`` holds, from any process of the cluster."""
    import ray

    return list(ray.get(list(blocks), timeout=600))


def application_error(error: BaseException) -> BaseException:
    """The error that ``work`` raised in a worker, out of Ray's wrapping."""
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None) or seen.__cause__
        if not isinstance(cause, BaseException):
            return seen
        seen = cause
    return error


def _plan(pieces: Sequence[Any], work: Work) -> Dataset:
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    # Every execution announces itself, and prints pages about errors that it raises as well.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)

    def run(batch: Arrays) -> Iterator[Any]:
        for text in batch["piece"]:
            yield from work(json.loads(text))

    items = [{"piece": json.dumps(piece)} for piece in pieces]
    free = ray.available_resources().get("CPU", 0)
    resources: dict[str, Any] = {"num_cpus": 1}
    if free < 1:
        resources = {"num_cpus": 0, "compute": ray.data.TaskPoolStrategy(size=2)}
    blocks = min(len(items), MOST_BLOCKS)
    return ray.data.from_items(items, override_num_blocks=blocks).map_batches(
        run, batch_size=1, batch_format="numpy", **resources
    )
