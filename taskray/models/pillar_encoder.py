"""Points become pillars, and pillars a map seen from above (Lang et al. 2019, section 2.1)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from taskray.geometry.grid import Grid

FEATURES = 5
"""Added to the values of a point: offsets to the mean of its pillar (3) and to its centre (2)."""


class PillarEncoder(nn.Module):
    """A sweep as a map ``[B, channels, Y, X]``, zero in pillars without a point.

    Each point gets the offsets to the mean of its pillar's points and to the pillar's centre,
    and goes through a linear layer, batch normalisation and ReLU; a pillar is the maximum over its
    points. All points of all pillars count: nothing is sampled or padded, so there is no limit of
    points in a pillar or of pillars. Points outside the grid, and rows of NaN, are left out.

    Args:
        in_channels: values of a point; the first three are x y z in metres.
        channels: of the map.
        grid: the pillars.
    """

    def __init__(self, in_channels: int, channels: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.linear = nn.Linear(in_channels + FEATURES, channels, bias=False)
        self.norm = nn.BatchNorm1d(channels, eps=1e-3)

    def forward(self, points_bpc: Tensor) -> Tensor:
        """``[B, channels, Y, X]`` from ``[B, P, in_channels]``; in float32, also under autocast,
        which would round metres."""
        with torch.autocast(points_bpc.device.type, enabled=False):
            return self._encode(points_bpc.float())

    def _encode(self, points: Tensor) -> Tensor:
        batch, (rows, columns) = len(points), self.grid.shape
        cells, inside = self.grid.cells_of(points)
        cells = cells + torch.arange(batch, device=points.device)[:, None] * (rows * columns)
        cells, points = cells[inside], points[inside]
        pillars, of_point = torch.unique(cells, return_inverse=True)
        features = self._normalised(self.linear(self._augmented(points, pillars, of_point))).relu()
        # the features are at least 0 after ReLU, so a maximum that begins at 0 is the maximum
        maxima = features.new_zeros(len(pillars), features.shape[1])
        index = of_point[:, None].expand(-1, features.shape[1])
        maxima = maxima.scatter_reduce(0, index, features, "amax")
        canvas = _blank(batch * rows * columns, features.shape[1], features)
        canvas.index_copy_(0, pillars, maxima)
        return canvas.view(batch, rows, columns, -1).permute(0, 3, 1, 2)

    def _augmented(self, points: Tensor, pillars: Tensor, of_point: Tensor) -> Tensor:
        rows, columns = self.grid.shape
        sums = points.new_zeros(len(pillars), 3).index_add_(0, of_point, points[:, :3])
        counts = torch.bincount(of_point, minlength=len(pillars))
        mean = sums / counts[:, None]
        x, y = self.grid.centres(points)
        cell = pillars % (rows * columns)
        centre = torch.stack([x[cell % columns], y[cell // columns]], dim=1)
        whole = torch.cat([mean, centre], dim=1)[of_point]
        return torch.cat([points, points[:, :3] - whole[:, :3], points[:, :2] - whole[:, 3:]], 1)

    def _normalised(self, features: Tensor) -> Tensor:
        """Batch normalisation over all points. Fewer than two have no statistics of their own:
        they use the running ones."""
        if len(features) > 1:
            normalised: Tensor = self.norm(features)
            return normalised
        norm = self.norm
        return functional.batch_norm(
            features, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )


def _blank(rows: int, columns: int, like: Tensor) -> Tensor:
    """Zeros ``[rows, columns]``. On a CPU they come from NumPy, whose memory the system clears when
    it is first touched: most of a map of 468 x 468 x 64 never is, and ``torch.zeros`` takes 40 ms
    for it."""
    if like.device.type == "cpu" and like.dtype == torch.float32:
        return torch.from_numpy(np.zeros((rows, columns), np.float32))
    return like.new_zeros(rows, columns)
