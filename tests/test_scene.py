"""Scenes in motion: the photometric relation and the warped segmentation, against the truth of the
world, against an implementation in plain loops, and against finite differences of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scenes import CAR, Columns, moving_ball, moving_square, world_pairs
from torch import Tensor
from torch.nn import functional

from taskray.data.readers.class_map import class_map
from taskray.data.world import CLASSES, World
from taskray.errors import InputError
from taskray.geometry.motion import rigid_motion
from taskray.geometry.warp import invert
from taskray.job import plugins
from taskray.relations.relation import Relation
from taskray.relations.scene_photometric import ScenePhotometric
from taskray.relations.segmentation_warp import SegmentationWarp
from taskray.relations.two_views import FRAMES
from taskray.tasks.depth import Depth
from taskray.tasks.segmentation import Segmentation

TERMS = (
    "rgb", "ssim", "depth", "smoothness", "rotation_cycle", "translation_cycle",
    "motion_smoothness",
)  # fmt: skip
PRIORS = {"smoothness", "motion_smoothness"}
"""Terms that do not vanish on the truth."""


def only(*terms: str, **arguments: Any) -> ScenePhotometric:
    return ScenePhotometric(**{t: 1.0 if t in terms else 0.0 for t in TERMS}, **arguments)


def at_rest(columns: Columns) -> Columns:
    """The same with a camera, and things, that do not move: the identity warp."""
    identity = torch.eye(4).expand(len(columns["depth"]), 4, 4)
    return columns | {
        "camera_motion": identity,
        "camera_motion_back_2": identity,
        "object_motion": torch.zeros_like(columns["object_motion"]),
        "object_motion_back_2": torch.zeros_like(columns["object_motion_back_2"]),
    }


# ---- a second implementation, one pixel at a time ---------------------------------------------


class Reference:
    """Both relations in loops over pixels, float64. What the relation takes as constant (masks,
    SSIM's weights, the cycle's pixels) can be frozen at another point: ``constants``."""

    def __init__(
        self,
        predictions: Columns,
        batch: Columns,
        movable: list[int] | None,
        moving: bool,
        average: str = "visible",
    ) -> None:
        self.average = average
        self.p = {name: value.detach().double().numpy() for name, value in predictions.items()}
        self.b = {name: value.double().numpy() for name, value in batch.items()}
        self.moving = moving
        self.count, _, self.h, self.w = self.p["depth"].shape
        self.mask = {
            k: np.isin(self.p["segmentation" + k].argmax(1), movable).astype(float)
            if movable is not None
            else np.ones((self.count, self.h, self.w))
            for k in ("", "_2")
        }
        self.constants = self.find_constants()

    def quantities(self, n: int, here: str) -> tuple[Any, ...]:
        """K, R, T, z, m delta and the other direction's R, T, m delta of sample n."""
        there = "_2" if here == "" else ""
        names = {"": ("camera_motion", "object_motion")}
        names["_2"] = ("camera_motion_back_2", "object_motion_back_2")
        motion, back = (self.p[names[k][0]][n] for k in (here, there))
        shape = (3, self.h, self.w)
        field, field_back = (
            self.mask[k][n] * self.p[names[k][1]][n] if self.moving else np.zeros(shape)
            for k in (here, there)
        )
        depth = self.p["depth" + here][n, 0]
        return self.b["intrinsics"][n], motion, depth, field, back, field_back

    def warped(self, n: int, here: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Column and row in the other frame, depth there, and whether they are valid."""
        k, motion, depth, field, _, _ = self.quantities(n, here)
        pixels, z = np.zeros((2, self.h, self.w)), np.zeros((self.h, self.w))
        for i in range(self.h):
            for j in range(self.w):
                point = depth[i, j] * np.linalg.inv(k) @ np.array([j, i, 1.0])
                point = motion[:3, :3] @ point + motion[:3, 3] + field[:, i, j]
                z[i, j] = point[2]
                pixels[:, i, j] = (k @ point / max(point[2], 1e-3))[:2]
        inside = (pixels > -1e-3).all(0) & (pixels[0] < self.w - 0.999)
        return pixels, z, inside & (pixels[1] < self.h - 0.999) & (z > 1e-3) & (depth > 0)

    def sampled(self, values: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """Bilinear, the border repeated."""
        result = np.zeros((len(values), self.h, self.w))
        for i in range(self.h):
            for j in range(self.w):
                x = float(np.clip(pixels[0, i, j], 0, self.w - 1))
                y = float(np.clip(pixels[1, i, j], 0, self.h - 1))
                left, top = min(int(x), self.w - 2), min(int(y), self.h - 2)
                u, v = x - left, y - top
                result[:, i, j] = (
                    (1 - u) * (1 - v) * values[:, top, left]
                    + u * (1 - v) * values[:, top, left + 1]
                    + (1 - u) * v * values[:, top + 1, left]
                    + u * v * values[:, top + 1, left + 1]
                )
        return result

    def find_constants(self) -> dict[tuple[int, str], tuple[np.ndarray, ...]]:
        found = {}
        for n in range(self.count):
            for here, there in (("", "_2"), ("_2", "")):
                pixels, z, valid = self.warped(n, here)
                apart = self.sampled(self.p["depth" + there][n], pixels)[0] - z
                visible = valid & (apart >= 0)
                scale = (apart**2)[visible].sum() / max(visible.sum(), 1) + 1e-4
                found[n, here] = (visible, valid * scale / (apart**2 + scale), pixels)
        return found

    def terms(self) -> dict[str, float]:
        """Every term of the photometric relation, unweighted, and ``logits``."""
        total = dict.fromkeys((*TERMS, "logits"), 0.0)
        for n in range(self.count):
            for here, there in (("", "_2"), ("_2", "")):
                for term, value in self.one_direction(n, here, there).items():
                    total[term] += value / self.count / self.share(term, here)
        return total

    def share(self, term: str, here: str) -> float:
        """What a mean over all pixels is divided by: the part of them, or of SSIM's weights, that
        counts in the batch."""
        if self.average == "all" or term in PRIORS | {"rotation_cycle"}:
            return 1.0
        counts = [self.constants[n, here][term == "ssim"] for n in range(self.count)]
        return float(np.mean(counts))

    def one_direction(self, n: int, here: str, there: str) -> dict[str, float]:
        _, motion, depth, field, back, field_back = self.quantities(n, here)
        visible, weight, frozen = self.constants[n, here]
        pixels, z, _ = self.warped(n, here)
        image = self.b["image" + here][n]
        image_there = self.sampled(self.b["image" + there][n], pixels)
        depth_there = self.sampled(self.p["depth" + there][n], pixels)[0]
        logits = self.p["segmentation" + here][n]
        logits_there = self.sampled(self.p["segmentation" + there][n], pixels)
        r, t = motion[:3, :3], field + motion[:3, 3][:, None, None]
        r_back = back[:3, :3]
        t_back = self.sampled(field_back, frozen) + back[:3, 3][:, None, None]
        eye = np.eye(3)
        rotation = ((r_back @ r - eye) ** 2).sum() / (
            ((r - eye) ** 2).sum() + ((r_back - eye) ** 2).sum() + 1e-8
        )
        returned = ((np.einsum("ij,jhw->ihw", r_back, t) + t_back) ** 2).sum(0)
        translation = returned / ((t**2).sum(0) + (t_back**2).sum(0) + 1e-8)
        return {
            "rgb": float((visible * np.abs(image_there - image)).mean()),
            "depth": float((visible * np.abs(depth_there - z)).mean()),
            "ssim": 0.5 * self.ssim(image_there, image, weight),
            "smoothness": self.smoothness(depth, image),
            "rotation_cycle": float(rotation),
            "translation_cycle": float((visible * translation).mean()),
            "motion_smoothness": self.motion_smoothness(n, here, t),
            "logits": float((visible * (logits_there - logits) ** 2).mean()),
        }

    def ssim(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
        total = 0.0
        for i in range(1, self.h - 1):
            for j in range(1, self.w - 1):
                window = np.s_[i - 1 : i + 2, j - 1 : j + 2]
                share = weight[window] + 0.01
                share = share / share.sum()
                for a, b in zip(x, y, strict=True):
                    mean_a, mean_b = (share * a[window]).sum(), (share * b[window]).sum()
                    var_a = (share * (a[window] - mean_a) ** 2).sum()
                    var_b = (share * (b[window] - mean_b) ** 2).sum()
                    both = (share * (a[window] - mean_a) * (b[window] - mean_b)).sum()
                    similar = (2 * both + 9e-6) / (var_a + var_b + 9e-6)
                    total += weight[window].mean() * np.clip((1 - similar) / 2, 0, 1)
        return float(total / (len(x) * (self.h - 2) * (self.w - 2)))

    def smoothness(self, depth: np.ndarray, image: np.ndarray) -> float:
        disparity = 1 / depth / (1 / depth).mean()
        x = np.abs(np.diff(disparity, axis=1)) * np.exp(-np.abs(np.diff(image, axis=2)).mean(0))
        y = np.abs(np.diff(disparity, axis=0)) * np.exp(-np.abs(np.diff(image, axis=1)).mean(0))
        return float(x.mean() + y.mean())

    def motion_smoothness(self, n: int, here: str, t: np.ndarray) -> float:
        if not self.moving:
            return 0.0
        delta = self.p["object_motion" if here == "" else "object_motion_back_2"][n]
        m = self.mask[here][n]
        x = np.abs(np.diff(delta, axis=2)) * m[:, 1:] * m[:, :-1]
        y = np.abs(np.diff(delta, axis=1)) * m[1:] * m[:-1]
        return float((x.mean() + y.mean()) / np.sqrt((t**2).sum(0).mean() + 1e-8))


def random_scene(height: int = 7, width: int = 9, count: int = 2) -> tuple[Columns, Columns]:
    """Predictions that agree with nothing, but keep most points in view."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator, dtype=torch.float64)

    f = 0.9 * width
    k = torch.tensor([[f, 0.3, 0.45 * width], [0, 1.2 * f, 0.5 * height], [0, 0, 1]]).double()
    predictions = {
        name: rigid_motion(0.1 * draw(3) - 0.05, 0.6 * draw(3) - 0.3)
        for name in ("camera_motion", "camera_motion_back_2")
    }
    for suffix, back in (("", ""), ("_2", "_back_2")):
        predictions["depth" + suffix] = 2 + 2 * draw(1, height, width)
        predictions["object_motion" + back] = 0.6 * draw(3, height, width) - 0.3
        predictions["segmentation" + suffix] = 4 * draw(5, height, width)
    images = {name: draw(3, height, width) for name in ("image", "image_2")}
    return predictions, images | {"intrinsics": k.expand(count, 3, 3)}


@pytest.mark.parametrize("average", ["visible", "all"])
@pytest.mark.parametrize("movable", [None, [1, 3]], ids=["all movable", "some movable"])
@pytest.mark.parametrize("moving", [True, False], ids=["things move", "static"])
def test_every_term_agrees_with_the_implementation_in_loops(
    movable: list[int] | None, moving: bool, average: Any
) -> None:
    predictions, batch = random_scene()
    reference = Reference(predictions, batch, movable, moving, average).terms()
    arguments: dict[str, Any] = {
        "object_motion": moving, "segmentation": movable is not None, "average": average
    }  # fmt: skip
    if movable is not None:
        arguments["movable"] = movable
    terms = only(*TERMS, **arguments)(predictions, batch)
    assert set(terms) == {t for t in TERMS if moving or t != "motion_smoothness"}
    for term, value in terms.items():
        assert float(value) == pytest.approx(reference[term], rel=1e-9), term
        assert value > 0
    if movable is not None:
        (logits,) = SegmentationWarp(moving, movable, average)(predictions, batch).values()
        assert float(logits) == pytest.approx(reference["logits"], rel=1e-9)


def test_single_precision_agrees_with_double() -> None:
    scene = moving_ball()
    relation = ScenePhotometric()
    double = relation(scene.truth, scene.batch)
    single = relation(*({n: v.float() for n, v in c.items()} for c in (scene.truth, scene.batch)))
    for term in ("ssim", "smoothness", "translation_cycle"):
        assert float(single[term]) == pytest.approx(float(double[term]), rel=0.02), term


LIVE = (
    "depth", "depth_2", "camera_motion", "camera_motion_back_2", "object_motion",
    "object_motion_back_2", "segmentation", "segmentation_2",
)  # fmt: skip


@pytest.mark.parametrize("live", LIVE)
def test_gradients_equal_finite_differences_of_the_implementation_in_loops(live: str) -> None:
    predictions, batch = random_scene(6, 7, 1)
    movable = [1, 3]
    base = Reference(predictions, batch, movable, True)
    relations = {
        **{term: only(term, movable=movable) for term in TERMS},
        "logits": SegmentationWarp(movable=movable),
    }
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(predictions[live].shape, generator=generator, dtype=torch.float64)
    if direction.shape[-2:] == (4, 4):
        direction[:, 3] = 0
    values = []
    for sign in (1, -1):
        moved = predictions | {live: predictions[live] + sign * 1e-6 * direction}
        shifted = Reference(moved, batch, movable, True)
        shifted.constants, shifted.mask = base.constants, base.mask
        values.append(shifted.terms())
    reached = set()
    for name, relation in relations.items():
        value = predictions[live].clone().requires_grad_()
        loss = next(iter(relation(predictions | {live: value}, batch).values()))
        if not loss.requires_grad:
            gradient = torch.zeros_like(value)
        else:
            (gradient,) = torch.autograd.grad(loss, value, allow_unused=True)
            gradient = torch.zeros_like(value) if gradient is None else gradient
        slope = float((gradient * direction).sum())
        expected = (values[0][name] - values[1][name]) / 2e-6
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-8), name
        if gradient.any():
            reached.add(name)
    whom = {
        "depth": {"rgb", "ssim", "depth", "smoothness", "logits"},
        "camera_motion": {*TERMS, "logits"} - {"smoothness"},
        "object_motion": {*TERMS, "logits"} - {"smoothness", "rotation_cycle"},
        "segmentation": {"logits"},
    }
    assert reached == whom[live.replace("_back_2", "").removesuffix("_2")]


# ---- on the truth -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (128, 192), (256, 384)], ids=str)
@pytest.mark.parametrize("domain", ["sim", "real"])
def test_the_true_motion_is_preferred_to_its_inverse_and_to_none(
    domain: Any, size: tuple[int, int]
) -> None:
    """In every pair by itself: rooms of few things, with the sensor noise of ``real``."""
    reader = World(domain, "test", 3, *size, frames=2, frames_per_scene=1, scenes="rooms",
                   static=True)  # fmt: skip
    relations = {
        "photometric": ScenePhotometric(object_motion=False),
        "large contrast": ScenePhotometric(object_motion=False, contrast=1e-3),
        "segmentation": SegmentationWarp(object_motion=False),
    }
    for row in reader.index():
        pair = {n: torch.from_numpy(v)[None] for n, v in reader.load(row).items()}
        for frame in FRAMES:
            pair["image" + frame] = pair["image" + frame].movedim(-1, 1) / 255
            classes = pair["segmentation" + frame][:, 0].long()
            one_hot = functional.one_hot(classes, len(CLASSES)).movedim(-1, 1)
            pair["segmentation" + frame] = one_hot.float()
        there = pair["camera_motion"]
        back, still = invert(there), torch.eye(4)[None]
        for name, relation in relations.items():
            truth, inverse, none = (
                float(sum(relation(pair | motions, pair).values()))
                for motions in (
                    {"camera_motion": there, "camera_motion_back_2": back},
                    {"camera_motion": back, "camera_motion_back_2": there},
                    {"camera_motion": still, "camera_motion_back_2": still},
                )
            )
            assert truth < 0.97 * min(inverse, none), (row["key"], name)


def test_on_the_worlds_truth_the_terms_fall_to_a_part_of_the_identity_warps() -> None:
    columns = world_pairs("sim", count=12)
    relation = ScenePhotometric()
    truth, still = (relation(c, columns) for c in (columns, at_rest(columns)))
    for term, most in (("rgb", 0.25), ("ssim", 0.55), ("depth", 0.12)):
        assert truth[term] < most * still[term], term
    assert truth["rotation_cycle"] < 1e-6
    assert truth["translation_cycle"] < 1e-4
    (logits,) = SegmentationWarp()(columns, columns).values()
    (logits_still,) = SegmentationWarp()(at_rest(columns), columns).values()
    assert logits < 0.1 * logits_still


def test_on_the_worlds_truth_the_motion_of_things_counts() -> None:
    columns = world_pairs("sim", count=12)
    static = columns | {n: at_rest(columns)[n] for n in ("object_motion", "object_motion_back_2")}
    assert only("rgb")(columns, columns)["rgb"] < 0.9 * only("rgb")(static, columns)["rgb"]
    warped, unmoved = (SegmentationWarp()(c, columns)["logits"] for c in (columns, static))
    assert warped < 0.75 * unmoved


@pytest.mark.parametrize("movable", ["world", [CAR]])
def test_the_mask_lets_only_what_can_move_move(movable: str | list[int]) -> None:
    pair = moving_square()
    sideways = torch.tensor([1.0, 0.0, 0.0]).double()[:, None, None]
    leaking = pair.truth | {
        name: torch.where(pair.truth[name] == 0, sideways, pair.truth[name])
        for name in ("object_motion", "object_motion_back_2")
    }
    relation = only("rgb", "depth", movable=movable)
    assert sum(relation(leaking, pair.batch).values()) < 1e-12
    unmasked = only("rgb", "depth", segmentation=False)
    assert sum(unmasked(leaking, pair.batch).values()) > 0.01


def test_ssim_vanishes_inside_what_both_frames_see() -> None:
    pair = moving_square(48, 72)
    static = only("ssim")
    truth = static(pair.truth, pair.batch)["ssim"]
    still = static(pair.truth | {n: v.double() for n, v in at_rest(pair.truth).items()}, pair.batch)
    assert truth < 0.1 * still["ssim"]


def test_hidden_and_departed_points_do_not_count() -> None:
    pair = moving_square()
    changed = pair.batch | {"image": pair.batch["image"].clone()}
    # What the square hides in frame 2, and what leaves the frame there, may look like anything.
    square = pair.truth["object_motion_back_2"][:, :1] != 0
    hidden = torch.zeros_like(square)
    hidden[..., :-2] = square[..., 2:]  # the wall moves by 2 pixels
    hidden &= pair.truth["object_motion"][:, :1] == 0
    hidden[..., -2:] = True
    changed["image"][hidden.expand(-1, 3, -1, -1)] = 0.0
    assert hidden[..., :-2].any()
    assert only("rgb")(pair.truth, changed)["rgb"] < 1e-12
    black = pair.batch | {"image": torch.zeros_like(pair.batch["image"])}
    assert only("rgb")(pair.truth, black)["rgb"] > 0.1


# ---- properties -------------------------------------------------------------------------------


def test_exchanging_the_frames_of_a_pair_changes_nothing() -> None:
    predictions, batch = random_scene()
    exchange = {
        "depth": "depth_2", "camera_motion": "camera_motion_back_2", "image": "image_2",
        "object_motion": "object_motion_back_2", "segmentation": "segmentation_2",
    }  # fmt: skip
    exchange |= {b: a for a, b in exchange.items()}
    other = [{exchange.get(n, n): v for n, v in c.items()} for c in (predictions, batch)]
    for relation in (only(*TERMS, movable=[1]), SegmentationWarp(movable=[1])):
        one, two = relation(predictions, batch), relation(*other)
        for term, value in one.items():
            torch.testing.assert_close(value, two[term])


def test_what_a_relation_needs_depends_on_its_arguments() -> None:
    scene = {"depth", "depth_2", "camera_motion", "camera_motion_back_2"}
    objects = {"object_motion", "object_motion_back_2"}
    classes = {"segmentation", "segmentation_2"}
    assert set(ScenePhotometric().quantities) == scene | objects | classes
    assert set(ScenePhotometric(segmentation=False).quantities) == scene | objects
    assert set(ScenePhotometric(object_motion=False).quantities) == scene
    assert set(SegmentationWarp().quantities) == scene | objects | classes
    assert set(SegmentationWarp(object_motion=False).quantities) == scene | classes


def test_weights_scale_their_terms_and_a_weight_of_zero_leaves_a_term_out() -> None:
    predictions, batch = random_scene()
    whole = ScenePhotometric(movable=[1])(predictions, batch)
    assert tuple(whole) == TERMS
    unit = only(*TERMS, movable=[1])(predictions, batch)
    weights = dict(zip(TERMS, (0.85, 3.0, 1e-2, 1e-2, 1e-3, 1e-2, 1e-3), strict=True))
    for term, weight in weights.items():
        torch.testing.assert_close(whole[term], weight * unit[term])
        assert tuple(only(term, movable=[1])(predictions, batch)) == (term,)


def test_a_segmentation_learns_nothing_from_the_photometric_relation() -> None:
    predictions, batch = random_scene()
    predictions["segmentation"].requires_grad_()
    terms = ScenePhotometric(movable=[1])(predictions, batch)
    assert not any(term.requires_grad for term in terms.values())
    assert {*ScenePhotometric.constant} == {"segmentation", "segmentation_2"}


def test_a_camera_at_rest_gives_finite_gradients() -> None:
    pair = moving_ball(12, 18)
    predictions = {n: v.double().clone() for n, v in at_rest(pair.truth).items()}
    for value in predictions.values():
        value.requires_grad_()
    sum(ScenePhotometric()(predictions, pair.batch).values()).backward()
    for name, value in predictions.items():
        assert value.grad is None or value.grad.isfinite().all(), name
    assert predictions["depth"].grad is not None


def test_points_behind_the_camera_do_not_count() -> None:
    pair = moving_square()
    motion = invert(pair.truth["camera_motion"]).clone()
    motion[:, 2, 3] = -20.0
    gone = pair.truth | {"camera_motion": motion, "camera_motion_back_2": motion}
    terms = only("rgb", "ssim", "depth")(gone, pair.batch)
    assert all(value == 0 for value in terms.values())


def test_bad_intrinsics_are_named() -> None:
    pair = moving_square()
    broken = pair.batch["intrinsics"].clone()
    broken[:, 1, 1] = 0
    for relation in (ScenePhotometric(), SegmentationWarp()):
        with pytest.raises(InputError, match="intrinsics: not invertible"):
            relation(pair.truth, pair.batch | {"intrinsics": broken})
        with pytest.raises(InputError, match="intrinsics: not invertible"):
            relation(pair.truth, pair.batch | {"intrinsics": broken * torch.nan})
        without = {n: v for n, v in pair.batch.items() if n != "intrinsics"}
        with pytest.raises(InputError, match="intrinsics: the mediator's rows have none"):
            relation(pair.truth, without)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("scene_photometric", {"rgb": -1.0}, r"\.rgb: got -1.0, expected at least 0"),
        ("scene_photometric", dict.fromkeys(TERMS, 0.0), r"\.rgb: all terms have weight 0"),
        ("scene_photometric", {"movable": []}, r"\.movable: got .*, expected at least one class"),
        ("segmentation_warp", {"movable": [-1]}, r"\.movable: got .*, expected at least one class"),
        ("segmentation_warp", {"movable": "worlds"}, "did you mean 'world'"),
    ],
)
def test_a_wrong_argument_is_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plugins.build("relation", name, arguments, "consistency.scene.relation")


def test_a_movable_class_that_the_segmentation_does_not_have_is_named() -> None:
    pair = moving_square()
    few = {f"segmentation{s}": pair.truth[f"segmentation{s}"][:, :5] for s in ("", "_2")}
    with pytest.raises(InputError, match="5 classes"):
        SegmentationWarp()(pair.truth | few, pair.batch)
    assert class_map("world").movable_indices == (6, 7, 8)


@pytest.mark.parametrize("make", [ScenePhotometric, SegmentationWarp])
def test_a_class_map_that_is_not_the_segmentations_is_refused_before_anything_runs(
    make: Callable[..., Relation],
) -> None:
    city, depth = Segmentation("cityscapes_19"), Depth()
    with pytest.raises(InputError, match="classes of 'world' are not those of task 'city'"):
        make().check_tasks({"depth": depth, "city": city})
    for fitting in ("cityscapes_19", [11, 13]):
        make(movable=fitting).check_tasks({"depth": depth, "city": city})
    make(object_motion=False).check_tasks({"city": city})  # nothing moves: no class is looked at
