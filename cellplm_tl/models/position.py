"""Sinusoidal 2-D positional encoding (appendix B, equation 8).

Axes: `cells`, `hidden` (the d of the equation).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GRID = 100  # positions per axis: coordinates become integers in [0, 100) (appendix B)
BASE = 10000.0  # wavelength base of equation (8)
PLACEHOLDER_STD = 0.01  # of the initial placeholder p' (the release's value)


def grid_positions(coordinates: Tensor) -> Tensor:
    """Normalise the coordinates of one context to integers in [0, 100) per axis.

    Each axis is moved to start at 0 and both are divided by the larger of the two extents, so that
    the tissue keeps its shape; an extent of 0 gives position 0.

    Parameters
    ----------
    coordinates : Tensor, shape (cells, 2)
        x and y in any one unit; cells without coordinates hold NaN and are ignored.

    Returns
    -------
    Tensor, shape (cells, 2), int64
        -1 where a cell has no coordinates.
    """
    known = coordinates.isfinite().all(1)
    positions = torch.full(coordinates.shape, -1, dtype=torch.int64, device=coordinates.device)
    if known.any():
        xy = coordinates[known].double()
        low = xy.amin(0)
        extent = (xy.amax(0) - low).amax().clamp(min=torch.finfo(torch.float64).tiny)
        scaled = (xy - low) / extent * GRID
        positions[known] = scaled.floor().long().clamp(0, GRID - 1)
    return positions


class PositionalEncoding(nn.Module):
    """Add equation (8) to cells with coordinates and a learned vector to the others.

    For channel pairs i in [0, hidden / 4): x at 2i (sine) and 2i + 1 (cosine), y at hidden / 2
    further, with the angle x / 10000^(4 i / hidden).
    """

    frequencies: Tensor

    def __init__(self, hidden: int):
        super().__init__()
        self.placeholder = nn.Parameter(torch.randn(hidden) * PLACEHOLDER_STD)  # p' of appendix B
        pairs = torch.arange(hidden // 4, dtype=torch.float64)
        self.register_buffer(
            "frequencies", (BASE ** (-4 * pairs / hidden)).float(), persistent=False
        )

    def forward(self, positions: Tensor | None) -> Tensor:
        """Return (cells, hidden), or (hidden,) for all cells when nobody has coordinates.

        Parameters
        ----------
        positions : Tensor, shape (cells, 2), int64, or None
            Of :func:`grid_positions`; negative where a cell has none.
        """
        if positions is None:
            return self.placeholder
        angles = positions[:, :, None] * self.frequencies  # (cells, 2, hidden / 4)
        pairs = torch.stack((angles.sin(), angles.cos()), dim=-1)  # (cells, 2, hidden / 4, 2)
        encoding = pairs.flatten(1)  # (cells, hidden): x in the first half, y in the second
        return torch.where(positions[:, :1] >= 0, encoding, self.placeholder)
