"""The embedded world: the same arguments give the same data, and its truth is true."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from taskray.data.world import CLASSES, MOVABLE, World, _build, _rng, columns_of
from taskray.data.world.render import Snapshot
from taskray.data.world.scene import Body, Part, Scene
from taskray.data.world.views import CLEARANCE, clip_views
from taskray.errors import InputError
from taskray.geometry.camera import backproject, rays
from taskray.geometry.warp import invert, sample, warp
from taskray.schema import IGNORE, QUANTITIES, quantity_of

Tensors = dict[str, Tensor]


def load(number: int = 12, **arguments: Any) -> list[dict[str, np.ndarray]]:
    world = World(num_samples=number, frames_per_scene=2, **arguments)
    return [world.load(row) for row in world.index()]


def as_batch(samples: list[dict[str, np.ndarray]]) -> Tensors:
    stacked = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}
    images = {
        name: values.permute(0, 3, 1, 2).float() / 255
        for name, values in stacked.items()
        if quantity_of(name) == "image"
    }
    return stacked | images


@pytest.fixture(scope="module")
def triplets() -> Tensors:
    return as_batch(load(frames=3))


def suffixes(frame: int) -> tuple[str, str]:
    return ("" if frame == 1 else f"_{frame}"), f"_{frame + 1}"


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("domain", ["sim", "real"])
def test_samples_hold_the_columns_shapes_and_types_of_the_schema(domain: str, frames: int) -> None:
    arguments: dict[str, Any] = {"domain": domain, "frames": frames, "height": 20, "width": 33}
    world = World(**arguments)
    sample_ = world.load(world.index()[0])
    assert tuple(sample_) == world.columns == columns_of(frames)
    sizes = {"H": 20, "W": 33}
    for name, values in sample_.items():
        quantity = QUANTITIES[quantity_of(name)]
        shape = tuple(s if isinstance(s, int) else sizes[s] for s in quantity.shape)
        if quantity.name == "image":
            shape = (20, 33, 3)
        assert values.shape == shape, name
        assert values.dtype == quantity.dtype, name
        assert np.isfinite(values).all()


def test_a_pair_has_the_columns_that_the_relations_need() -> None:
    assert set(columns_of(2)) == {
        "image", "depth", "normals", "segmentation", "edges", "intrinsics", "image_2", "depth_2",
        "normals_2", "segmentation_2", "edges_2", "camera_motion", "object_motion", "motion_mask",
        "object_motion_back_2", "motion_mask_2",
    }  # fmt: skip
    assert set(columns_of(3)) - set(columns_of(2)) == {
        "image_3", "depth_3", "normals_3", "segmentation_3", "edges_3", "camera_motion_2",
        "object_motion_2", "object_motion_back_3", "motion_mask_3",
    }  # fmt: skip


def test_rows_are_plain_named_in_order_and_grouped_by_scene() -> None:
    world = World(num_samples=50, frames_per_scene=3)
    rows = world.index()
    keys = [row["key"] for row in rows]
    assert keys == sorted(set(keys))
    assert len(keys) == 50
    assert json.loads(json.dumps(rows)) == rows
    groups = list(world.group(rows))
    assert [row for group in groups for row in group] == rows
    scenes = [{row["scene"] for row in group} for group in groups]
    assert sum(len(s) for s in scenes) == len(set.union(*scenes))
    assert pickle.loads(pickle.dumps(world)).index() == rows


def test_a_sample_is_the_same_however_it_is_reached() -> None:
    short, long = World(num_samples=4), World(num_samples=40, frames=2)
    row = short.index()[3]
    assert row == long.index()[3]
    first = short.load(row)
    long.load(long.index()[39])
    again, pair = short.load(row), long.load(row)
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        np.testing.assert_array_equal(values, pair[name])


def test_seeds_domains_splits_and_scenes_show_different_geometry() -> None:
    def depth(scene: int = 0, **arguments: Any) -> bytes:
        world = World(num_samples=16, **arguments)
        return bytes(world.load(world.index()[8 * scene])["depth"].tobytes())

    seen = [
        depth(scene, domain=domain, split=split, seed=seed)
        for domain in ("sim", "real")
        for split in ("train", "validation", "test")
        for seed in (0, 1)
        for scene in (0, 1)
    ]
    assert len(set(seen)) == len(seen)


def test_depth_and_classes_are_those_of_ordinary_places(triplets: Tensors) -> None:
    depth = triplets["depth"]
    assert (depth > 0).float().mean() > 0.97
    assert depth[depth > 0].min() > 0.3
    assert depth.max() < 40
    assert ((depth == 0) == (triplets["segmentation"] == CLASSES.index("sky"))).all()
    assert triplets["segmentation"].max() < len(CLASSES)
    assert set(CLASSES) > MOVABLE
    assert 0.02 < triplets["edges"].float().mean() < 0.25


@pytest.mark.parametrize("domain", ["sim", "real"])
def test_normals_are_of_unit_length_and_face_the_camera(domain: str) -> None:
    batch = as_batch(load(domain=domain))
    seen = batch["depth"][:, 0] > 0
    length = batch["normals"].norm(dim=1)
    torch.testing.assert_close(length[seen], torch.ones_like(length[seen]))
    assert (length[~seen] == 0).all()
    towards = (batch["normals"] * rays(64, 96, batch["intrinsics"])).sum(dim=1)
    assert (towards[seen] < 0).all()


def test_normals_are_those_of_the_backprojected_depth(triplets: Tensors) -> None:
    points = backproject(triplets["depth"].double(), triplets["intrinsics"].double())
    down = points[..., 2:, 1:-1] - points[..., :-2, 1:-1]
    right = points[..., 1:-1, 2:] - points[..., 1:-1, :-2]
    normals = torch.linalg.cross(right, down, dim=1)
    normals = -normals / normals.norm(dim=1, keepdim=True)
    cosine = (normals * triplets["normals"][..., 1:-1, 1:-1]).sum(dim=1)
    # Smooth: the true normal is the same all around, and no edge is near.
    edges = triplets["edges"].float()
    near_edge = torch.nn.functional.max_pool2d(edges, 5, 1, 2)[:, 0, 1:-1, 1:-1] > 0
    unfolded = torch.nn.functional.unfold(triplets["normals"], 3, padding=1)
    spread = unfolded.view(len(edges), 3, 9, 64, 96)
    same = ((spread - spread[:, :, 4:5]).norm(dim=1).amax(dim=1) < 1e-3)[:, 1:-1, 1:-1]
    classes = triplets["segmentation"][:, 0, 1:-1, 1:-1]
    # Parallel faces of a car stand a hand's breadth apart: too little to be an edge.
    flat = ~near_edge & same & (classes != CLASSES.index("sky")) & (classes != CLASSES.index("car"))
    assert flat.float().mean() > 0.5
    assert (cosine[flat] > 1 - 1e-6).float().mean() > 0.999
    curved = ~near_edge & ~same & (classes == CLASSES.index("ball"))
    assert curved.sum() > 100
    assert cosine[curved].mean() > 0.98


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("frame", [1, 2])
def test_true_depth_and_motion_warp_each_frame_onto_the_other(
    triplets: Tensors, frame: int, forward: bool
) -> None:
    first, second = suffixes(frame)
    motion = triplets["camera_motion" + first].double()
    if forward:
        delta = triplets["object_motion" + first]
    else:
        first, second, motion = second, first, invert(motion)
        delta = triplets["object_motion_back" + first]
    depth, other = triplets["depth" + first].double(), triplets["depth" + second].double()
    intrinsics = triplets["intrinsics"].double()
    moved = warp(depth, intrinsics, motion, delta.double())

    # Inverse depth is linear on planes, so bilinear sampling is exact inside them; the
    # neighbours of an edge are left out, and so is what is hidden in the other frame.
    inverse = torch.where(other > 0, 1 / other, 0.0)
    seen = 1 / sample(inverse, moved.pixels_b2hw).clamp(min=1e-6)
    edge = sample(triplets["edges" + second].double(), moved.pixels_b2hw) > 0
    clean = moved.valid_b1hw & ~edge & (moved.depth_b1hw < 1.05 * seen)
    error = (moved.depth_b1hw - seen).abs() / seen
    assert clean.float().mean() > 0.6
    assert (error[clean] < 0.01).float().mean() > 0.99
    moving = clean & (triplets["motion_mask" + first] == 1)
    assert moving.sum() > 500
    assert (error[moving] < 0.03).float().mean() > 0.95

    without = warp(depth, intrinsics, motion)
    wrong = (without.pixels_b2hw - moved.pixels_b2hw).norm(dim=1, keepdim=True)
    assert wrong[moving].mean() > 0.5, "object motion must matter"

    colour = (sample(triplets["image" + second].double(), moved.pixels_b2hw)
              - triplets["image" + first]).abs().amax(dim=1, keepdim=True)  # fmt: skip
    assert (colour[clean] < 0.02).float().mean() > 0.95


def test_real_frames_of_a_pair_agree_in_colour_where_they_show_the_same() -> None:
    batch = as_batch(load(domain="real", frames=2))
    moved = warp(batch["depth"], batch["intrinsics"], batch["camera_motion"],
                 batch["object_motion"])  # fmt: skip
    visible = moved.valid_b1hw & (
        moved.depth_b1hw < 1.02 * sample(batch["depth_2"], moved.pixels_b2hw)
    )
    warped = sample(batch["image_2"], moved.pixels_b2hw)
    difference = (warped - batch["image"]).abs().mean(dim=1, keepdim=True)[visible].mean()
    unwarped = (batch["image_2"] - batch["image"]).abs().mean(dim=1, keepdim=True)[visible].mean()
    assert difference < 0.8 * unwarped
    assert difference < 0.06


def test_motion_lives_where_the_mask_says_and_on_movable_classes(triplets: Tensors) -> None:
    for suffix, motion in (
        ("", "object_motion"), ("_2", "object_motion_2"), ("_2", "object_motion_back_2"),
        ("_3", "object_motion_back_3"),
    ):  # fmt: skip
        mask = triplets["motion_mask" + suffix] == 1
        size = triplets[motion].norm(dim=1, keepdim=True)
        assert (size[~mask] == 0).all()
        assert 0.01 < size[mask].mean() < 0.5
        movable = torch.tensor([name in MOVABLE for name in CLASSES])
        assert movable[triplets["segmentation" + suffix].long()[mask]].all()


def test_cameras_move_by_an_ordinary_step(triplets: Tensors) -> None:
    for name in ("camera_motion", "camera_motion_2"):
        step = triplets[name][:, :3, 3].norm(dim=1)
        assert (step > 0.1).all()
        assert (step < 0.5).all()
        assert (triplets[name][:, 2, 3] < 0).all(), "forward: points come closer"
        trace = triplets[name][:, 0, 0] + triplets[name][:, 1, 1] + triplets[name][:, 2, 2]
        assert ((trace - 1) / 2 > np.cos(np.radians(3.0))).all()


@pytest.mark.parametrize(
    ("domain", "split", "scenes", "scene", "frame"),
    [
        ("real", "train", "streets", 97, 1),
        ("real", "test", "streets", 24, 2),
        ("sim", "test", "streets", 13, 1),
        ("real", "train", "rooms", 48, 5),
    ],
)
def test_no_camera_is_inside_a_body(
    domain: str, split: str, scenes: str, scene: int, frame: int
) -> None:
    """The first draws of these clips are inside a tree, a ball or a pillar."""
    arguments: dict[str, Any] = {"domain": domain, "split": split, "scenes": scenes}
    world = World(num_samples=8 * scene + 8, height=16, width=24, frames=3, **arguments)
    sample_ = world.load(world.index()[8 * scene + frame])
    for suffix in ("", "_2", "_3"):
        assert (sample_["depth" + suffix][:, -2:] > 0).all(), "the ground is below the camera"


def test_cameras_keep_a_clearance_on_all_sides() -> None:
    around = np.random.default_rng(0).normal(size=(500, 3))
    around /= np.linalg.norm(around, axis=1, keepdims=True)
    for scene in range(60):
        names: tuple[Any, ...] = (0, "real", "train", scene)
        built, _, snapshots = _build(*names, "any", False, False)
        for view, snapshot in zip(
            clip_views(_rng(*names, 1), built, snapshots), snapshots, strict=True
        ):
            distance = snapshot.cast(np.broadcast_to(view.position, around.shape), around).t
            assert distance.min() > CLEARANCE


def test_within_finds_points_inside_and_near_each_solid() -> None:
    turned = Part(
        "cylinder", (0.6, 0.2, 0.6), (0, -1, 0), np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])
    )
    scene = Scene(
        (
            Body("ball", (Part("ball", (1.0, 2.0, 1.0), (0, -1, 0)),), (0, 0)),
            Body("block", (Part("box", (1.0, 2.0, 1.0), (0, -1, 0)),), (10, 0)),
            Body("car", (turned,), (20, 0), yaw=0.0, velocity=(1.0, 0.0)),
        ),
        False, (0, 0), (0, 0), (0, 0), (0, 0),
    )  # fmt: skip
    points = np.array(
        [[0, -1, 0], [0, -1.9, 0], [0.45, -1.9, 0], [0.6, -1, 0], [10.45, -1.9, 0.45],
         [10.6, -1, 0], [20.25, -1, 0], [21.15, -1, 0], [21, -1, 0.25], [21.0, -0.78, 0.22]]
    )  # fmt: skip
    inside = Snapshot(scene, 0).within(points, 0.0)
    assert inside.tolist() == [True, True, False, False, True, False, False, False, False, False]
    inside = Snapshot(scene, 1).within(points, 0.0)
    assert inside[6:].tolist() == [False, False, True, False]
    near = Snapshot(scene, 1).within(points, 0.15)
    assert near.tolist() == [True, True, False, True, True, True, False, True, True, True]


def test_a_label_fraction_keeps_that_share_and_smaller_ones_are_part_of_larger() -> None:
    kept = {}
    for fraction in (0.0, 0.05, 0.2, 1.0):
        rows = World(num_samples=200, label_fraction=fraction).index()
        kept[fraction] = {row["key"] for row in rows if row["labelled"]}
        assert len(kept[fraction]) == round(200 * fraction)
    assert kept[0.05] < kept[0.2] < kept[1.0]
    other = World(num_samples=200, label_fraction=0.05, seed=1).index()
    assert {row["key"].replace("-1-", "-0-") for row in other if row["labelled"]} != kept[0.05]


def test_an_unlabelled_sample_keeps_its_images_and_loses_every_label() -> None:
    labelled, bare = World(frames=2), World(frames=2, label_fraction=0.0)
    truth, sample_ = labelled.load(labelled.index()[0]), bare.load(bare.index()[0])
    for name, values in sample_.items():
        base = quantity_of(name)
        if base in ("image", "intrinsics", "camera_motion"):
            np.testing.assert_array_equal(values, truth[name])
        elif base in ("segmentation", "edges", "motion_mask"):
            assert (values == IGNORE).all()
        else:
            assert (values == 0).all()


def test_varied_labels_are_those_of_the_plain_world_and_only_the_colours_differ():
    plain, varied = (World(num_samples=2, frames=2, varied=varied) for varied in (False, True))
    for row in plain.index():
        one, other = plain.load(row), varied.load(row)
        for column in plain.columns:
            same = np.array_equal(one[column], other[column], equal_nan=True)
            assert same != column.startswith("image")


def test_only_simulated_looks_can_be_varied():
    with pytest.raises(InputError, match=r"varied: got true, expected false"):
        World(domain="real", varied=True)
