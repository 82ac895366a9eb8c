"""What the consistency relations cost: forward and backward, against a depth network's own step.

The yardstick is a supervised training step (forward, loss, backward, clipping, Adam) of the
``encoder_decoder`` depth network with a ResNet-18, on the same frames, batch and threads. A
relation is measured as each task meets it: its own quantities live, its peers' detached; two
frames make one sample of a relation between frames. All take turns in one process, so that
whatever else the machine does touches all alike.

``ratio`` is the median time of the costliest of those over the median time of the step; target:
below 0.15 for each relation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import finish, median, parse, parser, say
from torch import Tensor

from taskray.consistency.depth_normals import DepthNormals
from taskray.consistency.relation import Relation
from taskray.consistency.scene_photometric import ScenePhotometric
from taskray.consistency.segmentation_warp import SegmentationWarp
from taskray.geometry.motion import rigid_motion
from taskray.models.encoder_decoder import EncoderDecoder
from taskray.tasks.depth import Depth

QUICK = {"height": 32, "width": 64, "batch": 1, "repetitions": 2}
NUM_CLASSES = 8
RELATIONS: dict[str, Callable[[], Relation]] = {
    "depth_normals": DepthNormals,
    "scene_photometric (static)": lambda: ScenePhotometric(object_motion=False),
    "scene_photometric (motion)": lambda: ScenePhotometric(segmentation=False),
    "scene_photometric": lambda: ScenePhotometric(movable="taskology"),
    "segmentation_warp": lambda: SegmentationWarp(movable="taskology"),
}
TASKS = {
    "depth": ("depth", "depth_2"),
    "normals": ("normals",),
    "motion": ("camera_motion", "camera_motion_back_2", "object_motion", "object_motion_back_2"),
    "segmentation": ("segmentation", "segmentation_2"),
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


def training_step(data: dict[str, Tensor]) -> Callable[[], None]:
    """One supervised step of the depth network."""
    task, network = Depth(loss="log_mse"), EncoderDecoder(3, 1, backbone="resnet18")
    optimizer = torch.optim.Adam(network.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = task.loss(task.predict(network(data["image"])), data)["log_mse"]
        torch.autograd.backward(loss)
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
    data = columns(settings.batch, settings.height, settings.width)
    steps: dict[tuple[str, str], Callable[[], None]] = {("step", ""): training_step(data)}
    for name, make in RELATIONS.items():
        relation = make()
        for task, quantities in TASKS.items():
            live = [q for q in quantities if q in relation.quantities]
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
    own = middle.pop(("step", ""))
    relations: dict[str, dict[str, Any]] = {}
    for (name, task), milliseconds in middle.items():
        relations.setdefault(name, {"ms": {}})["ms"][task] = milliseconds
    for relation in relations.values():
        relation["ratio"] = max(relation["ms"].values()) / own
    return {"step_ms": own, "relations": relations, "target_ratio": 0.15}


def main(given: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--height", type=int, default=128, help="of frames, in pixels")
    arguments.add_argument("--width", type=int, default=416, help="of frames, in pixels")
    arguments.add_argument("--batch", type=int, default=4, help="frames, or pairs, in a batch")
    arguments.add_argument("--threads", type=int, default=1, help="of torch")
    arguments.add_argument("--repetitions", type=int, default=10, help="of each measurement")
    settings = parse(arguments, given, QUICK)
    torch.manual_seed(0)
    torch.set_num_threads(settings.threads)
    finish("relations", measure(settings), settings)


if __name__ == "__main__":
    main()
