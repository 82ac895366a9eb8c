"""The grid of cells, from above, that converts point clouds to maps."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from taskray.errors import InputError
from taskray.job.config import Settings

Extent = tuple[float, float]


class Grid(Settings):
    """Square cells from above, in the axes of the LiDAR. Maps are ``[..., Y, X]``: row i begins
    at y = ``y[0] + i * cell``, column j at x = ``x[0] + j * cell``.

    The defaults are the grid of Taskology 3.2.2: 468 x 468 cells of 0.32 m, the sensor in the
    middle; heights are those of PointPillars.
    """

    x: Extent = (-74.88, 74.88)
    """Bounds ahead, in metres."""
    y: Extent = (-74.88, 74.88)
    """Bounds to the left, in metres."""
    z: Extent = (-3.0, 1.0)
    """Bounds of the height, in metres; points outside are ignored."""
    cell: Annotated[float, Field(gt=0)] = 0.32
    """Side of a cell in metres."""

    @model_validator(mode="after")
    def _holds_whole_cells(self) -> Grid:
        for name, (low, high) in (("x", self.x), ("y", self.y), ("z", self.z)):
            if low >= high:
                raise InputError(name, f"got [{low:g}, {high:g}], expected [lower, higher]")
            cells = (high - low) / self.cell
            if name != "z" and (round(cells) < 1 or abs(cells - round(cells)) > 1e-3):
                raise InputError(
                    name,
                    f"got {high - low:g} m, expected a whole number of cells of {self.cell:g} m",
                )
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (y) and columns (x)."""
        rows, columns = ((high - low) / self.cell for low, high in (self.y, self.x))
        return round(rows), round(columns)

    def split(self, parts: int) -> Grid:
        """The same area in cells whose side is divided by ``parts``."""
        return self.model_copy(update={"cell": self.cell / parts})

    def centres(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """x ``[X]`` and y ``[Y]`` of the cells' centres in metres; type and device of ``like``."""
        rows, columns = (torch.arange(n, device=like.device) for n in self.shape)
        x = self.x[0] + (columns.to(like.dtype) + 0.5) * self.cell
        return x, self.y[0] + (rows.to(like.dtype) + 0.5) * self.cell

    def holds(self, boxes: Tensor) -> Tensor:
        """Whether the centre of each box ``[..., 2 or more]`` is on the grid; false for NaN."""
        x, y = boxes[..., 0], boxes[..., 1]
        return (x >= self.x[0]) & (x < self.x[1]) & (y >= self.y[0]) & (y < self.y[1])

    def cells_of(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The cell of each point ``[..., 3 or more]``, row-major, and whether it is on the grid.
        Points outside, NaN included, have cell 0 and false."""
        rows, columns = self.shape
        # compare indices, not metres: rounding must not put a point beyond the last cell
        column = torch.floor((points[..., 0] - self.x[0]) / self.cell)
        row = torch.floor((points[..., 1] - self.y[0]) / self.cell)
        inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        inside &= (points[..., 2] >= self.z[0]) & (points[..., 2] < self.z[1])
        return torch.where(inside, row * columns + column, 0).long(), inside
