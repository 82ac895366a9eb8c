"""Collectives in virtual time: fake tasks that ask, predict and train by the job's alternation.

::

    clock ──wakes──▶ FakeTask.life:  ask one step ahead · forward · publish · use · train
                        │    ▲
                        ▼    │
                     Exchange (an adapter: the real cache, the real order of visits)

There are no threads, no Ray, no wall clock and no network: a step is a number of virtual seconds,
and a call to the exchange takes none. So a run of thousands of steps takes a fraction of a second
and is the same each time. This file knows the exchange by the protocols below alone.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FORWARD = 0.45
"""Share of a training step that its forward pass takes."""
MAX_EVENTS = 2_000_000
"""Beyond this a collective counts as one that does not end."""


# ---- what is simulated ------------------------------------------------------------------------


@dataclass(frozen=True)
class Death:
    """A task dies in the middle of step ``step``, and comes back from a checkpoint."""

    step: int
    away: float = 1.0
    """Seconds until it is back."""
    lost: int = 0
    """Steps between the checkpoint and the death."""
    published: bool = True
    """Whether it dies after it has predicted, or before."""


@dataclass(frozen=True)
class Member:
    """One fake task. A frozen task is one with ``steps`` 0: it never trains and stays."""

    seconds: float = 0.1
    """Of one training step."""
    steps: int = 100
    labelled: bool = True
    start: float = 0.0
    """When it joins, in seconds."""
    begin: int = 0
    """The step at which its relations begin. Of no effect without labels."""
    deaths: tuple[Death, ...] = ()
    """By rising step."""
    stays: bool = True
    """Whether it answers its peers after its last step, or leaves."""
    jitter: float = 0.15
    """Spread of the time that its steps take."""


@dataclass(frozen=True)
class Setting:
    """What all members of a collective share: the mediator, its order and the bound."""

    window: int = 16
    visits: int = 4
    num_batches: int = 10**6
    supervised_steps: int = 1
    consistency_steps: int = 1
    on_stale: Literal["skip", "wait"] = "skip"
    max_steps: int | None = None
    wait_seconds: float = 60.0
    skipped: float = 1.0
    """Share of a training step that a consistency step without any peer takes."""

    @property
    def size(self) -> int:
        """Batches in a full window."""
        return min(self.window, self.num_batches)

    def is_consistency_step(self, member: Member, step: int) -> bool:
        """The alternation, as ``Trainer.is_consistency_step`` has it."""
        if not member.labelled:
            return True
        turn = step % (self.supervised_steps + self.consistency_steps)
        return step >= member.begin and turn >= self.supervised_steps

    def bound(self, producer: Member) -> int:
        """How many of its producer's training steps old a used prediction may be: one pass over
        the window and the two visits that are under way."""
        visits = self.size + 2
        if not producer.labelled:
            return visits
        return math.ceil(visits / self.consistency_steps) * self.supervised_steps + visits


# ---- the exchange, as the fake tasks know it --------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A mediator batch that a stream has given."""

    window: int
    id: int
    batch: Any
    """As the real stream gives it."""


@dataclass(frozen=True)
class Made:
    """A prediction: which task made it, on what, at which of its steps."""

    task: str
    drawn: Drawn
    step: int
    at: float


@dataclass(frozen=True)
class Reply:
    """The answer to a question."""

    made_at: Mapping[str, float]
    """By peer whose prediction may be used: when the peer made it."""
    missing: frozenset[str] = frozenset()
    """Peers of which no prediction may be used."""
    goal: Any = None
    """What the stream is to follow."""


class Stream(Protocol):
    """A mediator stream with its batches assembled ahead, but without its thread."""

    def next(self) -> Drawn: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def follow(self, goal: Any) -> None:
        """Take what the last reply said of where the collective is."""
        ...


class Exchange(Protocol):
    """The cache of a collective and the streams of its members."""

    def sends_now(self, task: str) -> bool:
        """Whether a prediction is sent as soon as it is made. If not, it goes with the next
        question, unless the task is waiting for an answer."""
        ...

    def stream(self) -> Stream: ...

    def announce(self, task: str, step: int, stream: Stream) -> None: ...

    def ask(
        self,
        task: str,
        publications: list[Made],
        drawn: Drawn,
        now: int,
        use: int,
        reply: Callable[[Reply], None],
    ) -> None:
        """``reply`` is called at once, or when that which is waited for arrives."""
        ...

    def publish(self, made: Made) -> None: ...

    def asks_again(self, seconds: float) -> bool:
        """Whether an answer that is so old is asked for again before it is used."""
        ...

    def progress(self, task: str, step: int) -> None: ...

    def expire(self, task: str) -> None:
        """The task has waited for long enough: it is answered with what there is."""
        ...

    def lose(self, task: str) -> None:
        """The process of the task has died: its question is void."""
        ...

    def retire(self, task: str, stays: bool) -> None:
        """The task has ended; ``stays``: it predicts when a peer asks."""
        ...


# ---- meters -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """One prediction of a peer that was used, and how many steps its producer had made since:
    when the question was answered, and when the answer was used."""

    peer: str
    at_answer: int
    at_use: int


@dataclass
class Meter:
    """What one task did."""

    started: float = math.nan
    ended: float = math.nan
    supervised: int = 0
    consistency: int = 0
    skipped: int = 0
    waited: float = 0.0
    """Seconds in which it could not go on."""
    timeouts: int = 0
    uses: list[Use] = field(default_factory=list)
    visits: dict[tuple[int, int], int] = field(default_factory=dict)
    """How often it has come to each batch of each window."""
    look_ups: int = 0
    hits: int = 0
    later_look_ups: int = 0
    """Of those: on a batch that the task had visited in this window before."""
    later_hits: int = 0

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return self.ended - self.started

    @property
    def hit_rate(self) -> float:
        return self.hits / self.look_ups if self.look_ups else math.nan

    @property
    def later_hit_rate(self) -> float:
        """After the task's own first pass over each window."""
        return self.later_hits / self.later_look_ups if self.later_look_ups else math.nan

    def staleness(self, peer: str) -> int:
        """The largest of what was used of a peer, in the peer's steps."""
        return max((use.at_use for use in self.uses if use.peer == peer), default=0)

    def count(self, drawn: Drawn, reply: Reply, uses: list[Use]) -> None:
        """Take one consistency step into the counts."""
        place = drawn.window, drawn.id
        hits, look_ups = len(uses), len(uses) + len(reply.missing)
        self.hits, self.look_ups = self.hits + hits, self.look_ups + look_ups
        if place in self.visits:
            self.later_hits += hits
            self.later_look_ups += look_ups
        self.visits[place] = self.visits.get(place, 0) + 1
        self.uses += uses
        self.consistency += 1
        self.skipped += not uses


# ---- events -----------------------------------------------------------------------------------


class Clock:
    """Virtual seconds, and what is to happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()  # events of one time happen in the order they were set

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._number), event))

    def run(self) -> None:
        """All events, and those that they set off, until there is none left."""
        for _ in range(MAX_EVENTS):
            if not self._events:
                return
            self.now, _, event = heapq.heappop(self._events)
            event()
        raise AssertionError(f"no end after {MAX_EVENTS} events")


class FakeTask:
    """One member: ``life`` yields the seconds until it goes on, None where it waits for a reply."""

    def __init__(self, name: str, member: Member, collective: Collective, seed: int) -> None:
        self.name, self.member, self.collective = name, member, collective
        self.setting, self.exchange = collective.setting, collective.exchange
        self.random = random.Random(f"{seed} {name}")  # of its own, so that it is slowed by none
        self.meter = Meter()
        self.step = 0
        self._stream = self.exchange.stream()
        self._states = [self._stream.state_dict()]  # the position before each step
        self._drawn: Drawn | None = None  # what the peers are asked about
        self._before: dict[str, Any] = {}  # the position before it was drawn
        self._reply: Reply | None = None
        self._ages: dict[str, int] = {}  # of the predictions in the reply, when it came
        self._replied_at = 0.0
        self.steps_ever = 0  # made, those that it repeats after a death included
        self._steps_at: dict[float, int] = {}  # when a prediction was made -> steps_ever
        self._outbox: list[Made] = []
        self._published = self._told = 0
        self._question = 0
        self._is_blocked = False
        self._deaths = list(member.deaths)
        self._life = self.life()

    def resume(self) -> None:
        """Go on with its life until it has to wait."""
        for pause in self._life:
            if pause is not None:
                self.collective.clock.after(pause, self.resume)
            return

    def life(self) -> Iterator[float | None]:
        yield self.member.start
        clock = self.collective.clock
        self.meter.started = clock.now
        self.exchange.announce(self.name, self.step, self._stream)
        while self.step < self.member.steps:
            spread = self.member.jitter * (2 * self.random.random() - 1)
            cost = self.member.seconds * (1 + spread)
            death = self._death()
            use = self.step if self._is_consistency(self.step) else self.step + 1
            if self._drawn is None and self._is_consistency(use):
                self._ask(use)
            if not self._is_consistency(self.step):
                yield cost
                if death is not None:
                    yield from self._die(death)
                    continue
                self.meter.supervised += 1
            else:
                yield cost * FORWARD
                if death is not None and not death.published:
                    yield from self._die(death)
                    continue
                drawn, self._drawn = self._drawn, None
                assert drawn is not None
                self._publish(Made(self.name, drawn, self.step, clock.now))
                if death is not None:
                    yield from self._die(death)
                    continue
                yield from self._wait_for_reply()
                share = 1.0 if self._consume(drawn) else max(FORWARD, self.setting.skipped)
                yield cost * (share - FORWARD)
            self.step += 1
            self.steps_ever += 1
            self._tell()
            self._save()
        for made in self._outbox:
            self.exchange.publish(made)
        self.exchange.retire(self.name, self.member.stays)
        self.meter.ended = clock.now

    def _is_consistency(self, step: int) -> bool:
        return self.setting.is_consistency_step(self.member, step)

    def _ask(self, use: int) -> None:
        self._before = self._stream.state_dict()
        self._drawn = self._stream.next()
        self._send_question(self._drawn, use)

    def _send_question(self, drawn: Drawn, use: int) -> None:
        self._reply = None
        self._question += 1
        self._told = self.step
        number, outbox, self._outbox = self._question, self._outbox, []

        def take(reply: Reply) -> None:
            if number != self._question:  # it has died since
                return
            tasks = self.collective.tasks
            self._ages = {t: tasks[t].age_of(made_at) for t, made_at in reply.made_at.items()}
            self._reply, self._replied_at = reply, self.collective.clock.now
            if self._is_blocked:
                self._is_blocked = False
                self.collective.clock.after(0.0, self.resume)

        self.exchange.ask(self.name, outbox, drawn, self.step, use, take)

    def age_of(self, made_at: float) -> int:
        """The steps that this task has made since it made a prediction."""
        return self.steps_ever - self._steps_at.get(made_at, self.steps_ever)

    def _publish(self, made: Made) -> None:
        self._steps_at[made.at] = self.steps_ever
        if self._reply is None or self.exchange.sends_now(self.name):
            self.exchange.publish(made)
        else:
            self._outbox.append(made)
        self._published = self.step

    def _wait_for_reply(self) -> Iterator[float | None]:
        if self._reply is not None:
            return
        clock, question = self.collective.clock, self._question
        since = clock.now

        def expire() -> None:
            if self._is_blocked and self._question == question:
                self.meter.timeouts += 1
                self.exchange.expire(self.name)

        self._is_blocked = True
        clock.after(self.setting.wait_seconds, expire)
        yield None
        self.meter.waited += clock.now - since

    def _consume(self, drawn: Drawn) -> bool:
        """Use what was found; returns whether there was a prediction of any peer."""
        if self.exchange.asks_again(self.collective.clock.now - self._replied_at):
            self._send_question(drawn, self.step)
        reply, self._reply = self._reply, None
        assert reply is not None
        tasks = self.collective.tasks
        uses = [
            Use(peer, self._ages[peer], tasks[peer].age_of(made_at))
            for peer, made_at in reply.made_at.items()
        ]
        self.meter.count(drawn, reply, uses)
        self._stream.follow(reply.goal)
        if self._is_consistency(self.step + 1):
            self._ask(self.step + 1)
        return bool(uses)

    def _tell(self) -> None:
        """What no question takes along, as ``CachePeers.stepped`` does."""
        if self._outbox and self._published < self.step - 2:
            for made in self._outbox:
                self.exchange.publish(made)
            self._outbox = []
        if self._told < self.step - 2:
            self._told = self.step
            self.exchange.progress(self.name, self.step)

    def _save(self) -> None:
        drawn_ahead = self._drawn is not None
        self._states.append(self._before if drawn_ahead else self._stream.state_dict())

    def _death(self) -> Death | None:
        if self._deaths and self._deaths[0].step <= self.step:
            return self._deaths.pop(0)
        return None

    def _die(self, death: Death) -> Iterator[float]:
        """Lose what was not sent, and come back from an older step."""
        self.exchange.lose(self.name)
        self._question += 1
        self._drawn = self._reply = None
        self._outbox = []
        yield death.away
        self.step = max(0, self.step - death.lost)
        del self._states[self.step + 1 :]
        self._published = self._told = self.step
        self._stream.load_state_dict(self._states[self.step])
        self.exchange.announce(self.name, self.step, self._stream)


class Collective:
    """Members over one exchange. ``run`` gives what each of them did."""

    def __init__(
        self,
        make_exchange: Callable[[Setting, Mapping[str, Member], Clock], Exchange],
        setting: Setting,
        members: Mapping[str, Member],
        seed: int = 0,
    ) -> None:
        self.clock, self.setting, self.members = Clock(), setting, dict(members)
        self.exchange = make_exchange(setting, members, self.clock)
        self.tasks = {name: FakeTask(name, m, self, seed) for name, m in members.items()}

    def run(self) -> dict[str, Meter]:
        """Raises AssertionError where nothing happens any more and a task has not ended."""
        for task in self.tasks.values():
            task.resume()
        self.clock.run()
        stuck = [
            f"{n} at step {t.step}" for n, t in self.tasks.items() if math.isnan(t.meter.ended)
        ]
        assert not stuck, f"deadlock: {', '.join(stuck)}"
        return {name: task.meter for name, task in self.tasks.items()}


# ---- the table --------------------------------------------------------------------------------


def unequal(ratio: float, steps: int = 800) -> dict[str, Member]:
    """Two tasks with labels that end at about the same time, one ``ratio`` times as fast."""
    num_fast = max(2000, round(steps * ratio))
    slow = Member(seconds=0.1 * ratio, steps=round(num_fast / ratio))
    return {"fast": Member(seconds=0.1, steps=num_fast), "slow": slow}


def table(make_exchange: Callable[..., Exchange], ratios: tuple[float, ...] = (1, 2, 4, 10)) -> str:
    """Hit rates and the largest staleness by ratio of speeds, as Markdown."""
    setting = Setting(skipped=FORWARD)
    rows = [
        "| speeds | fast: hits, after its first pass, skipped | slow: the same "
        "| slow of fast, at use | fast of slow, at use | bound |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for ratio in ratios:
        members = unequal(ratio)
        meters = Collective(make_exchange, setting, members).run()
        hits = [
            f"{m.hit_rate:.2f}, {m.later_hit_rate:.2f}, {m.skipped}/{m.consistency}"
            for m in meters.values()
        ]
        stale = [
            str(meters[consumer].staleness(producer))
            for consumer, producer in (("slow", "fast"), ("fast", "slow"))
        ]
        bound = setting.bound(members["fast"])
        rows.append(f"| 1 : {ratio:g} | {' | '.join(hits)} | {' | '.join(stale)} | {bound} |")
    return "\n".join(rows)
