"""Counts that are kept back, to choose and to judge by: cells that were divided in parts.

Each count of a cell falls into one of several parts at random. Given what is expected of a cell the
parts are independent of each other (for Poisson counts exactly), so that one can be predicted from
another, and noise that two have in common is not there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplm_tl._anndata import Cells, CountBlock


@dataclass(frozen=True)
class Part:
    """One part of the counts of some cells; read like :class:`Cells`.

    Where a count falls depends on the seed and the row of its cell alone.

    Attributes
    ----------
    cells
        All of them, whole.
    chosen
        Rows that take part, ascending; they are numbered from 0 here.
    shares
        Of the parts; their sum is 1.
    number
        Which part this is.
    seed
        Of the division.
    """

    cells: Cells
    chosen: NDArray[np.int64]
    shares: tuple[float, ...]
    number: int
    seed: int

    @property
    def n_cells(self) -> int:
        """How many cells take part."""
        return len(self.chosen)

    @property
    def genes(self) -> NDArray[np.object_]:
        """As those of the cells."""
        return self.cells.genes

    @property
    def gene_index(self) -> NDArray[np.int64]:
        """As that of the cells."""
        return self.cells.gene_index

    @property
    def contexts(self) -> tuple[NDArray[np.int64], ...]:
        """Those that cells were chosen from, in the numbers used here."""
        position = np.full(self.cells.n_cells, -1)
        position[self.chosen] = np.arange(len(self.chosen))
        inside = (position[rows] for rows in self.cells.contexts)
        return tuple(rows[rows >= 0] for rows in inside if (rows >= 0).any())

    @property
    def coordinates(self) -> NDArray[np.float64] | None:
        """Those of the chosen cells."""
        coordinates = self.cells.coordinates
        return None if coordinates is None else coordinates[self.chosen]

    def other(self, number: int) -> Part:
        """Return another part of the same division."""
        return replace(self, number=number)

    def counts(self, rows: Any) -> CountBlock:
        """Give this part of the counts of some cells, without entries that are 0."""
        rows = self.chosen[rows]
        block = self.cells.counts(rows)
        values = np.empty_like(block.values, dtype=np.float32)
        for i, row in enumerate(rows):
            entries = slice(block.offsets[i], block.offsets[i + 1])
            values[entries] = self._divide(block.values[entries], int(row))
        of_entry = np.repeat(np.arange(len(rows)), np.diff(block.offsets))
        rest = block.library_size - np.bincount(of_entry, block.values, len(rows))
        library_size = np.bincount(of_entry, values, len(rows)) + self.shares[self.number] * rest
        seen = values > 0
        per_cell = np.bincount(of_entry[seen], minlength=len(rows))
        offsets = np.r_[0, per_cell.cumsum()]
        return CountBlock(values[seen], block.columns[seen], offsets, library_size)

    def _divide(self, counts: NDArray[np.float32], row: int) -> NDArray[np.int64]:
        """Draw how many of each entry's counts fall into this part."""
        rng = np.random.default_rng([self.seed, row])
        left, share_left = np.rint(counts).astype(np.int64), 1.0
        for share in self.shares[: self.number]:
            left = left - rng.binomial(left, min(1.0, share / share_left))
            share_left -= share
        if self.number == len(self.shares) - 1:
            return left
        return rng.binomial(left, min(1.0, self.shares[self.number] / share_left))


def divide(
    cells: Cells, shares: tuple[float, ...], seed: int, max_cells: int | None = None
) -> tuple[Part, ...]:
    """Divide the counts of cells, or of as many as are wanted, in parts.

    Parameters
    ----------
    cells
        They stay as they are.
    shares
        Of the counts, for each part; their sum is 1.
    seed
        Of the draw of cells and the division.
    max_cells
        Cells to draw at most.
    """
    chosen = np.arange(cells.n_cells)
    if max_cells is not None and cells.n_cells > max_cells:
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.choice(cells.n_cells, max_cells, replace=False))
    first = Part(cells, chosen, shares, 0, seed)
    return tuple(first.other(number) for number in range(len(shares)))
