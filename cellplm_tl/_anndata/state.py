"""What state a matrix is in, and the way back to counts.

Models take counts, and much of what is stored holds ``log(1 + count * step)`` with a step of its
own in each cell (target sum / library size). All values of such a cell lie on a grid: integer
multiples of the step, seen through the log and through the rounding of storage. A value `x` that is
known to ± `error` allows, for its integer k, the steps ``[(x - error) / k, (x + error) / k]``, and
the step of a cell lies in the intersection of these intervals. Where the intersection is empty,
the cell's values are no counts on a grid.

This file works on arrays alone: `values` are the entries above 0 of a block of cells, those of cell
`i` being ``values[offsets[i]:offsets[i + 1]]``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: What values may have been put through, with the natural log of the base (None: nothing).
TRANSFORMS: dict[str, float | None] = {
    "none": None,
    "natural log": 1.0,
    "log2": float(np.log(2.0)),
    "log10": float(np.log(10.0)),
}

# Rounding by division, log1p and storage together, in halves of the last place: each correctly
# rounded operation adds one, the log1p of common libraries up to two.
ROUNDINGS = 4.0
# Chance, in bits, that values on no grid would pass for the grid of a cell: one in 16,384.
MIN_EVIDENCE = 14.0
# A cell's smallest value is nearly always a count of one; if that fails, counts up to this one.
LARGEST_SMALLEST_COUNT = 10
# Largest part of a step that the error of a value may be, if it is to tell grid points apart.
SHARP = 0.1
# Share of the cells which must be on a grid for the matrix to count as recoverable.
MIN_ON_GRID = 0.5
# No cell has more counts of one gene: larger values are not taken for logs.
MAX_COUNT = 1e7
# Spread of the cells' totals (standard deviation / mean) up to which they count as the same, and
# the number of cells that can show it.
SAME_TOTAL = 0.01
MIN_TOTALS = 5
# What the median cell is scaled to where no counts can be recovered.
NOMINAL_TOTAL = 10_000.0


class Precision(NamedTuple):
    """How exactly values are stored: decimals (None: as many as there are), relative error."""

    decimals: int | None
    eps: float

    def error(self, values: NDArray) -> NDArray:
        """Bound of the error of each value, of the same shape."""
        # A half for the rounding itself, and a tenth more if it was to one decimal more before.
        rounding = 0.0 if self.decimals is None else 0.55 * 10.0**-self.decimals
        return rounding + ROUNDINGS * self.eps * values


EXACT = Precision(None, 0.0)


@dataclass(frozen=True)
class State:
    """The state of a matrix, and what to do to get counts.

    Attributes
    ----------
    kind
        ``"counts"``, ``"library-normalised"`` or ``"log-normalised"``.
    way
        ``"as stored"``; ``"recovered"``: every cell through its own grid; ``"inverted"``: the log
        is inverted and all cells are multiplied by `scale`.
    transform
        A key of :data:`TRANSFORMS`.
    precision
        How exactly the values are stored.
    scale
        Factor for cells that are on no grid.
    facts
        What was found on the sample, and what is lost, for the record.
    """

    kind: str
    way: str
    transform: str = "none"
    precision: Precision = EXACT
    scale: float = 1.0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def promises_counts(self) -> bool:
        """Whether integers are expected of every cell."""
        return self.way == "recovered" or (self.way == "as stored" and not self.facts)

    def to_counts(
        self, values: NDArray, offsets: NDArray
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Give the counts of a block of cells.

        Parameters
        ----------
        values
            Entries above 0 of the cells, shape ``(entries,)``.
        offsets
            Where each cell begins, shape ``(cells + 1,)``.

        Returns
        -------
        counts : numpy.ndarray
            Shape ``(entries,)``; integers for every cell that has counts.
        has_counts : numpy.ndarray
            Whether a cell's counts are integers, shape ``(cells,)``; false for one that could
            only be scaled.
        """
        n_cells = len(offsets) - 1
        if self.way == "as stored":
            is_integer = _are_integers(values)
            has_counts = np.ones(n_cells, dtype=bool)
            if not is_integer.all():
                has_counts = _per_cell(np.add, ~is_integer, offsets, 0.0) == 0
            return values.astype(np.float32, copy=False), has_counts
        x, error = _undo(values, self.transform, self.precision)
        if self.way == "inverted":
            return (x * self.scale).astype(np.float32), np.zeros(n_cells, dtype=bool)
        grid = find_grid(x, error, offsets)
        factor = np.where(grid.fits, 1.0 / grid.step, self.scale)
        counts = x * np.repeat(factor, np.diff(offsets))
        np.rint(counts, out=counts, where=np.repeat(grid.fits, np.diff(offsets)))
        return counts.astype(np.float32), grid.fits


# --------------------------------------------------------------------------------- finding a state


def find_state(values: NDArray, offsets: NDArray) -> State:
    """Find the state of a matrix from a sample of its cells.

    Parameters
    ----------
    values
        Entries above 0 of the cells, shape ``(entries,)``.
    offsets
        Where each cell begins, shape ``(cells + 1,)``.

    Returns
    -------
    State
        In this order: all values are integers: counts; at least half of the cells that can show a
        grid are on one, directly or through a log: recovered (but counts with fractions if that
        grid is the integers); all cells have the same total, directly or through a log: inverted;
        at least half of the values are integers, or the values are too large for a log: counts
        with fractions; else taken for a natural log: inverted.
    """
    if _are_integers(values).all():
        return State("counts", "as stored")
    precision = find_precision(values)
    distinct, distinct_offsets = _distinct(values, offsets)
    limit = np.log1p(MAX_COUNT)
    possible = [name for name, b in TRANSFORMS.items() if b is None or values.max() * b < limit]
    shares = {
        name: share_on_grid(*_undo(distinct, name, precision), distinct_offsets)
        for name in possible
    }
    transform = max(shares, key=lambda name: shares[name])
    is_integer = _are_integers(values)
    if transform == "none" and _share_of_cells(is_integer, offsets) >= 0.5:
        return _fractional(is_integer)  # counts, with some cells of another kind among them
    if shares[transform] >= MIN_ON_GRID:
        return _recoverable(values, offsets, transform, precision, shares[transform])
    spreads = {
        name: _spread(_totals(_undo(values, name, precision)[0], offsets)) for name in possible
    }
    transform = min(spreads, key=lambda name: spreads[name])
    if spreads[transform] <= SAME_TOTAL:
        return _not_recoverable(values, offsets, transform, precision, "all cells have one total")
    if is_integer.mean() >= 0.5 or "natural log" not in possible:
        return _fractional(is_integer)
    return _not_recoverable(
        values, offsets, "natural log", precision, "assumed: the values are small and no integers"
    )


def _recoverable(
    values: NDArray, offsets: NDArray, transform: str, precision: Precision, share: float
) -> State:
    x, error = _undo(values, transform, precision)
    grid = find_grid(x, error, offsets)
    step = np.repeat(grid.step, np.diff(offsets))
    is_exact = (error < 0.5 * step)[np.repeat(grid.fits, np.diff(offsets))]
    facts: dict[str, Any] = {
        "on_grid_share": share,
        "exact_share": float(is_exact.mean()),
        "median_total": float(np.median(_totals(x, offsets))),
    }
    losses = []
    if share < 1:
        losses.append(
            f"{1 - share:.1%} of the cells looked at hold no multiples of one step and are scaled "
            "as the median cell is"
        )
    if not is_exact.all():
        losses.append(
            f"{(~is_exact).sum():,} of {len(is_exact):,} values looked at are counts too large for "
            "the precision of storage; they are known to the nearest few"
        )
    if losses:
        facts["lost"] = "; ".join(losses)
    scale = float(1.0 / np.nanmedian(grid.step[grid.fits]))
    facts |= _tolerance(precision)
    return State(_kind(transform), "recovered", transform, precision, scale, facts)


def _fractional(is_integer: NDArray[np.bool_]) -> State:
    share = float(1 - is_integer.mean())
    lost = f"{share:.1%} of the values looked at are no integers; they are used as they stand"
    return State("counts", "as stored", facts={"fractional_share": share, "lost": lost})


def _not_recoverable(
    values: NDArray, offsets: NDArray, transform: str, precision: Precision, because: str
) -> State:
    total = float(np.median(_totals(_undo(values, transform, precision)[0], offsets)))
    facts: dict[str, Any] = {
        "chosen_because": because,
        "median_total": total,
        "scaled_to_total": NOMINAL_TOTAL,
        "lost": (
            "the library sizes and the integers; values are scaled so that the median cell has "
            f"{NOMINAL_TOTAL:,.0f} counts"
        ),
    }
    facts |= _tolerance(precision)
    return State(_kind(transform), "inverted", transform, precision, NOMINAL_TOTAL / total, facts)


def _kind(transform: str) -> str:
    return "library-normalised" if transform == "none" else "log-normalised"


def _tolerance(precision: Precision) -> dict[str, Any]:
    """Say how exactly a grid has to fit."""
    if precision.decimals is None:
        return {"relative_tolerance": ROUNDINGS * precision.eps}
    return {"decimals": precision.decimals}


def find_precision(values: NDArray) -> Precision:
    """Read off how exactly values are stored: half or single precision, rounded or not.

    Double precision is taken for single, as nearly all of what is stored so was single before.
    """
    values = values.astype(np.float64)
    with np.errstate(over="ignore"):
        is_half = bool((values.astype(np.float16) == values).all())
    eps = 2.0**-11 if is_half else 2.0**-24
    for decimals in range(1, 7):
        shifted = values * 10.0**decimals
        noise = 2.0 * eps * shifted
        is_telling = noise < SHARP  # beyond it, everything looks rounded
        if not is_telling.any():
            break
        if (np.abs(shifted - np.rint(shifted)) <= noise)[is_telling].all():
            return Precision(decimals, eps)
    return Precision(None, eps)


def _are_integers(values: NDArray) -> NDArray[np.bool_]:
    if values.dtype.kind in "biu":
        return np.ones(len(values), dtype=bool)
    return values == np.rint(values)


def _share_of_cells(is_integer: NDArray[np.bool_], offsets: NDArray) -> float:
    """Share of the cells, without empty ones, that hold integers alone."""
    is_filled = np.diff(offsets) > 0
    n_fractions = _per_cell(np.add, ~is_integer, offsets, 0.0)
    return float((n_fractions[is_filled] == 0).mean())


def _undo(values: NDArray, transform: str, precision: Precision) -> tuple[NDArray, NDArray]:
    """Give the values before the log, as float64, and a bound of the error of each."""
    values = values.astype(np.float64)
    error = precision.error(values)
    base = TRANSFORMS[transform]
    if base is None:
        return values, error
    x = np.expm1(values * base)
    error *= base * (1.0 + x)  # derivative of expm1
    error += ROUNDINGS * precision.eps * (1.0 + x)  # rounding of 1 + x, before the log
    return x, error


def _totals(x: NDArray, offsets: NDArray) -> NDArray:
    """Sum of each cell that is not empty."""
    starts = offsets[:-1][np.diff(offsets) > 0]
    return np.add.reduceat(x, starts)


def _spread(totals: NDArray) -> float:
    return float(totals.std() / totals.mean()) if len(totals) >= MIN_TOTALS else np.inf


def _distinct(values: NDArray, offsets: NDArray) -> tuple[NDArray, NDArray]:
    """Give the different values of each cell, ascending, in single precision."""
    cells = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    # Bits of floats above 0 are ordered as the floats are: sorting integers does both at once.
    bits = values.astype(np.float32).view(np.uint32)
    keys = np.unique((cells.astype(np.int64) << 32) | bits)
    distinct = (keys & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
    return distinct, np.searchsorted(keys >> 32, np.arange(len(offsets)))


# ------------------------------------------------------------------------------------------- grids


class Grid(NamedTuple):
    """The grid of each cell of a block, each of shape ``(cells,)``."""

    step: NDArray[np.float64]  # normalised value of one count; NaN for a cell without values
    fits: NDArray[np.bool_]  # whether all values of the cell are on it


def find_grid(x: NDArray, error: NDArray, offsets: NDArray) -> Grid:
    """Find the step of each cell.

    Of all grids that explain a cell the widest is taken: counts that have a common divisor come
    back divided by it.

    Parameters
    ----------
    x
        Entries above 0, before any log, shape ``(entries,)``.
    error
        Bound of the error of each, shape ``(entries,)``.
    offsets
        Where each cell begins, shape ``(cells + 1,)``.
    """
    step, fits = _intersect(x, error, offsets, 1)
    for smallest_count in range(2, LARGEST_SMALLEST_COUNT + 1):
        misfits = np.flatnonzero(~fits)
        if not len(misfits):
            break
        entries = np.repeat(~fits, np.diff(offsets))
        part = x[entries], error[entries], _offsets(np.diff(offsets)[misfits])
        finer, finer_fits = _intersect(*part, smallest_count)
        # The finer the grid, the more fits by chance, or by slipping to the next grid point.
        evidence, is_sharp = _evidence(*part, smallest_count)
        is_sure = finer_fits & is_sharp & (evidence >= MIN_EVIDENCE)
        step[misfits[is_sure]] = finer[is_sure]
        fits[misfits[is_sure]] = True
    return Grid(step, fits)


def share_on_grid(x: NDArray, error: NDArray, offsets: NDArray) -> float:
    """Share of cells on a grid, or among those with values enough to show it, whichever is less.

    It is 0 if no cell could show it. `x` must hold no value twice in a cell: the second one is no
    evidence.
    """
    can_show = _evidence(x, error, offsets, 1)[0] >= MIN_EVIDENCE
    if not can_show.any():
        return 0.0
    fits = find_grid(x, error, offsets).fits
    return float(min(fits[can_show].mean(), fits[np.diff(offsets) > 0].mean()))


def _intersect(
    x: NDArray, error: NDArray, offsets: NDArray, smallest_count: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Intersect the intervals of steps, the smallest value of a cell being `smallest_count`.

    One value leaves the integers of much larger ones open; each round narrows the step down, and
    with it settles integers further up.
    """
    n_cells = len(offsets) - 1
    low = _per_cell(np.minimum, x - error, offsets, np.nan) / smallest_count
    high = _per_cell(np.minimum, x + error, offsets, np.nan) / smallest_count
    is_vague = high - low > SHARP * (high + low)  # the step itself could be half or double
    cells = np.repeat(np.arange(n_cells), np.diff(offsets))
    while len(x):
        step, slack = 0.5 * (low + high), 0.5 * (high - low)
        k = np.rint(x / step[cells])
        is_settled = k * slack[cells] + error < 0.5 * step[cells]
        if not is_settled.any():
            break
        k, settled_x, settled_error = k[is_settled], x[is_settled], error[is_settled]
        bounds = np.searchsorted(cells[is_settled], np.arange(n_cells + 1))
        low = np.maximum(
            low, _per_cell(np.maximum, (settled_x - settled_error) / k, bounds, -np.inf)
        )
        high = np.minimum(
            high, _per_cell(np.minimum, (settled_x + settled_error) / k, bounds, np.inf)
        )
        x, error, cells = x[~is_settled], error[~is_settled], cells[~is_settled]
    is_misfit = is_vague | (low > high)  # neither holds for a cell without values
    return 0.5 * (low + high), ~is_misfit


def _evidence(
    x: NDArray, error: NDArray, offsets: NDArray, smallest_count: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """How surprising it would be, in bits, if a cell's values were on a grid by chance.

    The smallest value makes the grid; each other one would be within its error of a grid point
    with a chance of twice that error over the step. Also: whether no value of the cell is so
    uncertain that it could be at more than one grid point.
    """
    first = np.repeat(_per_cell(np.minimum, x, offsets, np.nan), np.diff(offsets))
    first_error = np.repeat(_per_cell(np.minimum, error, offsets, np.nan), np.diff(offsets))
    openness = smallest_count * (error + x / first * first_error) / first
    bits = np.where(x > first, -np.log2(np.minimum(1.0, 2.0 * openness)), 0.0)
    widest = _per_cell(np.maximum, openness, offsets, 0.0)
    return _per_cell(np.add, bits, offsets, 0.0), widest < SHARP


def _per_cell(
    ufunc: np.ufunc, values: NDArray, offsets: NDArray, empty: float
) -> NDArray[np.float64]:
    """Reduce the values of each cell; `empty` for cells without any."""
    reduced = np.full(len(offsets) - 1, empty)
    is_filled = np.diff(offsets) > 0
    if is_filled.any():
        reduced[is_filled] = ufunc.reduceat(values, offsets[:-1][is_filled])
    return reduced


def _offsets(lengths: NDArray) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)])
