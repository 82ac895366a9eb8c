"""The grid of cells, seen from above, on which point clouds become maps."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from taskray.job.config import Settings

Extent = tuple[float, float]


class Grid(Settings):
    """Square cells seen from above, in the axes of the LiDAR. Maps are ``[..., Y, X]``: row i
    holds y from ``y[0] + i * cell`` on, column j holds x from ``x[0] + j * cell`` on.

    The defaults are the grid of Taskology 3.2.2: 468 x 468 cells of 0.32 m, the sensor in the
    middle; heights are those of PointPillars.
    """

    x: Extent = (-74.88, 74.88)
    """From where to where ahead, in metres."""
    y: Extent = (-74.88, 74.88)
    """From where to where to the left, in metres."""
    z: Extent = (-3.0, 1.0)
    """Points below and above do not count; metres."""
    cell: Annotated[float, Field(gt=0)] = 0.32
    """Side of a cell in metres."""

    @model_validator(mode="after")
    def _holds_whole_cells(self) -> Grid:
        for name, (low, high) in (("x", self.x), ("y", self.y), ("z", self.z)):
            if low >= high:
                raise ValueError(f"{name}: expected two bounds, [lower, higher]")
            cells = (high - low) / self.cell
            if name != "z" and (round(cells) < 1 or abs(cells - round(cells)) > 1e-3):
                raise ValueError(
                    f"{name}: {high - low:g} m are no whole number of cells of {self.cell:g} m"
                )
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (y) and columns (x)."""
        rows, columns = ((high - low) / self.cell for low, high in (self.y, self.x))
        return round(rows), round(columns)

    def split(self, parts: int) -> Grid:
        """The same area in cells of a ``parts``-th of the side."""
        return self.model_copy(update={"cell": self.cell / parts})

    def centres(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """x ``[X]`` and y ``[Y]`` of the cells' centres in metres, typed and placed as ``like``."""
        rows, columns = (torch.arange(n, device=like.device) for n in self.shape)
        x = self.x[0] + (columns.to(like.dtype) + 0.5) * self.cell
        return x, self.y[0] + (rows.to(like.dtype) + 0.5) * self.cell

    def holds(self, boxes: Tensor) -> Tensor:
        """Whether the centre of each box ``[..., 2 or more]`` lies on the grid; false for NaN."""
        x, y = boxes[..., 0], boxes[..., 1]
        return (x >= self.x[0]) & (x < self.x[1]) & (y >= self.y[0]) & (y < self.y[1])

    def cells_of(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The cell of each point ``[..., 3 or more]``, row-major, and whether it has one. Points
        outside, NaN included, have cell 0 and false."""
        rows, columns = self.shape
        # judged by the index, not by metres: rounding must not put a point beyond the last cell
        column = torch.floor((points[..., 0] - self.x[0]) / self.cell)
        row = torch.floor((points[..., 1] - self.y[0]) / self.cell)
        inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        inside &= (points[..., 2] >= self.z[0]) & (points[..., 2] < self.z[1])
        return torch.where(inside, row * columns + column, 0).long(), inside
