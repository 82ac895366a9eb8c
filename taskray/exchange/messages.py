"""The messages between tasks and the prediction cache."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from taskray.data.streams.order import START, Place
from taskray.exchange.staleness import Version


@dataclass(frozen=True)
class Announcement:
    """A task joins the collective, comes back from its checkpoint, or has ended."""

    task: str
    quantities: tuple[str, ...]
    """What it publishes on the mediator."""
    step: int = 0
    place: Place | None = None
    """Where it is in the mediator's order; None before its first mediator batch."""
    trains: bool = True
    """Whether it visits the mediator by itself, so that peers may wait for it."""
    steps_per_visit: float = 1.0
    """Its training steps for one visit of the mediator."""
    on_demand: Any = None
    """The handle that predicts for peers when they ask; None: it publishes at its own visits."""


class Welcome(NamedTuple):
    """The cache answers an announcement."""

    window: int
    """The mediator window to be in."""
    host: str
    """Where the cache keeps predictions (``transport.Transport.join``)."""


@dataclass(frozen=True)
class Made:
    """A prediction that a task has made on one mediator batch."""

    batch: int
    place: Place
    step: int
    """Of the task, when it predicted."""
    arrays: Mapping[str, np.ndarray]
    produced_at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Publication:
    """A task's prediction on one mediator batch, on its way to the cache."""

    task: str
    batch: int
    place: Place
    step: int
    """Of the task, when it predicted."""
    token: Any
    """The arrays by quantity, as the transport carries them."""
    produced_at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Question:
    """A task asks for its peers' predictions of these quantities on a mediator batch."""

    consumer: str
    quantities: tuple[str, ...]
    batch: int
    place: Place = START
    step: int = 0
    """The step that the task is at."""
    blocks_on_miss: bool = False
    """Whether the task has nothing else to do than to wait for a peer's first prediction."""


@dataclass(frozen=True)
class Found:
    """One peer's answer: a usable prediction, or the reason why there is none."""

    quantities: tuple[str, ...]
    """What the peer publishes."""
    trains: bool = True
    """Whether the peer still changes."""
    miss: str | None = None
    """``absent``, ``stale``, or ``unavailable`` (its bytes are lost); None where the prediction may
    be used."""
    version: Version | None = None
    staleness_steps: int = 0
    token: Any = None
    """Of the arrays; only where the prediction is the newest of one of the quantities."""
    on_demand: Any = None
    """The handle to ask for a prediction; None where the peer publishes by itself."""
    bound: int | None = None
    """The largest staleness, in the peer's steps, that the window lets through."""


@dataclass(frozen=True)
class Answer:
    """What the cache answers: the window to be in, and what each peer has on the batch."""

    window: int = 0
    found: Mapping[str, Found] = field(default_factory=dict)
    newest: Mapping[str, str] = field(default_factory=dict)
    """Quantity -> the task with its newest usable prediction."""
    refused: tuple[str, ...] = ()
    """Why predictions that came with the question were refused."""
