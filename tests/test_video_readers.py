"""Readers of driving video and of outlined objects: tiny folders in the datasets' own layouts, and
the real ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taskray import schema
from taskray.data.readers.cityscapes import Cityscapes, depth_of
from taskray.data.readers.class_map import FOLDER, class_map
from taskray.data.readers.coco import Coco, centre_box
from taskray.data.readers.images import resize_image
from taskray.data.readers.kitti_odometry import KittiOdometry
from taskray.data.readers.masks import fill_polygon, fill_runs, run_lengths
from taskray.data.readers.video import clips
from taskray.data.storage.codec import check_sample
from taskray.data.storage.parquet import read_manifest
from taskray.data.storage.store import prepare
from taskray.errors import InputError
from taskray.geometry import camera
from taskray.job.config import DataConfig


def save(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(file)


def pose(number: int) -> np.ndarray:
    """Camera to world: half a metre forward and a little to the right at each frame."""
    c, s = np.cos(0.02 * number), np.sin(0.02 * number)
    z = 0.5 * number
    return np.array([[c, 0, s, 0.1 * z], [0, 1, 0, 0], [-s, 0, c, z], [0, 0, 0, 1]])


def conversion(reader: dict[str, Any], allowed: int = 10) -> dict[str, Any]:
    """The manifest of a dataset, converted; rows that cannot be read are among its errors."""
    config = DataConfig(reader=reader, max_corrupt_rows=allowed)
    return read_manifest(prepare(config, name="d", use_ray=False))


# ---- KITTI odometry -----------------------------------------------------------------------------


@pytest.fixture
def road(tmp_path: Path) -> Path:
    """A sequence of six frames, 40x80, and one of a single frame."""
    root = tmp_path / "kitti"
    for sequence, count in (("03", 6), ("04", 1)):
        folder = root / "sequences" / sequence
        for number in range(count):
            save(folder / f"image_0/{number:06d}.png", np.full((40, 80), 10 * number, np.uint8))
            save(folder / f"image_2/{number:06d}.png", np.zeros((40, 80, 3), np.uint8))
        grey = "50 0 41.5 0 0 50 19.5 0 0 0 1 0"
        colour = "50 0 41.5 -25 0 50 19.5 0 0 0 1 0"  # half a metre to the right
        (folder / "calib.txt").write_text(f"P0: {grey}\nP2: {colour}\n")
        (root / "poses").mkdir(exist_ok=True)
        lines = (" ".join(f"{v:.9e}" for v in pose(n)[:3].ravel()) for n in range(count))
        (root / "poses" / f"{sequence}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_clips_begin_where_all_their_frames_are_there() -> None:
    assert clips({0, 1, 2, 4, 5}, [0, 1, 2, 4], 2, 1) == [[0, 1], [1, 2], [4, 5]]
    assert clips(range(8), range(0, 8, 2), 3, 2) == [[0, 2, 4], [2, 4, 6]]


def test_kitti_motion_chains_back_to_the_poses(road: Path) -> None:
    reader = KittiOdometry(str(road), ["03"], frames=3, gap=2, height=20, width=40)
    rows = reader.index()
    assert [row["key"] for row in rows] == ["03/000000", "03/000001"]
    sample = reader.load(rows[1])
    check_sample(sample)
    assert set(sample) == set(reader.columns)
    assert (sample["image_3"] == 50).all()  # grey becomes three equal channels
    chained = sample["camera_motion_2"] @ sample["camera_motion"]
    np.testing.assert_allclose(pose(1) @ np.linalg.inv(chained), pose(5), atol=1e-6)
    assert sample["camera_motion"][2, 3] < 0  # going forward, points come nearer
    expected = [[25, 0, 42 / 2 - 0.5], [0, 25, 20 / 2 - 0.5], [0, 0, 1]]
    np.testing.assert_allclose(sample["intrinsics"], expected)


def test_the_colour_camera_moves_as_one_body_with_the_grey_one(road: Path) -> None:
    reader = KittiOdometry(str(road), ["03"], camera=2)
    motion = reader.load(reader.index()[0])["camera_motion"].astype(np.float64)
    point_0 = np.array([1.0, -0.5, 9.0, 1.0])  # seen by the grey camera of frame 0
    point_1 = np.linalg.inv(pose(1)) @ pose(0) @ point_0
    right = np.array([-0.5, 0, 0, 0])
    np.testing.assert_allclose(motion @ (point_0 + right), point_1 + right, atol=1e-6)


def test_a_video_of_one_frame_is_counted_and_named(road: Path, cache: Path) -> None:
    manifest = conversion({"name": "kitti_odometry", "path": str(road)})
    assert manifest["num_rows"] == 5
    assert manifest["errors"] == [
        ["04", "04: the video has 1 frame, a sample needs 2 frames, 1 apart"]
    ]
    with pytest.raises(InputError, match=r"no sample in any of 1 videos; 04: the video has 1 fra"):
        KittiOdometry(str(road), ["04"]).index()
    assert len(KittiOdometry(str(road), ["04"], frames=1).index()) == 1


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ("P1: 1 0 0 0 0 1 0 0 0 0 1 0", "calib.txt: no line 'P0'"),
        ("P0: 1 0 0", "calib.txt: P0: got '1 0 0', expected 3x4 finite numbers"),
        ("P0: 0 0 4 0 0 5 4 0 0 0 1 0", "calib.txt: P0: expected finite intrinsics with focal"),
    ],
)
def test_intrinsics_that_are_none_are_refused(road: Path, calibration: str, message: str) -> None:
    (road / "sequences/03/calib.txt").write_text(calibration)
    reader = KittiOdometry(str(road), ["03"])
    with pytest.raises(ValueError, match=message):
        reader.load(reader.index()[0])


def test_broken_frames_and_poses_are_left_out_and_recorded(road: Path, cache: Path) -> None:
    whole = (road / "sequences/03/image_0/000001.png").read_bytes()
    (road / "sequences/03/image_0/000001.png").write_bytes(whole[:40])
    lines = (road / "poses/03.txt").read_text().splitlines()
    lines[3] = lines[3].replace("e", "x")
    (road / "poses/03.txt").write_text("\n".join(lines[:5]))  # and none for the last frame
    reader = {"name": "kitti_odometry", "path": str(road), "sequences": ["03"]}
    with pytest.raises(InputError, match="no row could be read"):
        conversion({**reader, "frames": 3}, allowed=9)
    (road / "sequences/03/image_0/000001.png").write_bytes(whole)
    manifest = conversion(reader)
    assert [key for key, _ in manifest["errors"]] == ["03/000002", "03/000003", "03/000004"]
    assert "03.txt: got " in manifest["errors"][0][1]
    (road / "sequences/03/image_0/000001.png").write_bytes(whole[:40])
    found = KittiOdometry(str(road), ["03"])
    with pytest.raises(ValueError, match=r"000001.png: cannot be decoded"):
        found.load(found.index()[0])


def test_a_kitti_folder_that_cannot_work_is_named(road: Path) -> None:
    with pytest.raises(InputError, match="sequences/11: no such sequence"):
        KittiOdometry(str(road), ["11"]).index()
    with pytest.raises(InputError, match="no sequences"):
        KittiOdometry(str(road / "poses")).index()
    (road / "poses/03.txt").unlink()
    with pytest.raises(InputError, match=r"poses/03.txt: no such file \(poses: false"):
        KittiOdometry(str(road)).index()
    reader = KittiOdometry(str(road), ["03"], poses=False)
    sample = reader.load(reader.index()[0])
    assert set(sample) == set(reader.columns) == {"intrinsics", "image", "image_2"}


def test_real_kitti_motion_is_the_cars(data_root: Path) -> None:
    reader = KittiOdometry(str(data_root / "kitti_odometry"))
    rows = reader.index()
    motions = [reader.load(row)["camera_motion"].astype(np.float64) for row in rows[::10]]
    forward = [-m[2, 3] for m in motions]
    assert len(rows) == 50
    assert min(forward) > 0.5  # metres in a tenth of a second
    assert max(abs(m[1, 3]) for m in motions) < 0.1


# ---- Cityscapes ---------------------------------------------------------------------------------

CAMERA = {
    "intrinsic": {"fx": 2262.0, "fy": 2265.0, "u0": 1096.0, "v0": 513.0},
    "extrinsic": {"baseline": 0.2},
}


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """Two videos of a city at 128x256, five and one frames long; frame 2 of the first and the only
    one of the second are labelled."""
    root = tmp_path / "cityscapes"

    def place(kind: str, video: int, frame: int, ending: str) -> Path:
        return root / kind / "train" / "bonn" / f"bonn_{video:06d}_{frame:06d}_{ending}"

    columns = np.broadcast_to(np.arange(256, dtype=np.uint8), (128, 256))
    picture = np.stack([columns] * 3, axis=-1)
    for video, frames in ((0, range(5)), (1, [2])):
        for frame in frames:
            save(place("leftImg8bit_sequence", video, frame, "leftImg8bit.png"), picture)
        save(place("leftImg8bit", video, 2, "leftImg8bit.png"), picture)
        labels = np.full((128, 256), 7, np.uint8)  # road
        labels[:, :64] = 26  # car
        labels[:8, 128:] = 4  # static, in no class map
        save(place("gtFine", video, 2, "gtFine_labelIds.png"), labels)
        disparity = np.full((128, 256), 256 * 16 + 1, np.uint16)
        disparity[:, :128] = 0
        save(place("disparity", video, 2, "disparity.png"), disparity)
        file = place("camera", video, 2, "camera.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(CAMERA))
    return root


def test_cityscapes_intrinsics_are_those_of_the_frames_given(street: Path) -> None:
    """A column of the image that a ray meets before the resize is the one it meets after."""
    reader = Cityscapes(str(street), frames=2, height=48, width=128, crop_bottom=0.25)
    rows = reader.index()
    assert [row["key"] for row in rows] == [
        "bonn_000000_000000", "bonn_000000_000001", "bonn_000000_000002", "bonn_000000_000003",
        "bonn_000001",
    ]  # fmt: skip
    sample = reader.load(rows[0])
    check_sample(sample)
    assert set(sample) == set(reader.columns) == {"intrinsics", "image", "image_2"}
    k = sample["intrinsics"].astype(np.float64)
    # half a degree of the view is as many pixels as before, times what a pixel has shrunk
    np.testing.assert_allclose(k[[0, 1], [0, 1]], [2262 / 16, 2265 / 16])
    ray = np.array([0.1, 0.05, 1.0])
    at_first = np.array([2262 * ray[0] + 1096, 2265 * ray[1] + 513])
    np.testing.assert_allclose((k @ ray)[:2], (at_first + 0.5) / 16 - 0.5, atol=1e-4)
    uncut = Cityscapes(str(street), height=64, width=128, crop_bottom=0.0)
    np.testing.assert_allclose(uncut.load(uncut.index()[0])["intrinsics"], k, rtol=1e-6)
    # what a pixel shows has moved as the intrinsics say: value j of the image lies at column j
    np.testing.assert_allclose(sample["image"][5, :, 0], 2 * np.arange(128) + 0.5, atol=0.51)


def test_cityscapes_labels_become_classes_and_metres(street: Path) -> None:
    reader = Cityscapes(
        str(street), labels=("segmentation", "depth"), class_map="taskology",
        height=64, width=128, crop_bottom=0.0,
    )  # fmt: skip
    rows = reader.index()
    assert [row["key"] for row in rows] == ["bonn_000000_000002", "bonn_000001_000002"]
    sample = reader.load(rows[0])
    check_sample(sample)
    assert set(sample) == {"intrinsics", "image", "segmentation", "depth"}
    assert (sample["segmentation"][0, :, :32] == 2).all()  # car
    assert (sample["segmentation"][0, :, 32:] == 7).all()  # other
    assert (sample["depth"][0, :, :64] == 0).all()
    np.testing.assert_allclose(sample["depth"][0, :, 64:], 0.2 * 2262 / 16)
    own = Cityscapes(str(street), labels=("segmentation",), height=64, width=128, crop_bottom=0.0)
    segmentation = own.load(own.index()[0])["segmentation"]
    assert (segmentation[0, :4, 64:] == schema.IGNORE).all()
    assert (segmentation[0, 4:, 64:] == 0).all()
    assert depth_of(np.array([[0, 1, 257]], np.uint16), 2.0).tolist() == [[[0, 0, 2]]]


def test_a_labelled_frame_may_begin_a_clip(street: Path) -> None:
    reader = Cityscapes(str(street), labels=("segmentation",), frames=3, gap=1)
    rows = reader.index()
    assert [row["key"] for row in rows] == ["bonn_000000_000002", "bonn_000001"]
    assert rows[0]["images"][2] == "bonn_000000_000004_leftImg8bit.png"
    with pytest.raises(ValueError, match="bonn_000001: the video has 1 frame, a sample needs 3"):
        reader.load(rows[1])


def test_a_part_of_the_time_of_single_labelled_frames_is_refused(street: Path) -> None:
    """Of most videos one frame is labelled: each part would hold all of them, or none."""
    for key, part in (("start", {"start": 0.5}), ("stop", {"stop": 0.5})):
        with pytest.raises(InputError, match=f"^{key}: not for single labelled frames"):
            Cityscapes(str(street), labels=("segmentation",), **part)
        Cityscapes(str(street), labels=("segmentation",), frames=2, **part)
        Cityscapes(str(street), **part)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "bonn_000000: no camera file"),
        ({"intrinsic": {}}, r"camera.json: expected numbers intrinsic.\{fx, fy, u0, v0\}"),
        (
            {**CAMERA, "intrinsic": {**CAMERA["intrinsic"], "fy": 0.0}},
            "camera.json: expected finite intrinsics with focal lengths above 0",
        ),
        (
            {**CAMERA, "intrinsic": {**CAMERA["intrinsic"], "u0": float("nan")}},
            "camera.json: expected finite intrinsics",
        ),
    ],
)
def test_a_frame_without_intrinsics_is_refused(street: Path, content: Any, message: str) -> None:
    file = street / "camera/train/bonn/bonn_000000_000002_camera.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(json.dumps(content))
    reader = Cityscapes(str(street))
    with pytest.raises(ValueError, match=message):
        reader.load(reader.index()[0])
    assert reader.load(reader.index()[-1])  # the other video has its own


def test_a_label_that_cityscapes_does_not_know_is_refused(street: Path, cache: Path) -> None:
    save(
        street / "gtFine/train/bonn/bonn_000001_000002_gtFine_labelIds.png",
        np.full((128, 256), 77, np.uint8),
    )
    reader = {"name": "cityscapes", "path": str(street), "labels": ["segmentation"]}
    manifest = conversion(reader)
    assert manifest["num_rows"] == 1
    assert "got label id 77, expected 0 to 33" in manifest["errors"][0][1]


def test_a_frame_without_its_label_is_counted_and_named(street: Path, cache: Path) -> None:
    (street / "gtFine/train/bonn/bonn_000001_000002_gtFine_labelIds.png").unlink()
    manifest = conversion(
        {"name": "cityscapes", "path": str(street), "labels": ["segmentation", "depth"]}
    )
    assert manifest["num_rows"] == 1
    assert manifest["errors"] == [["bonn_000001_000002", "bonn_000001_000002: no file in gtFine"]]
    shutil.rmtree(street / "disparity")
    with pytest.raises(InputError, match=r"no labels \(disparity\) for the frames of train$"):
        Cityscapes(str(street), labels=("segmentation", "depth")).index()


def test_a_cityscapes_folder_that_cannot_work_is_named(street: Path) -> None:
    with pytest.raises(InputError, match="leftImg8bit_sequence/val: no cities"):
        Cityscapes(str(street), "val").index()
    with pytest.raises(InputError, match="ulm: no such city"):
        Cityscapes(str(street), cities=["ulm"]).index()
    for file in (street / "gtFine/train/bonn").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"no labels \(gtFine\) for the frames of train$"):
        Cityscapes(str(street), labels=("segmentation",)).index()
    with pytest.raises(InputError, match=r"frames of train in this part \(start, stop\)$"):
        Cityscapes(str(street), labels=("segmentation",), frames=2, stop=0.5).index()
    with pytest.raises(InputError, match="unknown 'taskolog'"):
        Cityscapes(str(street), labels=("segmentation",), class_map="taskolog")


def test_real_cityscapes_has_video_and_four_labelled_frames(data_root: Path) -> None:
    video = Cityscapes(str(data_root / "cityscapes"), frames=2, gap=2)
    assert len(video.index()) == 28 + 28 + 5 + 5
    labelled = Cityscapes(str(data_root / "cityscapes"), labels=("segmentation",))
    rows = labelled.index()
    assert len(rows) == 4
    for row in rows:
        sample = labelled.load(row)
        check_sample(sample)
        seen = sample["segmentation"] != schema.IGNORE
        assert seen.mean() > 0.8
        assert (sample["segmentation"][0, -10:] == 0).mean() > 0.5  # road, and no bonnet


# ---- COCO ---------------------------------------------------------------------------------------


def compressed(lengths: list[int]) -> str:
    """The reverse of ``run_lengths``, to check it with numbers of every size."""
    text = ""
    for i, length in enumerate(lengths):
        value = length - lengths[i - 2] if i > 2 else length
        while True:
            low = value & 31
            value >>= 5
            last = value == (-1 if low & 16 else 0)
            text += chr(48 + low + (0 if last else 32))
            if last:
                break
    return text


def square(left: float, top: float, side: float) -> list[float]:
    return [left, top, left + side, top, left + side, top + side, left, top + side]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two images, 60x80: a car in front of a bus in front of a person, and a crowd."""
    root = tmp_path / "coco"
    for number in (1, 2):
        save(root / f"small/{number:012d}.jpg", np.full((60, 80, 3), 90, np.uint8))
    mask = np.zeros((60, 80), bool)
    mask[:, :40] = True
    lengths = [0, 40 * 60, 40 * 60]

    def one(image: int, category: int, area: float, outline: Any, crowd: int = 0) -> dict[str, Any]:
        return {
            "image_id": image, "category_id": category, "area": area, "iscrowd": crowd,
            "segmentation": outline,
        }  # fmt: skip

    content = {
        "images": [
            {"id": n, "file_name": f"{n:012d}.jpg", "height": 60, "width": 80} for n in (1, 2)
        ],
        "categories": [
            {"id": n, "name": name}
            for n, name in ((1, "person"), (3, "car"), (6, "bus"), (18, "dog"))
        ],
        "annotations": [
            one(1, 3, 64.0, [square(30, 20, 8)]),
            one(1, 6, 500.0, [square(20, 10, 20), square(0, 50, 10)]),
            one(1, 1, 2400.0, {"size": [60, 80], "counts": lengths}),
            one(2, 1, 2400.0, {"size": [60, 80], "counts": compressed(lengths)}, crowd=1),
            one(2, 18, 64.0, [square(10, 10, 8)]),
            one(2, 3, 64.0, [square(60, 10, 8)]),
        ],
    }
    (root / "annotations").mkdir()
    (root / "annotations/instances_small.json").write_text(json.dumps(content))
    return root


def test_another_content_of_a_class_map_is_another_dataset(
    photographs: Path, street: Path, tmp_path: Path
) -> None:
    labels = ("segmentation",)

    def fingerprints() -> list[Any]:
        class_map.cache_clear()  # each conversion is a process of its own
        file = str(tmp_path / "mine.yaml")
        return [
            Coco(str(photographs), "small", class_map=file).fingerprint(),
            Cityscapes(str(street), labels=labels, class_map=file).fingerprint(),
        ]

    text = (FOLDER / "taskology.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text)
    before = fingerprints()
    assert fingerprints() == before
    changed = text.replace(" 3: car", " 3: bus").replace("26: car", "26: bus")
    (tmp_path / "mine.yaml").write_text(changed)
    assert all(a != b for a, b in zip(before, fingerprints(), strict=True))


def test_coco_outlines_become_classes_with_the_smaller_in_front(photographs: Path) -> None:
    reader = Coco(str(photographs), "small", height=60, width=80)
    first, second = (reader.load(row) for row in reader.index())
    check_sample(first)
    classes = first["segmentation"][0]
    expected = np.full((60, 80), 7)
    expected[:, :40] = 0
    expected[10:30, 20:40] = 5
    expected[50:60, :10] = 5
    expected[20:28, 30:38] = 2
    np.testing.assert_array_equal(classes, expected)
    classes = second["segmentation"][0]
    assert (classes[30:, :40] == schema.IGNORE).all()  # the crowd
    assert (classes[10:18, 10:18] == 7).all()  # a dog before it is no person
    assert (classes[10:18, 60:68] == 2).all()


def test_coco_images_are_cut_to_the_shape_of_the_frame(photographs: Path) -> None:
    assert centre_box((60, 80), (30, 60)) == (0, 10, 80, 50)
    assert centre_box((60, 80), (30, 30)) == (10, 0, 70, 60)
    reader = Coco(str(photographs), "small", height=20, width=40)
    classes = reader.load(reader.index()[0])["segmentation"][0]
    whole = Coco(str(photographs), "small", height=60, width=80)
    uncut = whole.load(whole.index()[0])["segmentation"][0]
    np.testing.assert_array_equal(classes, uncut[10:50][1::2, 1::2])


def test_a_coco_image_of_any_size_is_cut_within_its_edges() -> None:
    for size, wanted in (((249, 640), (120, 160)), ((640, 249), (160, 120))):
        box = centre_box(size, wanted)
        assert min(box) >= 0
        assert box[2] <= size[1]
        assert box[3] <= size[0]
        image = Image.new("RGB", (size[1], size[0]))
        assert resize_image(image, wanted, box).shape == (*wanted, 3)


def test_run_lengths_are_read_in_both_forms() -> None:
    assert run_lengths("231N") == [2, 3, 1, 1]  # the fourth is 1 - 3 = -2
    rng = np.random.default_rng(0)
    for scale in (3, 40, 2000, 90000):
        lengths = rng.integers(0, scale, 51).tolist()
        assert run_lengths(compressed(lengths)) == lengths
    mask = rng.random((7, 5)) > 0.5
    column_wise = mask.T.ravel()
    edges = np.flatnonzero(np.diff(column_wise)) + 1
    lengths = np.diff([0, *edges, mask.size]).tolist()
    lengths = [0, *lengths] if column_wise[0] else lengths
    for counts in (lengths, compressed(lengths)):
        np.testing.assert_array_equal(fill_runs({"size": [7, 5], "counts": counts}), mask)
    with pytest.raises(ValueError, match="run lengths of 6 pixels, expected 7x5"):
        fill_runs({"size": [7, 5], "counts": [1, 5]})
    with pytest.raises(ValueError, match="end in the middle of a number"):
        run_lengths("2R")
    with pytest.raises(ValueError, match="in run lengths"):
        run_lengths("2 3")


def test_a_polygon_holds_the_pixels_whose_centres_it_holds() -> None:
    box = (0.0, 0.0, 12.0, 10.0)
    inside = fill_polygon(square(2, 3, 4), (10, 12), box)
    expected = np.zeros((10, 12), bool)
    expected[3:7, 2:6] = True
    np.testing.assert_array_equal(inside, expected)
    triangle = [0.0, 0.0, 12.0, 0.0, 0.0, 10.0]
    x, y = np.meshgrid(np.arange(12) + 0.5, np.arange(10) + 0.5)
    np.testing.assert_array_equal(fill_polygon(triangle, (10, 12), box), x / 12 + y / 10 < 1)
    outside = fill_polygon(square(-5, -5, 8), (10, 12), box)  # may jut out of the frame
    assert outside.sum() == 9
    with pytest.raises(ValueError, match="a polygon of 4 numbers"):
        fill_polygon([0, 0, 1, 1], (10, 12), box)


def test_a_wrong_annotation_makes_only_its_row_unreadable(photographs: Path, cache: Path) -> None:
    file = photographs / "annotations/instances_small.json"
    content = json.loads(file.read_text())
    content["annotations"][4]["category_id"] = 99
    file.write_text(json.dumps(content))
    reader = {"name": "coco", "path": str(photographs), "split": "small"}
    manifest = conversion(reader)
    assert manifest["num_rows"] == 1
    (error,) = manifest["errors"]
    assert error[0] == "000000000002"
    assert error[1].endswith("category_id is 99, expected a category of the file")
    content["images"][0]["width"] = 81
    content["annotations"][4]["category_id"] = 18
    file.write_text(json.dumps(content))
    assert "got 60x80 pixels, expected 60x81" in conversion(reader)["errors"][0][1]


def edited(photographs: Path, edit: Any) -> Coco:
    """The dataset after a change of the content of its file."""
    file = photographs / "annotations/instances_small.json"
    content = json.loads(file.read_text())
    for number, annotation in enumerate(content["annotations"], start=1):
        annotation["id"] = number
    edit(content)
    file.write_text(json.dumps(content))
    return Coco(str(photographs), "small")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"segmentation": None}, "segmentation is null, expected polygons or run lengths"),
        ({"segmentation": []}, r"segmentation is \[\], expected polygons or run lengths"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, "expected polygons or run lengths"),
        ({"segmentation": [["1", 2, 3, 4, 5, 6]]}, "expected polygons or run lengths"),
        ({"segmentation": {"counts": [0, 4800]}}, "expected polygons or run lengths"),
        ({"segmentation": {"size": [60, 80], "counts": [0.5]}}, "expected polygons or run lengths"),
        ({"area": None}, "area is null, expected a number from 0"),
        ({"area": float("nan")}, "area is NaN, expected a number from 0"),
        ({"category_id": 1.0}, "category_id is 1.0, expected a whole number"),
        ({"category_id": 99}, "category_id is 99, expected a category of the file"),
        ({"iscrowd": "0"}, 'iscrowd is "0", expected 0 or 1'),
    ],
)
def test_a_field_of_an_annotation_is_named(
    photographs: Path, fields: dict[str, Any], reason: str
) -> None:
    reader = edited(photographs, lambda content: content["annotations"][1].update(fields))
    rows = reader.index()
    with pytest.raises(ValueError, match=f"^annotation 2: .*{reason}"):
        reader.load(rows[0])
    reader.load(rows[1])


def test_a_field_that_is_missing_or_of_the_image_is_named(photographs: Path) -> None:
    reader = edited(photographs, lambda content: content["annotations"][0].pop("area"))
    with pytest.raises(ValueError, match=r"^annotation 1: area is missing, expected a number"):
        reader.load(reader.index()[0])
    reader = edited(photographs, lambda content: content["images"][0].update(height="60"))
    with pytest.raises(ValueError, match=r'^image 1: height is "60", expected a whole number'):
        reader.load(reader.index()[0])


def test_annotations_of_no_image_are_refused(photographs: Path) -> None:
    def as_text(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            annotation["image_id"] = str(annotation["image_id"])

    with pytest.raises(
        InputError,
        match=r"instances_small.json: 6 annotations of images that it does not list "
        r'\(first: image_id "1"\)',
    ):
        edited(photographs, as_text).index()


def test_two_images_of_one_id_are_refused(photographs: Path) -> None:
    with pytest.raises(InputError, match="images: id 1 is missing or occurs twice"):
        edited(photographs, lambda content: content["images"][1].update(id=1)).index()


@pytest.mark.parametrize("orientation", [3, 6])
def test_coco_outlines_are_those_of_the_upright_image(photographs: Path, orientation: int) -> None:
    """An image stored upside down (3) or sideways (6), whose outlines were drawn upright."""
    values = np.zeros((60, 80, 3), np.uint8)
    values[20:28, 30:38] = 255  # the car
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = photographs / f"small/{1:012d}.jpg"
    Image.fromarray(values).transpose(turn).save(file, quality=95, exif=exif)
    reader = Coco(str(photographs), "small", height=60, width=80)
    sample = reader.load(reader.index()[0])
    np.testing.assert_array_equal(sample["image"][..., 0] > 127, sample["segmentation"][0] == 2)
    if orientation == 6:
        reader = edited(
            photographs, lambda content: content["images"][0].update(height=80, width=60)
        )
        with pytest.raises(ValueError, match=r"got 60x80 pixels, expected 80x60 .*EXIF orientatio"):
            reader.load(reader.index()[0])


def test_a_coco_folder_that_cannot_work_is_named(photographs: Path) -> None:
    with pytest.raises(InputError, match=r"instances_big.json: no such file"):
        Coco(str(photographs), "big").index()
    file = photographs / "annotations/instances_small.json"
    file.write_text('{"images": [], "annotations": []}')
    with pytest.raises(InputError, match=r"instances_small.json: not COCO instances: no 'categori"):
        Coco(str(photographs), "small").index()
    for i in (-1, 255, 1203, "cat"):
        content = {"images": [], "annotations": [], "categories": [{"id": i}]}
        file.write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"category id {i!r}, expected 0 to 254"):
            Coco(str(photographs), "small").index()
    file.write_text('{"images": [], "annotations": [], "categories": [1]}')
    with pytest.raises(InputError, match="not COCO instances: expected lists of sections under"):
        Coco(str(photographs), "small").index()
    file.write_text("{")
    with pytest.raises(InputError, match=r"instances_small.json: (malformed JSON|got )"):
        Coco(str(photographs), "small").index()
    with pytest.raises(InputError, match="has no ids of 'coco'"):
        Coco(str(photographs), "small", class_map="world")


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_coco_outlines_have_the_areas_that_are_written_beside_them(
    data_root: Path, split: str
) -> None:
    root = data_root / "coco"
    content = json.loads((root / f"annotations/instances_{split}.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for annotation in content["annotations"]:
        size = sizes[annotation["image_id"]]
        box = (0.0, 0.0, float(size[1]), float(size[0]))
        outline = annotation["segmentation"]
        if isinstance(outline, dict):
            rows, columns = np.nonzero(fill_runs(outline))
            left, top, width, height = annotation["bbox"]
            assert (columns.min(), rows.min()) == (left, top)
            assert (np.ptp(columns), np.ptp(rows)) == pytest.approx((width, height), abs=1)
            continue
        parts = [fill_polygon(polygon, size, box) for polygon in outline]
        area = np.any(parts, axis=0).sum()
        assert area == pytest.approx(annotation["area"], rel=0.05, abs=20)
    reader = Coco(str(root), split)
    for row in reader.index():
        check_sample(reader.load(row))


def test_a_ray_through_resized_intrinsics_meets_what_it_met(street: Path) -> None:
    """The same point in space, seen through both: the reader and ``geometry`` agree."""
    sizes = [(48, 128), (24, 64)]
    points = torch.tensor([0.3, 0.1, 2.0]).reshape(1, 3, 1, 1)
    seen = []
    for height, width in sizes:
        reader = Cityscapes(str(street), height=height, width=width)
        k = torch.from_numpy(reader.load(reader.index()[0])["intrinsics"])[None]
        pixel, _ = camera.project(points, k)
        seen.append((pixel.flatten() + 0.5) / torch.tensor([width, height]))
    torch.testing.assert_close(seen[0], seen[1])
