"""Properties that every relation has, checked on scenes whose truth is exact, and what is
particular to each relation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from scenes import moving_ball, moving_square, world_pairs
from torch import Tensor, nn

from taskray.errors import InputError
from taskray.geometry.camera import rays
from taskray.geometry.normals import normals_from_depth
from taskray.job import plugins
from taskray.relations.depth_normals import DepthNormals
from taskray.relations.relation import Relation
from taskray.relations.scene_photometric import ScenePhotometric
from taskray.relations.segmentation_warp import SegmentationWarp

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Scene:
    """Exact truth of some frames: quantities and the columns of the batch beside them."""

    truth: Columns
    batch: Columns


@dataclass(frozen=True)
class Case:
    """A relation, a flat scene on which it vanishes to rounding, and a curved one."""

    relation: Callable[[], Relation]
    flat: Callable[..., Scene]
    curved: Callable[..., Scene]
    tolerance_on_the_world: float


def camera(height: int, width: int, count: int, dtype: torch.dtype) -> Tensor:
    """Two thirds of a right angle across, principal point off the middle, pixels not square."""
    f = 0.8 * width
    k = torch.tensor([[f, 0, 0.45 * width], [0, 1.1 * f, 0.52 * height], [0, 0, 1]], dtype=dtype)
    return k.expand(count, 3, 3)


def planes(height: int = 24, width: int = 36, dtype: torch.dtype = torch.float64) -> Scene:
    """Three planes that fill the view: facing, a wall to the left, a floor."""
    normals = torch.tensor([[0, 0, -1.0], [0.5, 0.1, -0.8], [-0.1, -0.6, -0.5]], dtype=dtype)
    normals = (normals / normals.norm(dim=1, keepdim=True))[:, :, None, None]
    intrinsics = camera(height, width, len(normals), dtype)
    depth = -2.5 / (normals * rays(height, width, intrinsics)).sum(1, keepdim=True)
    assert (depth > 0).all()
    return Scene(
        {"depth": depth, "normals": normals.expand(-1, -1, height, width)},
        {"intrinsics": intrinsics},
    )


def sphere(height: int = 48, width: int = 72, dtype: torch.dtype = torch.float64) -> Scene:
    """A sphere of radius 3 m before a facing wall."""
    intrinsics = camera(height, width, 1, dtype)
    ray = rays(height, width, intrinsics)
    centre = torch.tensor([0.2, -0.1, 6.0], dtype=dtype)[:, None, None]
    a, b = ray.square().sum(1, keepdim=True), (ray * centre).sum(1, keepdim=True)
    inside = b.square() - a * (centre.square().sum() - 9.0)
    hit = inside > 0
    depth = torch.where(hit, (b - inside.clamp(min=0).sqrt()) / a, 8.0)
    facing = torch.tensor([0, 0, -1.0], dtype=dtype)[:, None, None]
    normals = torch.where(hit, (depth * ray - centre) / 3.0, facing)
    return Scene({"depth": depth, "normals": normals}, {"intrinsics": intrinsics})


def colours() -> Relation:
    """The photometric terms that vanish on the truth and whose whole gradient is followed; the
    others are in test_scene."""
    others = ("ssim", "smoothness", "rotation_cycle", "translation_cycle", "motion_smoothness")
    return ScenePhotometric(segmentation=False, **dict.fromkeys(others, 0.0))


CASES = {
    "depth_normals": Case(DepthNormals, planes, sphere, tolerance_on_the_world=0.06),
    "scene_photometric": Case(colours, moving_square, moving_ball, tolerance_on_the_world=0.04),
    "segmentation_warp": Case(
        SegmentationWarp, moving_square, moving_ball, tolerance_on_the_world=0.002
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def total(relation: Relation, predictions: Columns, batch: Columns) -> Tensor:
    return torch.stack(list(relation(predictions, batch).values())).sum()


def disturbed(truth: Columns, amount: float = 0.01) -> Columns:
    generator = torch.Generator().manual_seed(0)
    return {
        name: value * (1 + amount * torch.randn(value.shape, generator=generator).to(value))
        for name, value in truth.items()
    }


# ---- properties of every relation -------------------------------------------------------------


def test_every_built_in_relation_is_checked_here() -> None:
    of_point_clouds = {"motion_consistency"}  # in test_motion_consistency.py
    learned = {"adversarial", "cross_task"}  # in files of their own: no loss of 0 on the truth
    assert set(CASES) | of_point_clouds | learned == set(plugins.BUILTIN["relation"])


def test_a_relation_gives_finite_scalars(case: Case) -> None:
    scene = case.curved()
    for value in case.relation()(disturbed(scene.truth), scene.batch).values():
        assert value.shape == ()
        assert value.isfinite()
        assert value > 0


def test_the_relation_vanishes_on_the_truth(case: Case) -> None:
    scene = case.flat()
    assert total(case.relation(), scene.truth, scene.batch).abs() < 1e-12
    single = case.flat(dtype=torch.float32)
    assert total(case.relation(), single.truth, single.batch).abs() < 1e-5


def test_on_curved_surfaces_the_relation_vanishes_as_pixels_get_smaller(case: Case) -> None:
    coarse, fine = case.curved(24, 36), case.curved(96, 144)
    loss = total(case.relation(), coarse.truth, coarse.batch)
    finer_loss = total(case.relation(), fine.truth, fine.batch)
    assert loss < 0.05
    assert finer_loss < loss / 2


def test_an_error_in_any_quantity_raises_the_loss(case: Case) -> None:
    scene = case.flat()
    relation = case.relation()
    wrong = disturbed(scene.truth)
    for name in relation.quantities:
        assert total(relation, scene.truth | {name: wrong[name]}, scene.batch) > 1e-6


def test_the_gradient_reaches_the_live_prediction_alone(case: Case) -> None:
    scene = case.curved()
    relation = case.relation()
    for live in relation.quantities:
        predictions = disturbed(scene.truth)
        for name in relation.quantities:
            predictions[name] = predictions[name].detach().requires_grad_(name == live)
        total(relation, predictions, scene.batch).backward()
        for name in relation.quantities:
            gradient = predictions[name].grad
            if name == live:
                assert gradient is not None
                assert gradient.isfinite().all()
                assert gradient.any()
            else:
                assert gradient is None


def test_the_gradient_equals_finite_differences(case: Case) -> None:
    scene = case.curved(7, 9)
    relation = case.relation()
    predictions = disturbed(scene.truth, 1e-3)
    for live in relation.quantities:

        def loss(value: Tensor, name: str = live) -> Tensor:
            return total(relation, predictions | {name: value}, scene.batch)

        assert torch.autograd.gradcheck(loss, predictions[live].clone().requires_grad_())


def test_descending_the_gradient_of_any_live_prediction_lowers_the_loss(case: Case) -> None:
    scene = case.curved()
    relation = case.relation()
    for live in relation.quantities:
        predictions = disturbed(scene.truth)
        value = predictions[live].requires_grad_()
        before = total(relation, predictions, scene.batch)
        (gradient,) = torch.autograd.grad(before, value)
        after = predictions | {live: value - 1e-3 * gradient / gradient.abs().max()}
        assert total(relation, after, scene.batch) < before


def test_a_batch_without_one_valid_pixel_gives_zero_and_a_gradient_of_zeros(case: Case) -> None:
    scene = case.curved()
    relation = case.relation()
    for live in relation.quantities:
        predictions = {n: torch.zeros_like(v) for n, v in scene.truth.items()}
        predictions[live].requires_grad_()
        loss = total(relation, predictions, scene.batch)
        loss.backward()
        assert loss == 0
        assert torch.equal(predictions[live].grad, torch.zeros_like(scene.truth[live]))


def test_the_relation_holds_on_the_embedded_world(case: Case) -> None:
    relation = case.relation()
    for domain in ("sim", "real"):
        columns = world_pairs(domain)
        assert total(relation, columns, columns) < case.tolerance_on_the_world


# ---- depth and normals ------------------------------------------------------------------------


def test_flipped_normals_give_two() -> None:
    scene = planes()
    flipped = scene.truth | {"normals": -scene.truth["normals"]}
    torch.testing.assert_close(
        total(DepthNormals(), flipped, scene.batch), torch.tensor(2.0, dtype=torch.float64)
    )


def test_computed_normals_face_the_camera_and_have_length_one() -> None:
    scene = sphere()
    normals, valid = normals_from_depth(scene.truth["depth"], scene.batch["intrinsics"])
    ray = rays(*normals.shape[-2:], scene.batch["intrinsics"])
    assert valid.dtype == torch.bool
    assert valid.shape == scene.truth["depth"].shape
    assert ((normals * ray).sum(1, keepdim=True)[valid] < 0).all()
    lengths = normals.norm(dim=1, keepdim=True)
    torch.testing.assert_close(lengths, valid.to(lengths))


def test_most_pixels_of_the_embedded_world_agree_to_rounding() -> None:
    world = pytest.importorskip("taskray.data.world")
    reader = world.World(domain="sim", split="test", num_samples=4)
    for sample in map(reader.load, reader.index()):
        depth, normals, intrinsics = (
            torch.from_numpy(sample[name])[None] for name in ("depth", "normals", "intrinsics")
        )
        computed, valid = normals_from_depth(depth, intrinsics)
        distance = 1 - (computed * normals).sum(1, keepdim=True)[valid]
        assert distance.median() < 1e-4


@pytest.mark.parametrize("step", [-0.5, 0.5])
def test_a_jump_in_depth_is_masked_in_both_directions(step: float) -> None:
    depth = torch.full((1, 1, 9, 12), 3.0)
    depth[..., 6:] += step  # two facing planes, one nearer than the other
    intrinsics = camera(9, 12, 1, torch.float32)
    for sideways in (False, True):
        value = depth.transpose(2, 3) if sideways else depth
        _, valid = normals_from_depth(value, intrinsics, window=1)
        inside = valid.transpose(2, 3) if sideways else valid
        assert not inside[..., 5:7].any()  # the two columns whose difference spans the jump
        assert inside[..., 1:-1, 1:5].all()
        assert inside[..., 1:-1, 7:-1].all()
        facing = {"depth": value, "normals": torch.zeros(1, 3, *value.shape[2:])}
        facing["normals"][:, 2] = -1
        assert total(DepthNormals(), facing, {"intrinsics": intrinsics}).abs() < 1e-6


def test_a_steep_plane_is_straight_and_the_blur_around_a_thing_is_not() -> None:
    height, width = 24, 24
    intrinsics = camera(height, width, 1, torch.float64)
    ray = rays(height, width, intrinsics)
    steep = torch.tensor([0.05, 1.0, 0.02], dtype=torch.float64).view(1, 3, 1, 1)
    ground = 1.5 / (steep * ray).sum(1, keepdim=True)[:, :, height // 2 + 2 :]
    below = intrinsics.clone()
    below[:, 1, 2] -= height // 2 + 2
    paper = normals_from_depth(ground, below, beta=0.1, window=1)[1]
    straight = normals_from_depth(ground, below, beta=10.0, window=1, bend=1e-6)[1]
    assert not paper[0, 0, 1].any()  # near the horizon it falls too fast for the paper's test
    assert straight[0, 0, 1:-1, 1:-1].all()

    blurred = torch.full((1, 1, height, width), 6.0, dtype=torch.float64)
    blurred[..., 8:] = 5.7
    blurred[..., 9:] = 5.1
    blurred[..., 10:] = 4.8  # by less than a fifth over two pixels
    free = normals_from_depth(blurred, intrinsics, beta=0.2, window=1)[1][0, 0, 5]
    bound = normals_from_depth(blurred, intrinsics, beta=0.2, window=1, bend=0.01)[1][0, 0, 5]
    assert free[1:-1].all()
    assert not bound[7:11].any()
    assert bound[1:7].all()
    assert bound[11:-1].all()


def test_border_pixels_and_pixels_beside_unmeasured_depth_are_invalid() -> None:
    depth = torch.full((1, 1, 11, 11), 2.0)
    depth[..., 5, 5] = 0
    _, valid = normals_from_depth(depth, camera(11, 11, 1, torch.float32), window=1)
    border = torch.ones_like(valid)
    border[..., 1:-1, 1:-1] = False
    assert not valid[border].any()
    for i, j in ((5, 5), (4, 5), (6, 5), (5, 4), (5, 6)):
        assert not valid[0, 0, i, j]
    assert valid.sum() == 9 * 9 - 5


def test_a_pixel_between_two_unmeasured_ones_has_no_normal() -> None:
    depth = torch.full((1, 1, 7, 7), 2.0)
    depth[..., 3, 2] = depth[..., 3, 4] = 0  # their difference is 0, as on a facing plane
    _, valid = normals_from_depth(depth, camera(7, 7, 1, torch.float32), window=1)
    assert not valid[0, 0, 3, 3]


def test_a_predicted_normal_of_length_zero_is_left_out() -> None:
    scene = planes(dtype=torch.float32)
    normals = scene.truth["normals"].clone()
    normals[..., 5:9] = 0
    normals.requires_grad_()
    loss = total(DepthNormals(), scene.truth | {"normals": normals}, scene.batch)
    loss.backward()
    assert loss.abs() < 1e-5
    assert normals.grad is not None
    assert not normals.grad[..., 5:9].any()


def test_normals_that_differ_by_more_than_the_largest_angle_are_left_out() -> None:
    scene = planes(dtype=torch.float32)
    facing = {n: v[:1] for n, v in scene.truth.items()}
    intrinsics = {"intrinsics": scene.batch["intrinsics"][:1]}
    normals = torch.zeros_like(facing["normals"])
    half = normals.shape[-1] // 2
    for columns, degrees in ((slice(None, half), 20.0), (slice(half, None), 70.0)):
        normals[:, 0, :, columns] = math.sin(math.radians(degrees))
        normals[:, 2, :, columns] = -math.cos(math.radians(degrees))
    normals.requires_grad_()
    loss = total(DepthNormals(max_angle=45), facing | {"normals": normals}, intrinsics)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1 - math.cos(math.radians(20)), abs=1e-4)
    assert normals.grad is not None
    assert not normals.grad[..., half:].any()
    everything = total(DepthNormals(), facing | {"normals": normals}, intrinsics)
    assert float(everything.detach()) > 0.3


@pytest.mark.parametrize(
    ("argument", "value"),
    [("window", 4), ("window", 0), ("beta", 0), ("bend", 0), ("max_angle", 0)],
)
def test_a_wrong_argument_is_refused_by_name(argument: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"consistency\.dn\.relation\.{argument}"):
        plugins.build("relation", "depth_normals", {argument: value}, "consistency.dn.relation")


# ---- relations of one's own -------------------------------------------------------------------


class Transfer(nn.Module, Relation):
    """Depth is what a learned layer makes of the normals."""

    quantities = ("depth", "normals")

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)

    def forward(
        self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"l1": (self.layer(predictions["normals"]) - predictions["depth"]).abs().mean()}


def test_a_relation_may_be_a_module_with_parameters() -> None:
    relation = plugins.build("relation", f"{__name__}:Transfer", {}, "relation")
    assert isinstance(relation, Relation)
    assert [name for name, _ in relation.named_parameters()] == ["layer.weight", "layer.bias"]
    assert (relation.constant, relation.inputs) == ((), ())
    relation.check_tasks({})
    predictions = {"depth": torch.ones(1, 1, 4, 5), "normals": torch.rand(1, 3, 4, 5)}
    relation(predictions, {})["l1"].backward()
    assert all(p.grad is not None for p in relation.parameters())
