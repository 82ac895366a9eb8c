"""The reader of KITTI tracking, on tiny files in its own layout and on the real ones."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taskray.data.readers.kitti_tracking import CLASSES, KittiTracking, read_sweep
from taskray.data.readers.reader import Row, Sample
from taskray.data.storage.codec import check_sample
from taskray.data.storage.parquet import read_manifest
from taskray.data.storage.store import prepare
from taskray.errors import InputError
from taskray.geometry.boxes import points_in_boxes, transform_boxes
from taskray.job.config import DataConfig

SWEEPS = 10
AXES = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])
"""From LiDAR (x forward, y left, z up) to camera axes (x right, y down, z forward)."""
CAR = np.array([12.0, 3.0, -0.9, 4.0, 1.8, 1.6, 0.4])
"""A parked car in the axes of the first LiDAR; it fills with points."""
CYCLIST = np.array([7.0, -2.0, -0.8, 1.8, 0.7, 1.7, -2.0])


def turn(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0], [0, 0, 1]])


def rectification() -> np.ndarray:
    """4x4, a small rotation of the camera."""
    matrix = np.eye(4)
    matrix[:3, :3] = AXES @ turn(0.01) @ AXES.T
    return matrix


def from_lidar() -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = AXES @ turn(-0.02), (0.05, -0.07, -0.27)
    return matrix


def lidar_pose(number: int) -> np.ndarray:
    """LiDAR of a frame to that of the first one."""
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn(0.02 * number), (0.4 * number, 0.05 * number, 0.0)
    return pose


def seen(box: np.ndarray, number: int) -> np.ndarray:
    """A box of the first LiDAR's axes, in those of another frame."""
    motion = np.linalg.inv(lidar_pose(number))
    return transform_boxes(torch.from_numpy(box)[None], torch.from_numpy(motion))[0].numpy()


def label(number: int, track: int, kind: str, box: np.ndarray) -> str:
    """A line of labels, made the other way round than the reader reads it."""
    to_camera = rectification() @ from_lidar()
    x, y, z, length, width, height, theta = box
    bottom = to_camera @ (x, y, z, 1.0) + (0, height / 2, 0, 0)
    ahead = to_camera[:3, :3] @ (np.cos(theta), np.sin(theta), 0.0)
    rotation_y = np.arctan2(-ahead[2], ahead[0])
    numbers = [0, 0, -1.5, 1, 2, 3, 4, height, width, length, *bottom[:3], rotation_y]
    return f"{number} {track} {kind} " + " ".join(f"{v:.9f}" for v in numbers)


def filled(box: np.ndarray, rng: np.random.Generator, number: int = 60) -> np.ndarray:
    inside = rng.uniform(-0.45, 0.45, (number, 3)) * box[3:6]
    return inside @ turn(box[6]).T + box[:3]


def matrix_line(matrix: np.ndarray) -> str:
    return " ".join(f"{v:.12e}" for v in matrix.ravel())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten sweeps past a parked car and a cyclist, with a region that nobody labelled."""
    training = tmp_path / "kitti" / "training"
    for name in ("velodyne/0003", "label_02", "calib", "poses"):
        (training / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels, poses = [], []
    to_camera = rectification() @ from_lidar()
    for number in range(SWEEPS):
        car, cyclist = seen(CAR, number), seen(CYCLIST, number)
        ground = np.concatenate([rng.uniform(2, 30, (200, 2)), np.full((200, 1), -1.75)], axis=1)
        points = np.concatenate([filled(car, rng), filled(cyclist, rng, 4), ground])
        reflectance = rng.uniform(0, 1, (len(points), 1))
        sweep = np.concatenate([points, reflectance], axis=1).astype("<f4")
        sweep.tofile(training / "velodyne" / "0003" / f"{number:06d}.bin")
        labels += [f"{number} -1 DontCare -1 -1 -10 1 2 3 4 -1 -1 -1 -1000 -1000 -1000 -10"]
        labels += [label(number, 5, "Car", car), label(number, 9, "Cyclist", cyclist)]
        camera = to_camera @ lidar_pose(number) @ np.linalg.inv(to_camera)
        poses.append(matrix_line(camera[:3]))
    (training / "label_02" / "0003.txt").write_text("\n".join(labels) + "\n")
    (training / "poses" / "0003.txt").write_text("\n".join(poses) + "\n")
    (training / "calib" / "0003.txt").write_text(
        f"P0: {matrix_line(np.eye(3, 4))}\n\n"
        f"R_rect {matrix_line(rectification()[:3, :3])}\n"
        f"Tr_velo_to_cam: {matrix_line(from_lidar()[:3])}\n"
    )
    return tmp_path / "kitti"


def reader(folder: Path, **arguments: Any) -> KittiTracking:
    small = {"sequence": 3, "max_points": 300, "max_boxes": 4, "min_box_points": 1}
    return KittiTracking(str(folder), **{**small, **arguments})


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def there(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values[:, 0])]


def errors(data: KittiTracking) -> dict[str, str]:
    return {
        row["key"]: str(found)
        for row, found in data.load_many(data.index())
        if isinstance(found, Exception)
    }


def test_sweeps_and_boxes_come_in_the_axes_of_the_lidar(folder: Path) -> None:
    data = reader(folder, frames=3, gap=2)
    rows = data.index()
    assert [row["key"] for row in rows] == [f"0003/{n:06d}" for n in range(6)]
    assert pickle.loads(pickle.dumps(data)).index() == rows
    sample = data.load(rows[1])
    assert tuple(sample) == data.columns == (
        "points", "boxes", "points_2", "boxes_2", "lidar_motion", "points_3", "boxes_3",
        "lidar_motion_2",
    )  # fmt: skip
    check_sample(sample)
    assert sample["points"].shape == (300, 4)
    assert sample["boxes"].shape == (4, 9)
    assert len(there(sample["points"])) == 264
    for suffix, number in (("", 1), ("_2", 3), ("_3", 5)):
        car, cyclist = there(sample["boxes" + suffix])
        np.testing.assert_allclose(car[:7], seen(CAR, number), atol=1e-5)
        np.testing.assert_allclose(cyclist[:7], seen(CYCLIST, number), atol=1e-5)
        assert (CLASSES[int(car[7])], car[8]) == ("car", 5)
        assert (CLASSES[int(cyclist[7])], cyclist[8]) == ("cyclist", 9)
        held = points_in_boxes(
            *(torch.from_numpy(there(sample[name + suffix])) for name in ("points", "boxes"))
        )
        assert held[:60, 0].all()
        assert held[60:64, 1].all()
        assert held.sum() == 64


def test_what_stands_still_stays_where_it_is_under_the_motion_of_the_lidar(folder: Path) -> None:
    data = reader(folder, frames=3)
    for row in data.index():
        sample = {name: torch.from_numpy(v) for name, v in data.load(row).items()}
        for now, then in (("", "_2"), ("_2", "_3")):
            moved = transform_boxes(sample["boxes" + now], sample["lidar_motion" + now])
            torch.testing.assert_close(moved[:2], sample["boxes" + then][:2], atol=1e-4, rtol=0)


def test_who_needs_no_motion_needs_no_poses(folder: Path) -> None:
    whole = reader(folder, frames=3)
    known = whole.load(whole.index()[2])
    (folder / "training" / "poses" / "0003.txt").unlink()
    data = reader(folder, frames=3, motion=False)
    sample = data.load(data.index()[2])
    assert tuple(sample) == data.columns
    assert set(known) - set(sample) == {"lidar_motion", "lidar_motion_2"}
    for column, values in sample.items():
        np.testing.assert_array_equal(values, known[column])


def test_parts_of_the_time_share_no_sweep(folder: Path) -> None:
    early, late = reader(folder, frames=2, stop=0.6), reader(folder, frames=2, start=0.6)
    sweeps = [{n for row in part.index() for n in row["sweeps"]} for part in (early, late)]
    assert sweeps == [set(range(6)), set(range(6, 10))]
    every = reader(folder, stride=4).index()
    assert [row["sweeps"] for row in every] == [[0], [4], [8]]
    with pytest.raises(InputError, match=r"stop: got 0.5, expected more than start, 0.5"):
        reader(folder, start=0.5, stop=0.5)


def test_a_sample_is_not_made_across_a_missing_sweep(folder: Path) -> None:
    (folder / "training" / "velodyne" / "0003" / "000004.bin").unlink()
    rows = reader(folder, frames=2).index()
    assert [row["sweeps"][0] for row in rows] == [0, 1, 2, 5, 6, 7, 8]


def test_a_sequence_too_short_for_a_sample_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match="0003: the video has 3 frames, a sample needs 2 frame"):
        reader(folder, frames=2, gap=3, stop=0.3).index()


def test_too_many_points_are_thinned_out_the_same_way_every_time(folder: Path) -> None:
    def points(**arguments: Any) -> Sample:
        data = reader(folder, frames=2, **arguments)
        return data.load(data.index()[3])

    thin, again, other = points(max_points=50), points(max_points=50), points(max_points=50, seed=1)
    full = {tuple(p) for p in there(points()["points"])}
    assert np.isfinite(thin["points"]).all()
    assert {tuple(p) for p in thin["points"]} < full
    np.testing.assert_array_equal(thin["points"], again["points"])
    assert not np.array_equal(thin["points"], other["points"])
    single = reader(folder, max_points=50)
    np.testing.assert_array_equal(single.load(single.index()[4])["points"], thin["points_2"])


def test_sparse_boxes_are_left_out_and_of_too_many_the_nearest_stay(folder: Path) -> None:
    def boxes(**arguments: Any) -> np.ndarray:
        data = reader(folder, **arguments)
        return there(data.load(data.index()[0])["boxes"])[:, 8]

    assert boxes().tolist() == [5, 9]
    assert boxes(min_box_points=5).tolist() == [5]
    assert boxes(max_boxes=1).tolist() == [9]


def test_unlabelled_samples_lose_their_boxes_and_can_be_had_alone(folder: Path) -> None:
    half = reader(folder, label_fraction=0.5)
    rows = half.index()
    assert sum(row["labelled"] for row in rows) == 5
    for row in rows:
        sample, bare = half.load({**row, "labelled": True}), half.load(row)
        np.testing.assert_array_equal(sample["points"], bare["points"])
        assert np.isfinite(bare["boxes"]).any() == row["labelled"]

    def of(which: str, fraction: float = 0.5) -> list[Row]:
        return reader(folder, label_fraction=fraction, rows=which).index()

    assert of("labelled") == [row for row in rows if row["labelled"]]
    assert of("unlabelled") == [row for row in rows if not row["labelled"]]
    few = {row["key"] for row in of("labelled", 0.2)}
    assert len(few) == 2
    assert few < {row["key"] for row in of("labelled")}


def test_a_folder_that_is_not_kitti_tracking_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"label_02/0004.txt: no such file"):
        reader(folder, sequence=4).index()
    (folder / "training" / "poses" / "0003.txt").unlink()
    assert len(reader(folder).index()) == SWEEPS
    with pytest.raises(
        InputError, match=r"poses/0003.txt: no such file.*not needed with motion: false"
    ):
        reader(folder, frames=2).index()
    for file in (folder / "training" / "velodyne" / "0003").glob("*.bin"):
        file.unlink()
    with pytest.raises(InputError, match=r"velodyne/0003: no sweeps of KITTI tracking"):
        reader(folder).index()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Tr_velo_to_cam", "Tr_imu_to_velo", r"calib: 0003.txt: no Tr_velo_to_cam"),
        ("R_rect", "R_wrong", r"0003.txt: no R0_rect"),
        ("R_rect ", "R_rect 1.0 ", r"R_rect: got '1.0 .*expected 3x3 finite numbers"),
        ("R_rect 9.99", "R_rect 0.00", r"R_rect: got a determinant of .*, expected 1 \(a rotation"),
        ("R_rect 9", "R_rect x", r"R_rect: got 'x.*expected 3x3 finite numbers"),
    ],
)
def test_a_calibration_that_is_none_is_named(folder: Path, old: str, new: str, reason: str) -> None:
    edit(folder / "training" / "calib" / "0003.txt", old, new)
    with pytest.raises(InputError, match=reason) as caught:
        reader(folder).index()
    assert "\n" not in str(caught.value)


def test_broken_sweeps_labels_and_poses_cost_their_own_rows(folder: Path, cache: Path) -> None:
    training = folder / "training"
    sweeps = training / "velodyne" / "0003"
    (sweeps / "000001.bin").write_bytes(b"")
    (sweeps / "000003.bin").write_bytes((sweeps / "000003.bin").read_bytes()[:-5])
    np.full((3, 4), np.nan, "<f4").tofile(sweeps / "000005.bin")
    lines = (training / "label_02" / "0003.txt").read_text().splitlines()
    lines[3 * 6 + 1] = lines[3 * 6 + 1].rsplit(" ", 1)[0]
    lines[3 * 7 + 1] = lines[3 * 7 + 1].replace("Car", "Cart")
    lines[3 * 8 + 1] = lines[3 * 8 + 1].replace("4.000000000 ", "nan ", 1)
    (training / "label_02" / "0003.txt").write_text("\n".join(lines))
    assert errors(reader(folder)) == {
        "0003/000001": "000001.bin: contains no points",
        "0003/000003": "000003.bin: got 4219 bytes, expected a multiple of 16",
        "0003/000005": "000005.bin: contains values that are not finite",
        "0003/000006": "label_02/0003.txt line 20: got 16 values, expected 17",
        "0003/000007": "label_02/0003.txt line 23: unknown type 'Cart'",
        "0003/000008": "label_02/0003.txt line 26: "
        "got '5 0.000000000 0.000000000 -1.500000000 1', expected 15 finite numbers",
    }
    poses = (training / "poses" / "0003.txt").read_text().splitlines()
    (training / "poses" / "0003.txt").write_text("\n".join(["1 2 3", *poses[1:9]]))
    found = errors(reader(folder, frames=2, label_fraction=0.0))
    assert found["0003/000000"] == "000001.bin: contains no points"
    assert found["0003/000008"] == "poses/0003.txt: got 9 lines, expected a line for frame 9"
    assert "0003/000006" not in found, "without labels a damaged label does not matter"

    settings = {"name": "kitti_tracking", "path": str(folder), "sequence": "0003"}
    config = DataConfig.model_validate({"reader": settings, "max_corrupt_rows": 6})
    manifest = read_manifest(prepare(config, name="drive", use_ray=False))
    assert manifest["num_rows"] == SWEEPS - 6
    assert len(manifest["errors"]) == 6
    with pytest.raises(InputError, match=r"'drive': more than 5 rows .*0003/000001: 000001.bin"):
        prepare(config.model_copy(update={"max_corrupt_rows": 5}), name="drive", use_ray=False)


def test_a_changed_label_changes_the_fingerprint(folder: Path) -> None:
    data = reader(folder)
    before = data.fingerprint()
    assert before == reader(folder).fingerprint()
    with (folder / "training" / "label_02" / "0003.txt").open("a") as file:
        file.write("\n")
    assert data.fingerprint() != before


def real(data_root: Path, **arguments: Any) -> list[Sample]:
    path = str(data_root / "kitti_tracking")
    data = KittiTracking(path, stride=8, max_points=30000, **arguments)
    return [data.load(row) for row in data.index()]


def test_real_boxes_hold_the_returns_of_what_they_are_around(data_root: Path) -> None:
    boxes = 0
    for sample in real(data_root, min_box_points=0):
        points, labelled = (torch.from_numpy(there(sample[n])) for n in ("points", "boxes"))
        inside = points_in_boxes(points, labelled).sum(dim=0)
        around = points_in_boxes(points, labelled, margin=0.5).sum(dim=0)
        assert (inside >= 50).all()
        upwards = labelled.clone()
        upwards[:, 2] += 2.5
        assert (points_in_boxes(points, upwards).sum(dim=0) < 0.3 * inside).all()
        assert (inside > 0.35 * around).all()
        boxes += len(labelled)
    assert boxes > 20


def test_real_tracks_that_stand_still_stay_under_the_motion_of_the_lidar(data_root: Path) -> None:
    parked = 3
    errors_, shifts = [], []
    for sample in real(data_root, frames=3, gap=2):
        for now, then in (("", "_2"), ("_2", "_3")):
            before, after = there(sample["boxes" + now]), there(sample["boxes" + then])
            moved = transform_boxes(
                torch.from_numpy(before), torch.from_numpy(sample["lidar_motion" + now])
            ).numpy()
            for box, old in zip(moved, before, strict=True):
                for other in after[(after[:, 8] == box[8]) & (after[:, 8] == parked)]:
                    errors_.append(np.linalg.norm(box[:2] - other[:2]))
                    shifts.append(np.linalg.norm(old[:2] - other[:2]))
                    assert abs(np.angle(np.exp(1j * (box[6] - other[6])))) < 0.03
    assert len(errors_) > 10
    assert max(errors_) < 0.5
    assert np.mean(errors_) < 0.2
    assert np.mean(shifts) > 0.6


def test_a_sweep_of_another_type_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lowest, highest = (2, -20, -2, 0), (60, 20, 1, 1)
    points = rng.uniform(lowest, highest, (400, 4)).astype("<f4")
    file = tmp_path / "000000.bin"
    points.tofile(file)
    np.testing.assert_array_equal(read_sweep(file), points)
    points.astype("<f8").tofile(file)
    with pytest.raises(
        ValueError, match=r"^000000.bin: got coordinates in metres of .*float32 x y"
    ):
        read_sweep(file)
    five = np.concatenate([points, points[:, :1] * 0], axis=1)  # 400 x 5 x 4 bytes fit 500 points
    five.tofile(file)
    with pytest.raises(ValueError, match=r"000000.bin: got reflectance of .*, expected 0 to 1"):
        read_sweep(file)
    points[:, 3] *= 255
    points.tofile(file)
    with pytest.raises(ValueError, match=r"000000.bin: got reflectance of .*, expected 0 to 1"):
        read_sweep(file)
