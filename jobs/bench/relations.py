"""What the consistency relations cost: forward and backward, against a network's own step.

The yardstick is a supervised training step (forward, loss, backward, clipping, Adam) with the
same batch and threads, of the ``encoder_decoder`` depth network with a ResNet-18 on the same
frames. A relation is measured as each task meets it: its own quantities live, its peers'
detached; two frames, or three sweeps, make one sample of a relation between frames. All take
turns in one process, so that whatever else the machine does touches all alike.

``ratio`` is the median time of the costliest of those over the median time of the step; target:
below 0.15 for each relation. ``motion_consistency`` ties sweeps of a LiDAR, whose networks are
smaller: ``ratio_of_detection_step`` compares it with a step of the ``pillars`` network of
``jobs/detection_flow.yaml`` on one sweep and the same grid, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import finish, median, parse, parser, say
from torch import Tensor, nn

from taskray.geometry.grid import Grid
from taskray.geometry.motion import rigid_motion
from taskray.models.encoder_decoder import EncoderDecoder
from taskray.models.pillars import Pillars
from taskray.relations.depth_normals import DepthNormals
from taskray.relations.motion_consistency import MotionConsistency
from taskray.relations.relation import Relation
from taskray.relations.scene_photometric import ScenePhotometric
from taskray.relations.segmentation_warp import SegmentationWarp
from taskray.tasks.depth import Depth
from taskray.tasks.detection import CHANNELS, Detection
from taskray.tasks.task import Task

QUICK = {"height": 32, "width": 64, "cell": 2.0, "points": 200, "batch": 1, "repetitions": 2}
AREA = {"x": (-24.0, 24.0), "y": (-16.0, 16.0), "z": (-2.5, 1.0)}
"""What the maps of sweeps show, in metres."""
NUM_CLASSES = 8
RELATIONS: dict[str, Callable[[Grid], Relation]] = {
    "depth_normals": lambda _: DepthNormals(),
    "depth_normals (bend)": lambda _: DepthNormals(bend=0.03),
    "scene_photometric (static)": lambda _: ScenePhotometric(object_motion=False),
    "scene_photometric (motion)": lambda _: ScenePhotometric(segmentation=False),
    "scene_photometric": lambda _: ScenePhotometric(movable="taskology"),
    "segmentation_warp": lambda _: SegmentationWarp(movable="taskology"),
    "motion_consistency": MotionConsistency,
}
TASKS = {
    "depth": ("depth", "depth_2"),
    "normals": ("normals",),
    "motion": ("camera_motion", "camera_motion_back_2", "object_motion", "object_motion_back_2"),
    "segmentation": ("segmentation", "segmentation_2"),
    "detection": ("detection", "detection_2", "detection_3"),
    "flow": ("box_flow_3",),
}


def columns(batch: int, height: int, width: int) -> dict[str, Tensor]:
    """Plausible quantities and inputs of a batch of pairs: most points stay in view."""
    f = 0.8 * width
    k = torch.tensor([[f, 0.0, (width - 1) / 2], [0.0, f, (height - 1) / 2], [0.0, 0.0, 1.0]])
    found = {"intrinsics": k.expand(batch, 3, 3).contiguous()}
    for frame, back in (("", ""), ("_2", "_back_2")):
        found["image" + frame] = torch.rand(batch, 3, height, width)
        found["depth" + frame] = 5 + 5 * torch.rand(batch, 1, height, width)
        found["normals" + frame] = torch.randn(batch, 3, height, width)
        found["segmentation" + frame] = torch.randn(batch, NUM_CLASSES, height, width)
        found["object_motion" + back] = 0.1 * torch.randn(batch, 3, height, width)
        found["camera_motion" + back] = rigid_motion(
            0.01 * torch.randn(batch, 3), 0.2 * torch.randn(batch, 3)
        )
    return found


def sweeps(batch: int, points: int, grid: Grid) -> dict[str, Tensor]:
    """Plausible maps of a batch of triplets, and a sweep with eight cars for the detection's own
    step."""
    low, high = torch.tensor([AREA[axis] for axis in "xyz"]).T
    found = {
        f"detection{s}": torch.randn(batch, 2, CHANNELS, *grid.shape) for s in ("", "_2", "_3")
    }
    found["box_flow_3"] = torch.randn(batch, 2, 6, *grid.shape)
    places = low + (high - low) * torch.rand(batch, points, 3)
    found["points"] = torch.cat([places, torch.rand(batch, points, 1)], dim=2)
    rest = torch.tensor([-1.0, 3.9, 1.6, 1.56, 0.3, 0.0, 0.0]).expand(batch, 8, 7)
    found["boxes"] = torch.cat([places[:, :8, :2], rest], dim=2)
    return found


def training_step(task: Task, network: nn.Module, data: dict[str, Tensor]) -> Callable[[], None]:
    """One supervised step of a network."""
    optimizer = torch.optim.Adam(network.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        terms = task.loss(task.predict(network(task.network_input(data))), data)
        torch.autograd.backward(torch.stack(list(terms.values())).sum())
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


def relation_step(
    relation: Relation, data: dict[str, Tensor], live: Sequence[str]
) -> Callable[[], None]:
    """Loss and gradient of a relation with these quantities live."""
    leaves = {q: data[q].clone().requires_grad_() for q in live}

    def step() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        terms = relation({**data, **leaves}, data)
        torch.autograd.backward(torch.stack(list(terms.values())).sum())

    return step


def measure(settings: Any) -> dict[str, Any]:
    """Median times in milliseconds, and the ratios."""
    grid = Grid(**AREA, cell=settings.cell)
    data = columns(settings.batch, settings.height, settings.width)
    data |= sweeps(settings.batch, settings.points, grid)
    depth, detection = Depth(loss="log_mse"), Detection(grid)
    resnet = EncoderDecoder(3, {"depth": 1}, backbone="resnet18")
    pillars = Pillars(4, detection.out_channels, grid, channels=16, layers=[2, 3, 3])
    steps: dict[tuple[str, str], Callable[[], None]] = {
        ("step", "depth"): training_step(depth, resnet, data),
        ("step", "detection"): training_step(detection, pillars, data),
    }
    for name, make in RELATIONS.items():
        relation = make(grid)
        for task, quantities in TASKS.items():
            live = [q for q in quantities if q in {*relation.quantities} - {*relation.constant}]
            if live:
                steps[name, task] = relation_step(relation, data, live)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for repetition in range(-1, settings.repetitions):  # the first one warms up
        for key, step in steps.items():
            began = time.process_time()
            step()
            if repetition >= 0:
                times[key].append(1e3 * (time.process_time() - began))
        say(f"repetition {repetition + 1} of {settings.repetitions}")
    middle = {key: median(values) for key, values in times.items()}
    own, own_of_sweeps = (middle.pop(("step", task)) for task in ("depth", "detection"))
    relations: dict[str, dict[str, Any]] = {}
    for (name, task), milliseconds in middle.items():
        relations.setdefault(name, {"ms": {}})["ms"][task] = milliseconds
    for relation in relations.values():
        costliest = max(relation["ms"].values())
        relation["ratio"] = costliest / own
        if "detection" in relation["ms"]:
            relation["ratio_of_detection_step"] = costliest / own_of_sweeps
    return {
        "step_ms": own,
        "detection_step_ms": own_of_sweeps,
        "relations": relations,
        "target_ratio": 0.15,
    }


def main(given: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--height", type=int, default=128, help="of frames, in pixels")
    arguments.add_argument("--width", type=int, default=416, help="of frames, in pixels")
    arguments.add_argument("--cell", type=float, default=0.5, help="of maps of sweeps, in metres")
    arguments.add_argument("--points", type=int, default=8192, help="of a sweep")
    arguments.add_argument("--batch", type=int, default=4, help="frames, pairs or triplets a batch")
    arguments.add_argument("--threads", type=int, default=1, help="of torch")
    arguments.add_argument("--repetitions", type=int, default=10, help="of each measurement")
    settings = parse(arguments, given, QUICK)
    torch.manual_seed(0)
    torch.set_num_threads(settings.threads)
    finish("relations", measure(settings), settings)


if __name__ == "__main__":
    main()
