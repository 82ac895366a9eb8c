"""The promises of the exchange, in virtual time, over hundreds of random collectives."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtual_exchange import OLD_ANSWER, RealExchange
from virtual_time import FORWARD, Collective, Death, Member, Meter, Setting, unequal

COLLECTIVES = 300

random_collectives = settings(
    max_examples=COLLECTIVES,
    derandomize=True,  # the same ones in each run
    database=None,
    deadline=None,  # no wall clock
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
Members = dict[str, Member]


@st.composite
def settings_of_a_job(draw: st.DrawFn, on_stale: str = "skip") -> Setting:
    return Setting(
        window=draw(st.integers(1, 8)),
        visits=draw(st.integers(1, 4)),
        num_batches=draw(st.sampled_from([1, 3, 8, 20, 10**6])),  # the last one never repeats
        supervised_steps=draw(st.integers(1, 3)),
        consistency_steps=draw(st.integers(1, 3)),
        on_stale=on_stale,
        max_steps=draw(st.sampled_from([None, 0, 5])) if on_stale == "wait" else None,
    )


@st.composite
def deaths(draw: st.DrawFn, steps: int) -> tuple[Death, ...]:
    number = draw(st.sampled_from([0, 0, 0, 1, 2]))
    at = sorted(draw(st.lists(st.integers(0, steps), min_size=number, max_size=number)))
    seconds, lost = st.floats(0.01, 10), st.integers(0, 40)
    return tuple(Death(step, draw(seconds), draw(lost), draw(st.booleans())) for step in at)


@st.composite
def members_of_a_job(draw: st.DrawFn) -> Members:
    number = draw(st.integers(2, 4))
    return {f"task{i}": draw(a_member()) for i in range(number)}


@st.composite
def a_member(draw: st.DrawFn) -> Member:
    steps = draw(st.sampled_from([0, 20, 60, 120, 240]))  # 0: it is frozen
    return Member(
        seconds=0.1 * draw(st.floats(1, 10)),
        steps=steps,
        labelled=draw(st.sampled_from([True, True, False])),
        start=draw(st.sampled_from([0.0, 0.0, 0.0, 1.0, 10.0])),
        begin=draw(st.sampled_from([0, 0, 0, 30])),
        deaths=draw(deaths(steps)) if steps else (),
        stays=draw(st.booleans()) or steps == 0,
    )


def untold(member: Member) -> int:
    """Steps that a producer makes while an answer is used, and those that it had made and not told
    when it died."""
    meanwhile = math.ceil(OLD_ANSWER / member.seconds) + 1
    return meanwhile + (3 if member.deaths else 0)


def run(setting: Setting, members: Mapping[str, Member]) -> dict[str, Meter]:
    return Collective(RealExchange, setting, members).run()


@random_collectives
@given(settings_of_a_job(), members_of_a_job())
def test_every_task_ends_and_none_waits_until_its_patience_ends(
    setting: Setting, members: Members
) -> None:
    for meter in run(setting, members).values():
        assert meter.timeouts == 0


@random_collectives
@given(settings_of_a_job("wait"), members_of_a_job())
def test_no_task_waits_for_one_that_waits_for_it(setting: Setting, members: Members) -> None:
    for meter in run(setting, members).values():
        assert meter.timeouts == 0


@random_collectives
@given(settings_of_a_job(), members_of_a_job())
def test_a_task_with_labels_takes_as_long_as_it_takes_alone(
    setting: Setting, members: Members
) -> None:
    meters = run(setting, members)
    for name, member in members.items():
        if member.labelled:
            assert meters[name].waited == 0
            alone = run(setting, {name: member})[name]
            assert meters[name].seconds == pytest.approx(alone.seconds)


@random_collectives
@given(settings_of_a_job(), members_of_a_job())
def test_no_used_prediction_is_older_than_one_pass_of_its_producer_and_what_is_under_way(
    setting: Setting, members: Members
) -> None:
    for meter in run(setting, members).values():
        for use in meter.uses:
            assert use.at_use <= setting.bound(members[use.peer]) + untold(members[use.peer])


@pytest.mark.parametrize("ratio", [1, 2, 4, 10])
def test_predictions_of_unequal_tasks_are_at_most_one_pass_old(ratio: float) -> None:
    setting, members = Setting(skipped=FORWARD), unequal(ratio)
    meters = run(setting, members)
    assert meters["slow"].staleness("fast") <= setting.bound(members["fast"])
    assert meters["fast"].staleness("slow") <= setting.bound(members["slow"])


@pytest.mark.parametrize(
    ("ratio", "fast", "slow"), [(1, 0.95, 0.95), (2, 0.9, 0.95), (4, 0.8, 0.95), (10, 0.75, 0.9)]
)
def test_unequal_tasks_find_each_other_after_their_first_pass(
    ratio: float, fast: float, slow: float
) -> None:
    meters = run(Setting(skipped=FORWARD), unequal(ratio))
    assert meters["fast"].later_hit_rate >= fast
    assert meters["slow"].later_hit_rate >= slow
