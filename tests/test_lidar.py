"""The world's LiDAR: what it measures is there, and its boxes hold what they should."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taskray.cli import main
from taskray.data.readers.reader import Sample
from taskray.data.storage.codec import check_sample
from taskray.data.storage.source import load_in_process
from taskray.data.storage.store import prepare
from taskray.data.world import CLASSES, MOVABLE, LidarSensor, World, columns_of
from taskray.data.world.lidar import (
    REFLECTANCE,
    boxes_of,
    extent_of,
    lidar_columns,
    sensor_poses,
    take_sweep,
)
from taskray.data.world.render import Snapshot
from taskray.data.world.scene import Scene, build_scene
from taskray.data.world.shapes import Floats, shape
from taskray.data.world.truth import take_frame
from taskray.data.world.views import CLIP_LENGTH, View, camera_matrix, clip_views
from taskray.errors import InputError
from taskray.geometry.boxes import ground_corners, points_in_boxes, transform_boxes
from taskray.job import plugins
from taskray.job.config import DataConfig
from taskray.report.birds_eye import birds_eye, reach_of
from taskray.report.panels import PALETTE
from taskray.schema import quantity_of

EXACT = LidarSensor(range_noise=0.0, dropout=0.0)
CAR = CLASSES.index("car")


@dataclass(frozen=True)
class Place:
    """A scene of traffic or of any kind, with cameras and the sensor above each."""

    scene: Scene
    snapshots: tuple[Snapshot, ...]
    views: list[View]

    @property
    def poses(self) -> list[Floats]:
        return sensor_poses(self.views, 1.7)


@lru_cache(maxsize=8)
def place(number: int, kind: Any = "traffic") -> Place:
    rng = np.random.default_rng(number)
    scene = build_scene(rng, "sim", kind)
    snapshots = tuple(Snapshot(scene, time) for time in range(CLIP_LENGTH))
    return Place(scene, snapshots, clip_views(rng, scene, snapshots))


def world(**arguments: Any) -> World:
    small = {"lidar": True, "cameras": False, "scenes": "traffic", "num_samples": 4}
    return World(**{**small, **arguments})


def first(**arguments: Any) -> Sample:
    reader = world(**arguments)
    return reader.load(reader.index()[0])


def there(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values[:, 0])]


def to_world(pose: Floats, points: np.ndarray) -> Floats:
    return np.asarray(points[:, :3].astype(np.float64) @ pose[:3, :3].T + pose[:3, 3])


def test_lidar_rows_hold_the_columns_shapes_and_types_of_the_schema() -> None:
    assert columns_of(2, cameras=False, lidar=True) == (
        "points", "boxes", "points_2", "boxes_2", "lidar_motion",
    )  # fmt: skip
    sample = first(frames=3, lidar_points=5000, max_boxes=7)
    assert tuple(sample) == columns_of(3, cameras=False, lidar=True)
    assert set(sample) - set(columns_of(2, cameras=False, lidar=True)) == {
        "points_3", "boxes_3", "lidar_motion_2",
    }  # fmt: skip
    check_sample(sample)
    assert sample["points_3"].shape == (5000, 4)
    assert sample["boxes_3"].shape == (7, 9)
    with pytest.raises(InputError, match=r"lidar: got false, expected true because cameras"):
        World(cameras=False)


def test_what_is_missing_is_rows_of_nan_at_the_end() -> None:
    sample = first(lidar_points=9000, max_boxes=40)
    for name in ("points", "boxes"):
        held = np.isfinite(sample[name])
        assert (held.all(axis=1) == held.any(axis=1)).all()
        number = held.all(axis=1).sum()
        assert 0 < number < len(held)
        assert held[:number].all()


def test_the_lidar_changes_nothing_that_cameras_see_and_needs_no_cameras() -> None:
    plain, both = World(frames=2, num_samples=9), World(frames=2, num_samples=9, lidar=True)
    row = plain.index()[8]
    assert row == both.index()[8]
    seen, all_ = plain.load(row), both.load(row)
    assert tuple(all_) == both.columns
    for name, values in seen.items():
        np.testing.assert_array_equal(values, all_[name])
    blind = World(frames=3, num_samples=9, lidar=True, cameras=False)
    for name, values in blind.load(row).items():
        if name in all_:
            np.testing.assert_array_equal(values, all_[name])
        else:
            assert name in ("points_3", "boxes_3", "lidar_motion_2")


def test_the_same_seed_gives_the_same_sweeps_and_another_seed_others() -> None:
    sample, again, other = first(), first(), first(seed=1)
    for name, values in sample.items():
        np.testing.assert_array_equal(values, again[name])
        assert not np.array_equal(values, other[name], equal_nan=True)
    quiet, noisy = first(frames=2, sensor=EXACT), first(frames=2)
    np.testing.assert_array_equal(quiet["lidar_motion"], noisy["lidar_motion"])


@pytest.mark.parametrize("kind", ["rooms", "streets", "traffic"])
def test_every_return_lies_on_the_surface_that_the_beam_meets_first(kind: str) -> None:
    where = place(1, kind)
    pose, snapshot = where.poses[0], where.snapshots[0]
    sweep = take_sweep(pose, snapshot, EXACT, np.random.default_rng(0))
    assert len(sweep.points) > 3000
    distance = np.linalg.norm(sweep.points[:, :3], axis=1)
    assert distance.max() <= EXACT.max_range
    points = to_world(pose, sweep.points)
    start = np.broadcast_to(pose[:3, 3], points.shape)
    hits = snapshot.cast(start, points - pose[:3, 3])
    met = snapshot.body_of_part[hits.part] == sweep.body
    assert met.mean() > 0.995, "rounding decides on edges alone"
    np.testing.assert_allclose(hits.t[met], 1.0, atol=1e-4)
    ground = CLASSES.index("ground")
    on_ground = snapshot.class_of_part[hits.part] == ground
    assert on_ground.sum() > 500
    np.testing.assert_allclose(sweep.points[on_ground & met, 2], -1.7, atol=1e-4)


def test_beams_cover_the_full_turn_and_the_angles_asked_for() -> None:
    sensor = LidarSensor(beams=5, azimuth_steps=64, lowest_deg=-20, highest_deg=0)
    x, y, z = sensor.directions(0.3).T
    np.testing.assert_allclose(np.hypot(np.hypot(x, y), z), 1.0)
    elevations = np.degrees(np.arcsin(z)).round(6)
    assert sorted(set(elevations)) == [-20, -15, -10, -5, 0]
    turns = np.sort(np.degrees(np.arctan2(y, x))[elevations == 0])
    np.testing.assert_allclose(np.diff(turns), 360 / 64)
    assert -180 < turns[0] < -180 + 360 / 64


def test_camera_and_lidar_measure_the_same_surfaces() -> None:
    """Ties the sensor's axes to the camera's: returns fall on the depth that the camera sees."""
    where = place(2)
    size = (96, 144)
    for view, pose, snapshot in zip(where.views, where.poses, where.snapshots, strict=True):
        assert abs(pose[:3, 3] - view.position)[[0, 2]].max() < 1e-9
        sweep = take_sweep(pose, snapshot, EXACT, np.random.default_rng(0))
        seen = (to_world(pose, sweep.points) - view.position) @ view.rotation
        ahead = seen[seen[:, 2] > 0.5]
        k = camera_matrix(*size, 0.8)
        pixel = np.round(ahead @ k.T / ahead[:, 2:]).astype(int)[:, :2]
        inside = ((pixel >= 0) & (pixel < (size[1], size[0]))).all(axis=1)
        assert inside.sum() > 500
        depth = take_frame(view, snapshot, size, 0.8).hits.t.reshape(size)
        measured = depth[pixel[inside, 1], pixel[inside, 0]]
        error = np.abs(measured / ahead[inside, 2] - 1)
        assert np.median(error) < 0.01
        assert (error < 0.05).mean() > 0.85, "the sensor stands a little higher"
        assert (sweep.points[:, 0] > 0).mean() < 0.8, "it looks all around"


def test_a_box_holds_all_returns_of_its_body_and_none_of_others() -> None:
    held = 0
    for number in range(4):
        where = place(number)
        sweep = take_sweep(where.poses[1], where.snapshots[1], EXACT, np.random.default_rng(0))
        boxes = torch.from_numpy(boxes_of(where.scene, where.snapshots[1], where.poses[1]))
        own = torch.from_numpy(sweep.body)[:, None] == boxes[:, 8]
        points = torch.from_numpy(sweep.points).double()
        # a beam that grazes a wheel's rim is solved on the wheel's tube, a little beyond its end
        assert points_in_boxes(points, boxes, margin=1e-4)[own].float().mean() > 0.995
        assert points_in_boxes(points, boxes, margin=0.05)[own].all()
        assert not points_in_boxes(points, boxes, margin=-0.01)[~own].any()
        held += int(own.sum())
    assert held > 1000


def test_boxes_are_tight_around_the_parts_of_a_body() -> None:
    for body in (b for n in range(3) for b in place(n).scene.bodies if b.label in MOVABLE):
        low, high = extent_of(body)
        vertices = np.concatenate(
            [shape(p.shape).vertices @ p.matrix()[:3, :3].T + p.centre for p in body.parts]
        )
        assert (vertices >= low - 1e-9).all()
        assert (vertices <= high + 1e-9).all()
        # a mesh is inscribed in its round surface: it reaches almost as far
        assert np.abs(vertices.min(axis=0) - low).max() < 0.03
        assert np.abs(vertices.max(axis=0) - high).max() < 0.03
        assert abs(high[1]) < 1e-6, "it stands on the ground"


def test_boxes_of_a_track_move_with_the_sensor_and_the_body() -> None:
    moved = still = 0
    for number in range(4):
        where = place(number)
        rng = np.random.default_rng(number)
        sample = lidar_columns(
            where.scene, where.snapshots, where.views, EXACT, rng,
            num_points=9000, max_boxes=64, min_box_points=1,
        )  # fmt: skip
        height = float(np.random.default_rng(number).uniform(1.6, 1.8))
        poses = sensor_poses(where.views, height)
        for suffix, here, after in (("", 0, 1), ("_2", 1, 2)):
            motion = torch.from_numpy(sample["lidar_motion" + suffix])
            carried = transform_boxes(
                torch.from_numpy(there(sample["boxes" + suffix])), motion
            ).numpy()
            later = {int(box[8]): box for box in there(sample[f"boxes_{after + 1}"])}
            for box in carried:
                if int(box[8]) not in later:
                    continue
                body, target = where.scene.bodies[int(box[8])], later[int(box[8])]
                own = np.linalg.inv(poses[after]) @ body.pose(after) @ np.linalg.inv(
                    body.pose(here)
                ) @ poses[after]  # fmt: skip
                exact = transform_boxes(torch.from_numpy(box)[None], torch.from_numpy(own).float())
                np.testing.assert_allclose(exact[0], target, atol=2e-4)
                shift = np.linalg.norm(target[:3] - box[:3])
                if body.velocity == (0.0, 0.0):
                    still += 1
                    np.testing.assert_allclose(box, target, atol=2e-4)
                else:
                    moved += 1
                    assert 0.02 < shift < 0.45
    assert moved > 20
    assert still > 20


def test_tracks_keep_their_number_size_and_class() -> None:
    sample = first(frames=3, max_boxes=64)
    tracks: dict[int, list[np.ndarray]] = {}
    for suffix in ("", "_2", "_3"):
        boxes = there(sample["boxes" + suffix])
        assert len(set(boxes[:, 8])) == len(boxes)
        for box in boxes:
            tracks.setdefault(int(box[8]), []).append(box)
    assert sum(len(boxes) == 3 for boxes in tracks.values()) > 5
    for boxes in tracks.values():
        for box in boxes:
            np.testing.assert_array_equal(box[[3, 4, 5, 7]], boxes[0][[3, 4, 5, 7]])
        assert CLASSES[int(boxes[0][7])] in MOVABLE


def test_noise_and_dropout_are_those_asked_for() -> None:
    where = place(3)
    truth = take_sweep(where.poses[0], where.snapshots[0], EXACT, np.random.default_rng(5))
    noisy = LidarSensor(range_noise=0.05, dropout=0.0)
    seen = take_sweep(where.poses[0], where.snapshots[0], noisy, np.random.default_rng(5))
    assert len(seen.points) == len(truth.points)
    length = [np.linalg.norm(s.points[:, :3].astype(float), axis=1) for s in (truth, seen)]
    error = length[1] - length[0]
    assert abs(error.mean()) < 0.003
    assert error.std() == pytest.approx(0.05, rel=0.05)
    assert abs(error).max() < 0.05 * 5
    lossy = LidarSensor(range_noise=0.0, dropout=0.3)
    kept = take_sweep(where.poses[0], where.snapshots[0], lossy, np.random.default_rng(5))
    assert len(kept.points) / len(truth.points) == pytest.approx(0.7, abs=0.02)
    assert {tuple(p) for p in kept.points[:, :3]} < {tuple(p) for p in truth.points[:, :3]}


def test_reflectance_is_that_of_the_class_with_a_little_noise() -> None:
    where = place(4)
    sweep = take_sweep(where.poses[0], where.snapshots[0], EXACT, np.random.default_rng(0))
    assert set(REFLECTANCE) == set(CLASSES) - {"sky"}
    assert 0 <= sweep.points[:, 3].min() <= sweep.points[:, 3].max() <= 1
    labels = np.array([where.scene.bodies[b].label for b in sweep.body])
    for name in ("ground", "wall", "car"):
        values = sweep.points[labels == name, 3]
        assert values.mean() == pytest.approx(REFLECTANCE[name], abs=0.01)
        assert 0.02 < values.std() < 0.04


def test_nothing_comes_back_from_beyond_the_range() -> None:
    near = there(first(sensor=LidarSensor(max_range=12.0, range_noise=0.0))["points"])
    far = there(first(sensor=LidarSensor(max_range=80.0, range_noise=0.0))["points"])
    assert np.linalg.norm(near[:, :3], axis=1).max() <= 12.0
    assert np.linalg.norm(far[:, :3], axis=1).max() > 25.0
    assert len(near) < len(far)


def test_too_many_returns_are_thinned_out_and_sparse_boxes_left_out() -> None:
    full, thin = there(first(lidar_points=9000)["points"]), first(lidar_points=1000)["points"]
    assert np.isfinite(thin).all()
    assert {tuple(p) for p in thin} < {tuple(p) for p in full}
    rows = {tuple(p): n for n, p in enumerate(full)}
    order = [rows[tuple(p)] for p in thin]
    assert order == sorted(order)
    assert 0.8 < np.mean(order) / (len(full) / 2) < 1.2, "from all over the sweep"

    every = there(first(min_box_points=1, max_boxes=64)["boxes"])
    dense = there(first(min_box_points=40, max_boxes=64)["boxes"])
    assert 0 < len(dense) < len(every)
    assert {tuple(b) for b in dense} < {tuple(b) for b in every}
    sample = first(min_box_points=40, max_boxes=64, sensor=EXACT)
    points, boxes = (torch.from_numpy(there(sample[name])) for name in ("points", "boxes"))
    assert (points_in_boxes(points, boxes, margin=0.01).sum(dim=0) >= 40).all()


def test_of_too_many_boxes_the_nearest_stay() -> None:
    every, few = there(first(max_boxes=64)["boxes"]), first(max_boxes=3)["boxes"]
    distance = np.sort(np.hypot(every[:, 0], every[:, 1]))
    np.testing.assert_allclose(np.sort(np.hypot(few[:, 0], few[:, 1])), distance[:3])


def test_traffic_has_cars_on_all_sides_some_of_which_move() -> None:
    reader = world(num_samples=16, frames_per_scene=2, frames=2, max_boxes=64)
    boxes, numbers = [], []
    for row in reader.index():
        found = there(reader.load(row)["boxes"])
        found = found[found[:, 7] == CAR]
        boxes.append(found)
        numbers.append(len(found))
    assert 5 < np.mean(numbers) < 20
    cars = np.concatenate(boxes)
    assert (np.hypot(cars[:, 0], cars[:, 1]) < 40).all()
    assert np.hypot(cars[:, 0], cars[:, 1]).min() > 3
    share = np.bincount((np.arctan2(cars[:, 1], cars[:, 0]) // (np.pi / 2)).astype(int) + 2)
    assert (share / len(cars) > 0.1).all()
    bodies = [b for n in range(4) for b in place(n).scene.bodies if b.label == "car"]
    moving = np.mean([b.velocity != (0.0, 0.0) for b in bodies])
    assert 0.3 < moving < 0.9


def test_scenes_are_of_the_kind_asked_for() -> None:
    def indoors(kind: Any) -> list[bool]:
        return [build_scene(np.random.default_rng(n), "sim", kind).indoor for n in range(12)]

    assert set(indoors("any")) == {True, False}
    assert set(indoors("rooms")) == {True}
    assert set(indoors("streets")) == set(indoors("traffic")) == {False}


def test_unlabelled_rows_lose_their_boxes_and_nothing_else() -> None:
    truth, bare = first(frames=2), first(frames=2, label_fraction=0.0)
    for name, values in bare.items():
        if quantity_of(name) == "boxes":
            assert np.isnan(values).all()
            assert np.isfinite(truth[name]).any()
        else:
            np.testing.assert_array_equal(values, truth[name])


def test_labelled_and_unlabelled_rows_can_be_had_alone() -> None:
    def rows(**arguments: Any) -> list[dict[str, Any]]:
        return World(num_samples=100, **arguments).index()

    every = rows(label_fraction=0.2)
    labelled = rows(label_fraction=0.2, rows="labelled")
    unlabelled = rows(label_fraction=0.2, rows="unlabelled")
    assert len(labelled) == 20
    assert labelled == [row for row in every if row["labelled"]]
    assert unlabelled == [row for row in every if not row["labelled"]]
    few = rows(label_fraction=0.05, rows="labelled")
    assert {row["key"] for row in few} < {row["key"] for row in labelled}
    reader = World(num_samples=100, label_fraction=0.2, rows="labelled", frames_per_scene=4)
    index = reader.index()
    assert [row for group in reader.group(index) for row in group] == index


def test_settings_of_the_sensor_are_checked_and_named() -> None:
    def build(**sensor: Any) -> Any:
        arguments = {"lidar": True, "cameras": False, "sensor": sensor}
        return plugins.build("reader", "world", arguments, "data.a.reader")

    assert build(beams=16).sensor.beams == 16
    with pytest.raises(InputError, match=r"data.a.reader.sensor.beems: unknown key.*'beams'"):
        build(beems=16)
    with pytest.raises(InputError, match=r"reader.sensor.dropout: got 1.0, expected less"):
        build(dropout=1.0)
    for key in ("max_range", "range_noise"):
        with pytest.raises(
            InputError, match=rf"reader.sensor.{key}: got inf, expected a finite number"
        ):
            build(**{key: float("inf")})
    with pytest.raises(
        InputError, match=r"reader.sensor.highest_deg: got 3, expected at least lowest_deg, 10"
    ):
        build(lowest_deg=10.0)


SMALL = {
    "name": "world", "lidar": True, "cameras": False, "scenes": "traffic", "num_samples": 3,
    "lidar_points": 2000, "sensor": {"beams": 8, "azimuth_steps": 90}, "label_fraction": 0.4,
}  # fmt: skip


def test_stored_sweeps_come_back_as_they_were(cache: Path) -> None:
    config = DataConfig.model_validate({"reader": SMALL})
    folder = prepare(config, name="drive", use_ray=False)
    stored = load_in_process(folder, config, ["points", "boxes"]).open().take(range(3))
    sensor = LidarSensor(beams=8, azimuth_steps=90)
    reader = world(num_samples=3, lidar_points=2000, sensor=sensor, label_fraction=0.4)
    labelled = 0
    for number, row in enumerate(reader.index()):
        for name, values in reader.load(row).items():
            np.testing.assert_array_equal(stored[name][number], values)
        assert np.isfinite(stored["boxes"][number]).any() == row["labelled"]
        labelled += row["labelled"]
    assert labelled == 1


@pytest.mark.parametrize("frames", [1, 3])
def test_data_show_draws_sweeps_from_above(
    tmp_path: Path, cache: Path, frames: int, capsys: pytest.CaptureFixture[str]
) -> None:
    job, sheet = tmp_path / "drive", tmp_path / "sheet.png"
    words = [f"{key}={value}" for key, value in SMALL.items() if key not in ("name", "sensor")]
    words += ["sensor.beams=8", "sensor.azimuth_steps=90", f"frames={frames}"]
    assert main(["data", "convert", "world", *words, "--out", str(job), "--inline"]) == 0
    capsys.readouterr()
    assert main(["data", "show", str(job), "--save", str(sheet)]) == 0
    shown = capsys.readouterr().out
    assert "float32 2000x4" in shown
    assert "0 corrupt rows" in shown
    with Image.open(sheet) as picture:
        assert picture.size == (164 * frames + 4, 18 + 164 * 3)


def test_seen_from_above_forward_is_up_and_left_is_left() -> None:
    boxes = np.full((2, 9), np.nan)
    boxes[0] = [-20, -20, 0, 10, 6, 2, 0, CAR, 1]
    points = np.array([[30.0, 0, -2, 1], [0, 30, 1, 1], [900, 0, 0, 1], [np.nan] * 4])
    picture = birds_eye(points, boxes, reach=40.0, size=80)
    empty = picture[0, 0]
    assert picture.shape == (80, 80, 3)
    assert picture[10, 40].tolist() == [90, 90, 90]
    assert picture[40, 10].tolist() == [255, 255, 255]
    car = (picture == PALETTE[CAR]).all(axis=-1)
    rows, columns = np.nonzero(car)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (55, 65, 57, 63)
    assert car[57, 60], "a line to its front"
    assert not car[63, 60]
    assert ((picture == empty).all(axis=-1) | car).sum() == 80 * 80 - 2
    assert reach_of(points[None]) > 30
    assert reach_of(points[3:]) == 1.0
    assert (birds_eye(points[3:], None, 10.0, 20) == empty).all()


def test_boxes_seen_from_another_frame_are_turned_and_shifted() -> None:
    boxes = torch.tensor([[10.0, 0, 0, 4, 2, 1.5, 0.0, 8, 3], [float("nan")] * 9])
    quarter = torch.tensor([[0.0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]])
    moved = transform_boxes(boxes, quarter)
    expected = torch.tensor([1.0, 12, 3, 4, 2, 1.5, np.pi / 2, 8, 3])
    torch.testing.assert_close(moved[0], expected)
    assert moved[1].isnan().sum() >= 7
    there_and_back = transform_boxes(moved, torch.linalg.inv(quarter))
    torch.testing.assert_close(there_and_back[0], boxes[0], atol=1e-6, rtol=0)
    batched = transform_boxes(boxes.expand(2, 3, 2, 9), quarter.expand(2, 3, 4, 4))
    torch.testing.assert_close(batched[1, 2, 0], moved[0])
    turned = transform_boxes(torch.tensor([[0.0, 0, 0, 4, 2, 1, 3.0, 8, 3]]), quarter)
    assert turned[0, 6] == pytest.approx(3.0 + np.pi / 2 - 2 * np.pi, abs=1e-6)


def test_points_are_found_in_turned_boxes_and_corners_are_where_they_should() -> None:
    box = torch.tensor([[10.0, 5, 1, 4, 2, 2, np.pi / 4, 8, 3], [float("nan")] * 9])
    root = np.sqrt(0.5)
    points = torch.tensor(
        [[10 + 1.9 * root, 5 + 1.9 * root, 1], [10 - 1.9 * root, 5 + 1.9 * root, 1],
         [10 + 2.1 * root, 5 + 2.1 * root, 1], [10, 5, 2.1], [float("nan")] * 3]
    )  # fmt: skip
    assert points_in_boxes(points, box)[:, 0].tolist() == [True, False, False, False, False]
    assert not points_in_boxes(points, box)[:, 1].any()
    assert points_in_boxes(points, box, margin=0.15)[:4, 0].tolist() == [True, False, True, True]
    corners = ground_corners(box)[0]
    front_left = torch.tensor([10 + 2 * root - root, 5 + 2 * root + root])
    torch.testing.assert_close(corners[0], front_left, check_dtype=False)
    edges = corners.roll(-1, dims=0) - corners
    torch.testing.assert_close(edges.norm(dim=1), torch.tensor([4.0, 2, 4, 2]))
    turn = edges[:, 0] * edges.roll(-1, 0)[:, 1] - edges[:, 1] * edges.roll(-1, 0)[:, 0]
    assert (turn > 0).all()
