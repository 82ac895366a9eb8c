"""Cameras and warps against closed forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taskray.geometry.camera import (
    backproject,
    flip_intrinsics,
    pixel_grid,
    project,
    rays,
    resize_intrinsics,
    rotate,
    transform,
)
from taskray.geometry.warp import in_bounds, invert, sample, warp

HEIGHT, WIDTH = 12, 20


def intrinsics(batch: int = 2) -> Tensor:
    k = torch.tensor([[16.0, 0.3, 9.1], [0.0, 15.0, 5.7], [0.0, 0.0, 1.0]], dtype=torch.float64)
    return k.repeat(batch, 1, 1)


def random_depth(batch: int = 2) -> Tensor:
    torch.manual_seed(0)
    return 1 + torch.rand(batch, 1, HEIGHT, WIDTH, dtype=torch.float64)


def motion(angle: float, translation: tuple[float, float, float]) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = torch.tensor([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])
    matrix[:3, 3] = torch.tensor(translation)
    return matrix.repeat(2, 1, 1)


def test_the_grid_gives_column_then_row() -> None:
    grid = pixel_grid(3, 5, torch.zeros(1))
    assert grid.shape == (2, 3, 5)
    assert grid[:, 2, 4].tolist() == [4.0, 2.0]


def test_rays_are_the_inverse_of_the_camera_matrix() -> None:
    grid = pixel_grid(HEIGHT, WIDTH, intrinsics())
    homogeneous = torch.cat([grid, torch.ones_like(grid[:1])]).flatten(1)
    expected = torch.linalg.inv(intrinsics()) @ homogeneous
    torch.testing.assert_close(rays(HEIGHT, WIDTH, intrinsics()).flatten(2), expected)


def test_projection_undoes_backprojection() -> None:
    depth = random_depth()
    pixels, z = project(backproject(depth, intrinsics()), intrinsics())
    torch.testing.assert_close(pixels, pixel_grid(HEIGHT, WIDTH, depth).expand_as(pixels))
    torch.testing.assert_close(z, depth)


def test_points_behind_the_camera_project_to_finite_pixels() -> None:
    points = torch.tensor([0.5, 0.5, -1.0]).view(1, 3, 1, 1).requires_grad_()
    pixels, z = project(points, intrinsics(1).float())
    (gradient,) = torch.autograd.grad(pixels.sum(), points)
    assert pixels.isfinite().all()
    assert gradient.isfinite().all()
    assert z.item() == -1.0


def test_a_resized_frame_takes_resized_intrinsics() -> None:
    small = resize_intrinsics(intrinsics(1), (HEIGHT, WIDTH), (HEIGHT // 2, WIDTH // 2))
    centres = torch.nn.functional.avg_pool2d(rays(HEIGHT, WIDTH, intrinsics(1)), 2)
    torch.testing.assert_close(rays(HEIGHT // 2, WIDTH // 2, small), centres)
    back = resize_intrinsics(small, (HEIGHT // 2, WIDTH // 2), (HEIGHT, WIDTH))
    torch.testing.assert_close(back, intrinsics(1))


def test_a_flip_mirrors_rays_about_x() -> None:
    mirrored = rays(HEIGHT, WIDTH, intrinsics()).flip(-1) * torch.tensor([-1.0, 1.0, 1.0]).view(
        1, 3, 1, 1
    )
    torch.testing.assert_close(rays(HEIGHT, WIDTH, flip_intrinsics(intrinsics(), WIDTH)), mirrored)


def test_a_rigid_motion_and_its_inverse_cancel() -> None:
    move = motion(0.3, (0.1, -0.2, 0.4))
    points = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = move[0, :3, :3] @ points[1].flatten(1) + move[0, :3, 3:]
    torch.testing.assert_close(transform(move, points)[1].flatten(1), expected)
    torch.testing.assert_close(transform(invert(move), transform(move, points)), points)
    torch.testing.assert_close(
        rotate(move, points), transform(move, points) - move[0, :3, 3].view(1, 3, 1, 1)
    )


def test_no_motion_warps_every_pixel_to_itself() -> None:
    depth = random_depth()
    moved = warp(depth, intrinsics(), motion(0.0, (0.0, 0.0, 0.0)))
    torch.testing.assert_close(
        moved.pixels_b2hw, pixel_grid(HEIGHT, WIDTH, depth).expand(2, -1, -1, -1)
    )
    torch.testing.assert_close(moved.depth_b1hw, depth)
    torch.testing.assert_close(sample(depth, moved.pixels_b2hw), depth)


def test_a_sideways_step_before_a_wall_shifts_pixels_by_f_over_z() -> None:
    wall = torch.full((2, 1, HEIGHT, WIDTH), 4.0, dtype=torch.float64)
    moved = warp(wall, intrinsics(), motion(0.0, (0.5, 0.0, 0.0)))
    shift = moved.pixels_b2hw - pixel_grid(HEIGHT, WIDTH, wall)
    torch.testing.assert_close(shift[:, 0], torch.full_like(shift[:, 0], 16.0 * 0.5 / 4.0))
    torch.testing.assert_close(shift[:, 1], torch.zeros_like(shift[:, 1]))
    assert moved.valid_b1hw[..., :-2].all()
    assert not moved.valid_b1hw[..., -2:].any()


def test_object_motion_adds_in_axes_of_camera_2() -> None:
    depth, move = random_depth(), motion(0.2, (0.1, 0.0, -0.1))
    delta = torch.zeros(2, 3, HEIGHT, WIDTH, dtype=torch.float64)
    delta[:, 2, :, 9:] = 0.5
    still, moved = warp(depth, intrinsics(), move), warp(depth, intrinsics(), move, delta)
    torch.testing.assert_close(moved.depth_b1hw - still.depth_b1hw, delta[:, 2:])


def test_unmeasured_and_passed_points_are_invalid() -> None:
    depth = random_depth()
    depth[0, 0, 3, 3] = 0.0
    moved = warp(depth, intrinsics(), motion(0.0, (0.0, 0.0, 0.0)))
    assert moved.valid_b1hw.sum() == depth.numel() - 1
    assert not moved.valid_b1hw[0, 0, 3, 3]
    assert not warp(depth, intrinsics(), motion(0.0, (0.0, 0.0, -5.0))).valid_b1hw.any()


def test_sampling_is_exact_on_a_linear_image_and_repeats_the_border() -> None:
    ramp = pixel_grid(HEIGHT, WIDTH, random_depth())[None]
    where = torch.tensor([[2.25, 7.5], [3.75, 0.5], [-4.0, 99.0]], dtype=torch.float64)
    found = sample(ramp, where.T.reshape(1, 2, 1, 3))
    expected = torch.tensor([[2.25, 7.5], [3.75, 0.5], [0.0, HEIGHT - 1.0]], dtype=torch.float64)
    torch.testing.assert_close(found[0, :, 0].T, expected)
    assert in_bounds(where.T.reshape(1, 2, 1, 3), HEIGHT, WIDTH).flatten().tolist() == [
        True, True, False,
    ]  # fmt: skip


def test_the_warp_has_the_gradient_of_finite_differences() -> None:
    depth = random_depth()[:, :, :3, :4].requires_grad_()
    move = motion(0.1, (0.1, 0.05, 0.2)).requires_grad_()
    delta = torch.randn(2, 3, 3, 4, dtype=torch.float64).mul(0.1).requires_grad_()

    def outputs(d: Tensor, m: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
        pixels, z, _ = warp(d, intrinsics(), m, o)
        return pixels, z

    assert torch.autograd.gradcheck(outputs, (depth, move, delta))


def test_sampling_carries_gradient_to_values_and_pixels() -> None:
    values = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    pixels = torch.rand(1, 2, 3, 3, dtype=torch.float64) * 2.6 + 0.7
    assert torch.autograd.gradcheck(sample, (values, pixels.requires_grad_()))
