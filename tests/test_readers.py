"""The readers of public datasets, on tiny files in their own layout and on the real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from taskray import schema
from taskray.data.readers.class_map import class_map
from taskray.data.readers.nyuv2 import NYUv2, edges_of
from taskray.data.readers.reader import fingerprint_files
from taskray.data.readers.seven_scenes import SevenScenes, read_pose
from taskray.data.storage.codec import check_sample
from taskray.data.storage.parquet import read_manifest
from taskray.data.storage.source import load_in_process
from taskray.data.storage.store import prepare
from taskray.errors import InputError
from taskray.geometry import camera
from taskray.job import plugins
from taskray.job.config import DataConfig

HEIGHT, WIDTH = 60, 80
NORMAL = np.array([0.3, -0.4, -0.8]) / np.linalg.norm([0.3, -0.4, -0.8])


def write_pose(file: Path, pose: np.ndarray) -> None:
    file.write_text("\n".join("\t".join(f"{v:.9e}" for v in line) for line in pose))


def plane_depth(intrinsics: np.ndarray) -> np.ndarray:
    """Depth of the plane ``NORMAL . X = NORMAL . (0, 0, 2)``."""
    rays = camera.rays(HEIGHT, WIDTH, torch.from_numpy(intrinsics)[None])[0].numpy()
    return NORMAL[2] * 2 / np.einsum("c,chw->hw", NORMAL, rays)


def turn(angle: float) -> np.ndarray:
    """A camera-to-world pose."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s, 0.1 * angle], [0, 1, 0, 0.2], [-s, 0, c, angle], [0, 0, 0, 1]])


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Two sequences of 12 frames that look at a tilted plane, with holes in the depth."""
    intrinsics = camera.resize_intrinsics(
        torch.tensor([[[585.0, 0, 320], [0, 585, 240], [0, 0, 1]]]), (480, 640), (HEIGHT, WIDTH)
    )[0].numpy()
    millimetres = np.round(plane_depth(intrinsics) * 1000).astype(np.uint16)
    millimetres[0, 0], millimetres[-1, -1] = 0, 65535
    for sequence in ("seq-01", "seq-02"):
        folder = tmp_path / "scene" / sequence
        folder.mkdir(parents=True)
        for number in range(12):
            stem = folder / f"frame-{number:06d}"
            picture = np.full((HEIGHT, WIDTH, 3), 10 * number, np.uint8)
            Image.fromarray(picture).save(stem.with_name(stem.name + ".color.png"))
            Image.fromarray(millimetres).save(stem.with_name(stem.name + ".depth.png"))
            write_pose(stem.with_name(stem.name + ".pose.txt"), turn(0.01 * number))
    return tmp_path / "scene"


@pytest.fixture
def rooms(tmp_path: Path) -> Path:
    """Three training frames in the layout of the NYUv2 folder."""
    for name in ("rgb", "depth", "label40"):
        (tmp_path / "nyu" / "train" / name).mkdir(parents=True)
    train = tmp_path / "nyu" / "train"
    for number in (3, 5, 12):
        picture = np.full((240, 320, 3), number, np.uint8)
        Image.fromarray(picture).save(train / "rgb" / f"{number:04d}.jpg")
        depth = np.full((240, 320), 2500, np.uint16)
        depth[:120] = 0
        Image.fromarray(depth).save(train / "depth" / f"{number:04d}.png")
        labels = np.full((240, 320), 38, np.uint8)
        labels[:, :160] = 255
        Image.fromarray(labels).save(train / "label40" / f"{number:04d}.png")
    return tmp_path / "nyu"


def test_seven_scenes_gives_metric_depth_and_normals_that_face_the_camera(scene: Path) -> None:
    reader = SevenScenes(str(scene), ["seq-01"], height=HEIGHT, width=WIDTH)
    rows = reader.index()
    sample = reader.load(rows[0])
    assert [row["key"] for row in rows[:2]] == ["seq-01/frame-000000", "seq-01/frame-000001"]
    assert set(sample) == set(reader.columns)
    check_sample(sample)
    depth = sample["depth"][0]
    assert depth[0, 0] == 0
    assert depth[-1, -1] == 0
    np.testing.assert_allclose(depth[1:-1], plane_depth(sample["intrinsics"])[1:-1], atol=1e-3)
    normals = sample["normals"].astype(np.float64)
    valid = np.abs(normals).sum(0) > 0
    assert valid[1:-1, 1:-1].mean() > 0.98
    assert not valid[0, 0]
    cosine = np.einsum("c,chw->hw", NORMAL, normals)[valid]
    assert np.degrees(np.arccos(cosine.clip(-1, 1))).mean() < 2  # millimetre steps
    assert (normals[2][valid] < 0).all()


def test_pairs_carry_the_motion_from_camera_to_camera(scene: Path) -> None:
    reader = SevenScenes(str(scene), frames=3, gap=4, stride=2, height=30, width=40)
    rows = reader.index()
    assert [row["key"] for row in rows] == [
        f"{s}/frame-{n:06d}" for s in ("seq-01", "seq-02") for n in (0, 2)
    ]
    sample = reader.load(rows[1])
    assert set(sample) == set(reader.columns)
    assert sample["image_3"][0, 0, 0] == 100  # frame 2 + 2 * 4
    world = np.array([0.3, -0.2, 4.0, 1.0])
    seen = [np.linalg.inv(turn(0.01 * n)) @ world for n in (2, 6, 10)]
    np.testing.assert_allclose(sample["camera_motion"] @ seen[0], seen[1], atol=1e-5)
    np.testing.assert_allclose(sample["camera_motion_2"] @ seen[1], seen[2], atol=1e-5)


def test_intrinsics_follow_the_size_of_the_frame(scene: Path) -> None:
    sample = SevenScenes(str(scene), height=30, width=40)
    intrinsics = sample.load(sample.index()[0])["intrinsics"]
    # 320 -> (320 + 1/2) / 16 - 1/2: borders stay in place, pixel centres move
    expected = [[585 / 16, 0, 320.5 / 16 - 0.5], [0, 585 / 16, 240.5 / 16 - 0.5], [0, 0, 1]]
    np.testing.assert_allclose(intrinsics, expected, rtol=1e-6)


def test_a_sequence_that_is_not_there_is_named(scene: Path) -> None:
    with pytest.raises(InputError, match="seq-09: no such sequence"):
        SevenScenes(str(scene), ["seq-09"]).index()
    with pytest.raises(InputError, match="no sequences"):
        SevenScenes(str(scene / "seq-01")).index()


def test_a_sequence_too_short_for_a_sample_is_counted_and_named(scene: Path, cache: Path) -> None:
    for file in (scene / "seq-02").glob("frame-0000*[6-9].*"):
        file.unlink()
    for file in (scene / "seq-02").glob("frame-00001*"):
        file.unlink()
    reader = {"name": "seven_scenes", "path": str(scene), "frames": 2, "gap": 10}
    manifest = read_manifest(prepare(DataConfig(reader=reader), name="d", use_ray=False))
    assert manifest["num_rows"] == 2
    assert manifest["errors"] == [
        ["seq-02", "seq-02: the video has 6 frames, a sample needs 2 frames, 10 apart"]
    ]
    with pytest.raises(InputError, match="no sample in any of 1 videos; seq-02: the video has 6"):
        SevenScenes(str(scene), ["seq-02"], frames=2, gap=10).index()


def test_a_file_beside_the_frames_is_none_of_them(scene: Path) -> None:
    frame = scene / "seq-01" / "frame-000000.color.png"
    frame.with_name("frame-000000 (1).color.png").write_bytes(frame.read_bytes())
    assert len(SevenScenes(str(scene), ["seq-01"]).index()) == 12


@pytest.mark.parametrize(
    ("name", "key", "value", "reason"),
    [
        ("seven_scenes", "focal", 0, "more than 0"),
        ("seven_scenes", "focal", -1, "more than 0"),
        ("seven_scenes", "y0", float("inf"), "a finite number"),
        ("nyuv2", "fx", float("nan"), "a finite number"),
        ("nyuv2", "fy", 0, "more than 0"),
    ],
)
def test_a_camera_that_is_none_is_refused(name: str, key: str, value: float, reason: str) -> None:
    with pytest.raises(InputError, match=rf"^reader\.{key}: got .*, expected {reason}"):
        plugins.build("reader", name, {"path": "x", key: value}, "reader")


def test_a_pose_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "frame-000000.pose.txt"
    file.write_text("1 0 0 nan")
    with pytest.raises(ValueError, match=r"pose.txt: got '1 0 0 nan', expected 4x4 finite"):
        read_pose(file)
    write_pose(file, np.diag([1.0, 1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="determinant"):
        read_pose(file)


def test_broken_frames_are_left_out_and_recorded(scene: Path, cache: Path) -> None:
    (scene / "seq-01" / "frame-000002.depth.png").write_bytes(b"not a png")
    (scene / "seq-01" / "frame-000004.depth.png").unlink()
    reader = {"name": "seven_scenes", "path": str(scene), "sequences": ["seq-01"]}
    config = DataConfig(reader=reader, max_corrupt_rows=2)
    folder = prepare(config, name="kitchen", use_ray=False)
    assert folder.parent == cache
    manifest = read_manifest(folder)
    assert manifest["num_rows"] == 10
    assert [where for where, _ in manifest["errors"]] == [
        "seq-01/frame-000002", "seq-01/frame-000004",
    ]  # fmt: skip
    assert "frame-000002.depth.png" in manifest["errors"][0][1]
    with pytest.raises(InputError, match=r"'kitchen': more than 1 rows .*seq-01/frame-000002"):
        prepare(config.model_copy(update={"max_corrupt_rows": 1}), name="kitchen", use_ray=False)


def test_nyuv2_maps_labels_and_depth(rooms: Path) -> None:
    reader = NYUv2(str(rooms), height=60, width=80)
    rows = reader.index()
    assert [row["key"] for row in rows] == ["0003", "0005", "0012"]
    sample = reader.load(rows[0])
    check_sample(sample)
    assert set(sample) == set(reader.columns)
    assert (sample["depth"][0, :30] == 0).all()
    assert (sample["depth"][0, 30:] == 2.5).all()
    assert (sample["segmentation"][0, :, :40] == schema.IGNORE).all()
    assert (sample["segmentation"][0, :, 40:] == 38).all()
    assert sample["intrinsics"][0, 0] == pytest.approx(518.86 / 8)


def test_the_13_classes_of_nyuv2_are_those_of_the_40(rooms: Path) -> None:
    reader = NYUv2(str(rooms), height=60, width=80, class_map="nyu_13")
    labels = reader.load(reader.index()[0])["segmentation"][0]
    assert (labels[:, :40] == schema.IGNORE).all()
    assert (labels[:, 40:] == 5).all()  # stored 38, otherfurniture, is furniture
    table = class_map("nyu_13").table("nyuv2")
    assert {*table[:40]} == set(range(13))
    assert (table[40:] == schema.IGNORE).all()


def test_edges_of_nyuv2_are_where_the_class_changes_and_not_where_it_is_unknown() -> None:
    classes = np.array([[0, 0, 7, 7], [0, 0, 7, 7], [255, 3, 3, 3]], np.uint8)
    expected = [[0, 1, 0, 0], [0, 1, 1, 1], [255, 0, 0, 0]]
    np.testing.assert_array_equal(edges_of(classes), expected)


def test_a_folder_that_is_not_nyuv2_is_named(rooms: Path) -> None:
    with pytest.raises(InputError, match=r"test/rgb: no NYUv2 images"):
        NYUv2(str(rooms), split="test").index()


def test_a_changed_file_changes_the_fingerprint(rooms: Path) -> None:
    reader = NYUv2(str(rooms))
    before = reader.fingerprint()
    assert before == NYUv2(str(rooms)).fingerprint()
    (rooms / "train" / "label40" / "0005.png").unlink()
    assert reader.fingerprint() != before
    assert fingerprint_files(rooms, []) != fingerprint_files(rooms / "train", [])


def test_real_7scenes_depth_agrees_with_its_poses(data_root: Path) -> None:
    """Points of frame 1, moved by the camera's motion, lie on the depth of frame 2."""
    reader = SevenScenes(str(data_root / "7scenes" / "redkitchen"), frames=2, gap=10, stride=20)
    errors, still = [], []
    for row in reader.index():
        sample = {k: torch.from_numpy(v)[None] for k, v in reader.load(row).items()}
        depth, depth_2, k = sample["depth"], sample["depth_2"], sample["intrinsics"]
        identity = torch.eye(4)[None]
        for motion, found in ((sample["camera_motion"], errors), (identity, still)):
            points = camera.transform(motion, camera.backproject(depth, k))
            pixels, z = camera.project(points, k)
            grid = 2 * (pixels + 0.5) / torch.tensor([128.0, 96.0])[:, None, None] - 1
            sampled = torch.nn.functional.grid_sample(
                depth_2, grid.permute(0, 2, 3, 1), mode="nearest", align_corners=False
            )
            valid = (depth > 0) & (sampled > 0)
            found.append(((sampled - z).abs() / z)[valid].median().item())
    assert np.mean(errors) < 0.02
    assert np.mean(errors) < 0.5 * np.mean(still)


def test_real_7scenes_normals_hold_from_frame_to_frame(data_root: Path) -> None:
    reader = SevenScenes(str(data_root / "7scenes" / "redkitchen"), frames=2, gap=1, stride=20)
    for row in reader.index():
        sample = reader.load(row)
        normals, normals_2 = sample["normals"], sample["normals_2"]
        valid = (np.abs(normals).sum(0) > 0) & (np.abs(normals_2).sum(0) > 0)
        moved = np.einsum("ij,jhw->ihw", sample["camera_motion"][:3, :3], normals)
        cosine = (moved * normals_2).sum(0)[valid].clip(-1, 1)
        assert valid.mean() > 0.7
        assert np.degrees(np.median(np.arccos(cosine))) < 6


def test_real_nyuv2_is_converted_whole(data_root: Path, cache: Path) -> None:
    reader = {"name": "nyuv2", "path": str(data_root / "nyuv2"), "split": "test"}
    config = DataConfig(reader=reader, limit=32)
    folder = prepare(config, name="nyu", use_ray=False)
    source = load_in_process(folder, config, ["depth", "segmentation"]).open()
    columns = source.take(range(32))
    assert (columns["error"] == "").all()
    assert 0.5 < np.median(columns["depth"]) < 6
    labels = columns["segmentation"]
    assert set(np.unique(labels[labels != schema.IGNORE])) <= set(range(39))


def test_nyuv2_labels_above_a_byte_are_refused_and_do_not_wrap(rooms: Path) -> None:
    labels = np.full((240, 320), 256, np.uint16)
    Image.fromarray(labels).save(rooms / "train" / "label40" / "0003.png")
    reader = NYUv2(str(rooms))
    with pytest.raises(ValueError, match=r"^0003.png: got label id 256, expected 0 to 254, or 255"):
        reader.load(reader.index()[0])


def test_a_label_map_turned_against_its_image_is_refused(rooms: Path) -> None:
    Image.fromarray(np.zeros((320, 240), np.uint8)).save(rooms / "train" / "label40" / "0003.png")
    reader = NYUv2(str(rooms))
    with pytest.raises(ValueError, match=r"0003.png: got 320x240 pixels, .* EXIF orientation"):
        reader.load(reader.index()[0])


def test_single_frames_of_seven_scenes_need_no_poses(scene: Path) -> None:
    for file in scene.glob("seq-0*/*.pose.txt"):
        if file.name == "frame-000003.pose.txt":
            file.write_text("nan nan nan nan\n" * 4)
        else:
            file.unlink()
    reader = SevenScenes(str(scene))
    for row in (reader.index()[0], reader.index()[3]):
        assert set(reader.load(row)) == set(reader.columns)
    pairs = SevenScenes(str(scene), frames=2)
    with pytest.raises(FileNotFoundError):
        pairs.load(pairs.index()[0])
