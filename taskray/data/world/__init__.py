"""The embedded world: procedural scenes, ray cast, with exact truth for every quantity.

``scene`` places and moves bodies, ``views`` moves cameras, ``render`` casts their rays, ``truth``
computes the columns of ``schema`` and ``appearance`` with ``texture`` the colours; ``lidar``
measures the same scenes with a laser. Nothing is downloaded; the same arguments always give the
same data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from taskray.data.readers.labelling import WhichRows, mark_labelled
from taskray.data.readers.reader import Reader, Row, Sample
from taskray.data.world.appearance import Look, build_look
from taskray.data.world.lidar import LidarSensor, lidar_columns
from taskray.data.world.render import Snapshot
from taskray.data.world.scene import CLASSES, MOVABLE, Domain, Kind, Scene, build_scene
from taskray.data.world.truth import camera_motion, image_of, labels_of, motion_of, take_frame
from taskray.data.world.views import (
    CLIP_LENGTH,
    FOCAL_LENGTH,
    View,
    camera_matrix,
    clip_views,
)
from taskray.errors import InputError
from taskray.job.config import Fraction
from taskray.schema import INVALID, frame_suffix, quantity_of

__all__ = ["CLASSES", "MOVABLE", "LidarSensor", "World"]

Split = Literal["train", "validation", "test"]
_VERSION = 2
"""Raise it when the same arguments give other data than before."""
_DOMAINS, _SPLITS = ("sim", "real"), ("train", "validation", "test")
_LIDAR_STREAM = 0x11DA2


class World(Reader):
    """Frames, pairs or triplets of rooms and streets; the default dataset.

    Every sample is a separate clip: a camera at a random place in a scene, moving 0.15-0.4 m and
    about half a degree per frame while some bodies move. A sample depends only on ``seed``,
    ``domain``, ``split``, its number, ``frames_per_scene`` and ``scenes``. Classes are
    :data:`CLASSES`; those that can move are :data:`MOVABLE`.

    Args:
        domain: both are synthetic, in two rendering styles. ``sim`` has flat colours and clean
            light; ``real`` has another palette, textures, shadows, haze, vignette and noise, and
            slightly fuller scenes.
        split: ``train``, ``validation`` and ``test`` share no scene; the two domains neither.
        num_samples: rows of the dataset; a longer dataset begins with the rows of a shorter one
            (if ``label_fraction`` is less than 1, other rows keep their labels).
        height: of frames, in pixels.
        width: of frames, in pixels.
        focal: focal length in frame widths; 0.8 is a field of view of 64 degrees across.
        frames: 1 (frames), 2 (pairs with motion) or 3 (triplets).
        seed: of everything; another seed is another world.
        label_fraction: fraction of samples that keep their labels, chosen by ``seed``; a smaller
            fraction is a subset of a larger one. The labels of the other samples are invalid;
            their boxes are all NaN, as in a sample without objects: use ``rows`` to separate them.
        frames_per_scene: samples that share a scene.
        rows: ``labelled`` or ``unlabelled`` keeps only those of the ``num_samples`` rows.
        scenes: ``rooms`` or ``streets``, ``any`` of the two, or ``traffic``: wide squares with
            some ten cars within 35 m on all sides, for detection.
        cameras: false leaves out the columns of cameras, which are most of the work.
        lidar: include LiDAR sweeps, the boxes of movable objects, and the sensor's motion.
        sensor: settings of the LiDAR; see :class:`LidarSensor`.
        lidar_points: rows of ``points``; of more returns a random subset is kept.
        max_boxes: rows of ``boxes``; of more boxes the nearest are kept.
        min_box_points: boxes of bodies with fewer kept returns are left out.
        static: the same scenes with only the camera moving.
        varied: of the domain ``sim``: colours, textures, light, air and camera at random from scene
            to scene (domain randomisation), instead of flat colours and clean light.
    """

    def __init__(
        self,
        domain: Domain = "sim",
        split: Split = "train",
        num_samples: Annotated[int, Field(ge=1)] = 1024,
        height: Annotated[int, Field(ge=8, le=2048)] = 64,
        width: Annotated[int, Field(ge=8, le=2048)] = 96,
        focal: Annotated[float, Field(gt=0.2, le=5.0)] = FOCAL_LENGTH,
        frames: Literal[1, 2, 3] = 1,
        seed: Annotated[int, Field(ge=0)] = 0,
        label_fraction: Fraction = 1.0,
        frames_per_scene: Annotated[int, Field(ge=1)] = 8,
        rows: WhichRows = "all",
        scenes: Kind = "any",
        cameras: bool = True,
        lidar: bool = False,
        sensor: LidarSensor | None = None,
        lidar_points: Annotated[int, Field(ge=1)] = 8192,
        max_boxes: Annotated[int, Field(ge=1)] = 32,
        min_box_points: Annotated[int, Field(ge=1)] = 5,
        static: bool = False,
        varied: bool = False,
    ) -> None:
        if varied and domain != "sim":
            raise InputError("varied", f"got true, expected false in the domain {domain!r}")
        if not (cameras or lidar):
            raise InputError("lidar", "got false, expected true because cameras is false")
        self.domain, self.split, self.seed = domain, split, seed
        self.num_samples, self.frames_per_scene = num_samples, frames_per_scene
        self.size, self.frames, self.label_fraction = (height, width), frames, label_fraction
        self.focal, self.which, self.scenes = focal, rows, scenes
        self.static, self.varied = static, varied
        self.cameras, self.sensor = cameras, (sensor or LidarSensor()) if lidar else None
        self.room = {
            "num_points": lidar_points, "max_boxes": max_boxes, "min_box_points": min_box_points
        }  # fmt: skip
        self.columns = columns_of(frames, cameras, lidar)
        self.unlabelled = label_fraction < 1 and rows != "labelled"

    def index(self) -> list[Row]:
        rows: list[Row] = []
        for number in range(self.num_samples):
            scene, frame = divmod(number, self.frames_per_scene)
            key = f"{self.domain}-{self.split}-{self.seed}-{scene:06d}-{frame:04d}"
            rows.append({"key": key, "scene": scene, "frame": frame})
        return mark_labelled(rows, self.label_fraction, self.seed, self.which)

    def load(self, row: Row) -> Sample:
        names = (self.seed, self.domain, self.split, row["scene"])
        scene, look, snapshots = _build(*names, self.scenes, self.static, self.varied)
        rng = _rng(*names, 1 + row["frame"])
        views = clip_views(rng, scene, snapshots)
        noises = rng.spawn(CLIP_LENGTH)
        views = views[: self.frames]
        sample: Sample = {}
        if self.cameras:
            sample |= self._camera_columns(views, snapshots, look, noises)
        if self.sensor is not None:
            stream = _rng(*names, 1 + row["frame"], _LIDAR_STREAM)
            sample |= lidar_columns(scene, snapshots, views, self.sensor, stream, **self.room)
        if not row["labelled"]:
            for name, values in sample.items():
                if quantity_of(name) in INVALID:
                    values.fill(INVALID[quantity_of(name)])
        return {name: sample[name] for name in self.columns}

    def group(self, rows: Sequence[Row]) -> Iterable[Sequence[Row]]:
        """Whole scenes, because their samples share the work of building them."""
        scenes = max(1, 16 // self.frames_per_scene)
        return [list(group) for _, group in groupby(rows, lambda row: row["scene"] // scenes)]

    def fingerprint(self) -> Any:
        return {"world": _VERSION}

    def _camera_columns(
        self,
        views: Sequence[View],
        snapshots: Sequence[Snapshot],
        look: Look,
        noises: Sequence[np.random.Generator],
    ) -> Sample:
        taken = [
            take_frame(view, snapshot, self.size, self.focal)
            for view, snapshot in zip(views, snapshots, strict=False)
        ]
        sample: Sample = {"intrinsics": camera_matrix(*self.size, self.focal).astype(np.float32)}
        for number, frame in enumerate(taken):
            suffix = frame_suffix(number + 1)
            sample["image" + suffix] = image_of(frame, look, noises[number])
            sample |= {name + suffix: values for name, values in labels_of(frame).items()}
            if number + 1 < len(taken):
                after = taken[number + 1]
                sample["camera_motion" + suffix] = camera_motion(frame, after)
                sample["object_motion" + suffix], mask = motion_of(frame, after)
                sample["motion_mask" + suffix] = mask
            if number > 0:
                back, mask = motion_of(frame, taken[number - 1])
                sample["object_motion_back" + suffix] = back
                sample["motion_mask" + suffix] = mask
        return sample


def columns_of(frames: int, cameras: bool = True, lidar: bool = False) -> tuple[str, ...]:
    """Columns of a world row of 1, 2 or 3 frames."""
    seen = ["image", "depth", "normals", "segmentation", "edges"] if cameras else []
    measured = ["points", "boxes"] if lidar else []
    columns = [*seen, *(["intrinsics"] if cameras else []), *measured]
    for number in range(1, frames):
        before, here = frame_suffix(number), frame_suffix(number + 1)
        columns += [name + here for name in seen]
        if cameras:
            columns += ["camera_motion" + before, "object_motion" + before]
            columns += ["motion_mask"] if number == 1 else []
            columns += ["object_motion_back" + here, "motion_mask" + here]
        columns += [name + here for name in measured]
        columns += ["lidar_motion" + before] if lidar else []
    return tuple(columns)


def _rng(seed: int, domain: str, split: str, scene: int, *what: int) -> np.random.Generator:
    """The random generator of one scene (``what`` 0) or of one of its clips (1, 2 ...)."""
    names = [seed, _DOMAINS.index(domain), _SPLITS.index(split), scene]
    return np.random.default_rng([*names, *what])


@lru_cache(maxsize=2)
def _build(
    seed: int,
    domain: Domain,
    split: str,
    number: int,
    kind: Kind,
    static: bool,
    varied: bool,
) -> tuple[Scene, Look, tuple[Snapshot, ...]]:
    """A scene, its look, and its snapshots at the times of a clip."""
    rng = _rng(seed, domain, split, number, 0)
    scene = build_scene(rng, domain, kind)
    if static:
        still = (replace(body, velocity=(0.0, 0.0), spin=0.0) for body in scene.bodies)
        scene = replace(scene, bodies=tuple(still))
    look = build_look(rng, scene, domain, varied)
    return scene, look, tuple(Snapshot(scene, time) for time in range(CLIP_LENGTH))
