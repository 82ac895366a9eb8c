"""Ray Data: a function mapped over pieces of work, in order.

This is the only file of ``data`` that imports Ray, and only when a function is called.

Three properties of Ray Data matter here. Every execution of a plan costs seconds, so a reader of
many passes starts the next one early (``source.StreamSource``). A plan hangs without a message if
actors hold every CPU, so the work is then requested without CPUs, two pieces at a time. The order
is kept only if ``preserve_order`` is set.
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
"""Maximum number of Ray tasks of a plan; each costs the driver about a millisecond."""

Arrays = dict[str, np.ndarray]
Work = Callable[[Any], Iterator[Any]]
"""Makes tables, or dicts of arrays ``[N, ...]``, of one JSON-able piece of work."""


def stream_tables(pieces: Sequence[Any], work: Work) -> Iterator[pa.Table]:
    """The results of ``work``, as tables in the order of the pieces."""
    yield from _plan(pieces, work).iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=1
    )


def stream_arrays(pieces: Sequence[Any], work: Work) -> Iterator[Arrays]:
    """The results of ``work``, as arrays in the order of the pieces."""
    yield from _plan(pieces, work).iter_batches(
        batch_size=None, batch_format="numpy", prefetch_batches=1
    )


def materialize_arrays(pieces: Sequence[Any], work: Work) -> list[ObjectRef[Arrays]]:
    """The results of ``work`` in the object store: one object for each block, in order.

    They belong to the calling process and live as long as it does. Every process reads them
    without a copy, and read-only.
    """
    import ray

    # ``Dataset.to_numpy_refs`` needs free CPUs, and twice the memory.
    return [ray.put(block) for block in stream_arrays(pieces, work)]


def fetch(blocks: Sequence[ObjectRef[Arrays]]) -> list[Arrays]:
    """The blocks of ``materialize_arrays``, read in any process of the cluster."""
    import ray

    return list(ray.get(list(blocks), timeout=600))


def application_error(error: BaseException) -> BaseException:
    """The error that ``work`` raised in a worker, without Ray's wrapping."""
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
    # Every execution logs its start, and logs long texts about errors that it also raises.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)

    def run(batch: Arrays) -> Iterator[Any]:
        for text in batch["piece"]:
            yield from work(json.loads(text))

    items = [{"piece": json.dumps(piece)} for piece in pieces]
    blocks = min(len(items), MOST_BLOCKS)
    free = ray.available_resources().get("CPU", 0)
    resources: dict[str, Any] = {"num_cpus": 1}
    if free < 1:
        # no more than there are blocks: Ray warns about a larger number
        pool = ray.data.TaskPoolStrategy(size=min(2, blocks))
        resources = {"num_cpus": 0, "compute": pool}
    return ray.data.from_items(items, override_num_blocks=blocks).map_batches(
        run, batch_size=1, batch_format="numpy", **resources
    )
