"""Names of metrics: what is built is parsed back, and the names are those of the run folder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskray.loop.metric_key import (
    RESERVED,
    ConsistencyLoss,
    Evaluated,
    HitRate,
    MetricKey,
    Plain,
    Staleness,
    SupervisedLoss,
    TaskMetric,
    edge_name,
    metric_of,
    parse,
)

NAMES = [
    ("loss/supervised", SupervisedLoss()),
    ("loss/l1", SupervisedLoss("l1")),
    ("loss/depth/l1", SupervisedLoss("depth/l1")),
    ("loss/consistency", ConsistencyLoss()),
    ("loss/consistency/depth_normals", ConsistencyLoss("depth_normals")),
    ("loss/consistency/scene/ssim", ConsistencyLoss("scene", "ssim")),
    ("eval/real_test/abs_rel", Evaluated("real_test", "abs_rel")),
    ("eval/real_test/iou/car", Evaluated("real_test", "iou/car")),
    ("staleness/normals/steps_max", Staleness("normals", "steps_max")),
    ("hit_rate/normals", HitRate("normals")),
    ("grad_norm", Plain("grad_norm")),
    ("steps_per_second", Plain("steps_per_second")),
]


@pytest.mark.parametrize(("name", "key"), NAMES)
def test_the_names_of_a_report_are_fixed(name: str, key: MetricKey) -> None:
    assert str(key) == name
    assert parse(name) == key


name = st.from_regex(r"\w[\w.-]{0,10}", fullmatch=True)
"""As ``job.config.Name``."""
path = st.lists(name, min_size=1, max_size=3).map("/".join)
term = path.filter(lambda text: text.partition("/")[0] not in RESERVED)
keys = st.one_of(
    st.builds(SupervisedLoss, st.none() | term),
    st.builds(ConsistencyLoss, st.none()),
    st.builds(ConsistencyLoss, name, st.none() | path),
    st.builds(Evaluated, name, path),
    st.builds(Staleness, name, name),
    st.builds(HitRate, name),
)


@given(keys)
def test_every_key_is_parsed_from_its_own_name(key: MetricKey) -> None:
    assert parse(str(key)) == key


@given(st.lists(st.sampled_from(["loss", "consistency", "supervised", "eval", "staleness",
                                 "hit_rate", "a", ""]), max_size=5).map("/".join)
       | st.text(max_size=20))  # fmt: skip
def test_parsing_loses_nothing_of_any_text(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize("text", ["loss/", "eval/x", "eval//", "staleness/x", "hit_rate", "a/b"])
def test_a_name_that_lacks_a_part_is_plain(text: str) -> None:
    assert parse(text) == Plain(text)


@pytest.mark.parametrize("term", ["supervised", "consistency", "consistency/x"])
def test_a_term_cannot_take_the_name_of_a_sum(term: str) -> None:
    with pytest.raises(ValueError, match=f"loss term '{term}': the name is reserved"):
        SupervisedLoss(term)


@given(name, name, path)
def test_a_column_of_a_study_leads_to_the_name_in_the_reports(
    task: str, title: str, metric: str
) -> None:
    column = TaskMetric.parse(f"{task}/{title}/{metric}")
    assert column == TaskMetric(task, title, metric)
    assert str(column) == f"{task}/{title}/{metric}"
    assert column.reported == Evaluated(title, metric)


@pytest.mark.parametrize("text", ["seconds", "depth/steps_per_second", "depth//abs_rel", ""])
def test_a_figure_of_the_result_is_no_metric_of_an_evaluation(text: str) -> None:
    assert TaskMetric.parse(text) is None


@pytest.mark.parametrize(
    ("text", "metric"),
    [
        ("abs_rel", "abs_rel"),
        ("eval/real_test/abs_rel", "abs_rel"),
        ("depth/real_test/iou/car", "iou/car"),
        ("iou/car", "iou/car"),
        ("iou", "iou"),
    ],
)
def test_the_metric_is_at_the_end_of_any_name(text: str, metric: str) -> None:
    assert metric_of(text) == metric


def test_an_edge_names_the_consumer_first() -> None:
    assert edge_name("depth", "normals") == "depth<-normals"
