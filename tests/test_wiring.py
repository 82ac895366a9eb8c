"""The roster of a collective: which task publishes, needs and reads what, as a value."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from taskray.errors import InputError
from taskray.job.config import Job, override, parse_job
from taskray.loop.wiring import Role, Wiring, wire


def three_tasks(*overrides: str) -> Job:
    """Depth and normals with labels, camera motion without: two relations tie them together."""
    pairs = {"name": "world", "frames": 2}
    values: dict[str, Any] = {
        "name": "three",
        "steps": 30,
        "data": {
            "labelled": {"reader": "world"},
            "other": {"reader": "world"},
            "pairs": {"reader": pairs},
        },
        "tasks": {
            "depth": {"task": "depth", "dedicated": "labelled"},
            "normals": {"task": "normals", "dedicated": "other", "steps": 20},
            "motion": {"task": "ego_motion", "model": {"name": "motion_net"}},
        },
        "mediator": {"data": "pairs", "supervised_steps": 2, "consistency_steps": 1},
        "consistency": {
            "surface": {"relation": "depth_normals", "start_step": 5},
            "scene": {
                "relation": {
                    "name": "scene_photometric", "segmentation": False, "object_motion": False
                },
                "start_step": 10,
            },
        },
    }  # fmt: skip
    return parse_job(override(values, overrides), "three tasks")


MOTION = ("camera_motion", "camera_motion_back_2")


def test_each_task_publishes_what_relations_need_of_it_and_wants_the_rest() -> None:
    roles = wire(three_tasks()).roles
    assert {name: role.publishes for name, role in roles.items()} == {
        "depth": ("depth", "depth_2"),
        "normals": ("normals",),
        "motion": MOTION,
    }
    assert roles["depth"].wants == {MOTION[0]: 10, MOTION[1]: 10, "normals": 5}
    assert roles["normals"].wants == {"depth": 5}
    assert roles["motion"].wants == {"depth": 10, "depth_2": 10}


def test_a_task_reads_of_the_mediator_what_its_network_and_its_relations_need() -> None:
    roles = wire(three_tasks()).roles
    assert roles["depth"].reads == ("image", "image_2", "intrinsics")
    assert roles["normals"].reads == ("image", "intrinsics")
    assert roles["motion"].reads == ("image", "image_2", "intrinsics")


def test_a_task_reads_its_own_labels_and_their_inputs() -> None:
    roles = wire(three_tasks()).roles
    assert roles["depth"].labels == {"labelled": ("image", "depth")}
    assert roles["motion"].labels == {}


def test_a_role_knows_how_often_its_task_visits_the_mediator_and_whether_it_blocks() -> None:
    roles = wire(three_tasks()).roles
    assert {name: role.steps for name, role in roles.items()} == {
        "depth": 30, "normals": 20, "motion": 30
    }  # fmt: skip
    assert [role.steps_per_visit for role in roles.values()] == [3.0, 3.0, 1.0]
    assert [role.blocks_on_miss for role in roles.values()] == [False, False, True]
    assert all(role.tied and role.learns_from_peers for role in roles.values())


def test_peers_that_may_be_asked_to_predict_get_their_columns_with_the_question() -> None:
    wiring = wire(three_tasks())
    assert wiring.asks("normals") == ["depth"]
    assert wiring.asks("depth") == ["normals", "motion"]
    assert wiring.mediator_columns("normals") == ["image", "image_2", "intrinsics"]


def test_of_every_dataset_the_columns_that_some_task_reads_are_opened() -> None:
    assert wire(three_tasks()).columns_of_datasets() == {
        "labelled": ("depth", "image"),
        "other": ("image", "normals"),
        "pairs": ("image", "image_2", "intrinsics"),
    }
    shared = wire(three_tasks("tasks.depth.dedicated=pairs")).columns_of_datasets()
    assert shared["pairs"] == ("depth", "image", "image_2", "intrinsics")


def test_the_labels_of_the_mediator_are_never_read() -> None:
    wiring = wire(three_tasks())
    assert not {"depth", "normals", *MOTION} & {
        column for name in wiring.roles for column in wiring.mediator_columns(name)
    }


def test_the_wiring_is_a_value_that_travels_between_processes() -> None:
    wiring = wire(three_tasks())
    assert wiring == wire(three_tasks())
    again = pickle.loads(pickle.dumps(wiring))
    assert again == wiring
    assert (again.asks("depth"), again.blocks) == (wiring.asks("depth"), wiring.blocks)
    assert wiring != wire(three_tasks("consistency.surface.weight=0"))
    with pytest.raises(FrozenInstanceError):
        wiring.roles = {}


def test_the_runtime_asks_the_roster_and_not_the_job() -> None:
    """A task that is not in the job takes part as soon as the roster has its role."""
    wiring = wire(three_tasks())
    stereo = Role(
        publishes=("depth",), wants={}, reads=("image_2",), labels={"stereo": ("disparity",)},
        steps=9, frozen=False, learns_from_peers=False,
        steps_per_visit=2.0,
    )  # fmt: skip
    larger = Wiring({**wiring.roles, "stereo": stereo}, wiring.mediator)
    assert larger.asks("normals") == ["depth", "stereo"]
    assert larger.columns_of_datasets()["stereo"] == ("disparity",)


def test_a_relation_of_weight_zero_ties_no_task() -> None:
    wiring = wire(three_tasks("consistency.surface.weight=0"))
    normals = wiring.roles["normals"]
    assert (normals.tied, normals.publishes, dict(normals.wants)) == (False, (), {})
    assert (normals.reads, normals.learns_from_peers) == ((), False)
    assert "normals" not in wiring.asks("depth")


@pytest.mark.parametrize("setting", ["mediator.consistency_steps=0", "mediator=null"])
def test_without_consistency_steps_each_task_is_alone(setting: str) -> None:
    labelled = "tasks.motion.dedicated=pairs"
    wiring = wire(three_tasks(labelled, setting))
    assert not any(role.tied for role in wiring.roles.values())
    assert set(wiring.columns_of_datasets()) == {"labelled", "other", "pairs"}


def test_a_task_that_gives_its_relations_no_weight_publishes_and_learns_nothing() -> None:
    depth = wire(three_tasks("tasks.depth.consistency_weight=0")).roles["depth"]
    assert depth.publishes == ("depth", "depth_2")
    assert not depth.learns_from_peers


def test_a_frozen_task_wants_nothing_and_makes_no_step() -> None:
    wiring = wire(three_tasks("tasks.motion.frozen=true", "tasks.motion.checkpoint=somewhere"))
    motion = wiring.roles["motion"]
    assert (motion.steps, motion.frozen) == (0, True)
    assert (dict(motion.labels), dict(motion.wants)) == ({}, {})
    assert motion.publishes == MOTION
    assert not motion.blocks_on_miss
    assert not wiring.blocks
    assert wire(three_tasks()).blocks


def test_a_quantity_that_no_task_predicts_is_named() -> None:
    job = three_tasks("consistency.scene.relation.object_motion=true")
    with pytest.raises(InputError, match=r"consistency\.scene.*'object_motion', which no task"):
        wire(job)
