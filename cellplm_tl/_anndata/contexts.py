"""Contexts and coordinates of the cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplm_tl._errors import ContextError, SlotError

#: Name of the context where there is one only.
WHOLE = "all cells"


def read_contexts(
    obs: pd.DataFrame, batch_key: str | None
) -> tuple[tuple[NDArray[np.int64], ...], tuple[str, ...]]:
    """Give the row numbers of each context, ascending, and the names of the contexts, sorted.

    Names of numeric columns are sorted as numbers. Without cells there is no context.
    """
    if batch_key is None:
        rows = np.arange(len(obs), dtype=np.int64)
        return ((rows,), (WHOLE,)) if len(rows) else ((), ())
    if not isinstance(batch_key, str) or batch_key not in obs.columns:
        raise SlotError(
            f"batch_key={batch_key!r} is no column of adata.obs; the columns are "
            f"{', '.join(map(repr, obs.columns)) or 'none'}. Name the one that tells samples apart."
        )
    column = obs[batch_key]
    is_missing = column.isna().to_numpy()
    if is_missing.any():
        raise ContextError(
            f"adata.obs[{batch_key!r}] is missing for {name_rows(obs.index, is_missing)}. "
            "Every cell needs a context: fill the column, or leave these cells out."
        )
    values = column.to_numpy()
    if values.dtype.kind not in "biuf":
        values = values.astype(str)
    of_cell, labels = pd.factorize(values, sort=True)
    by_context = np.argsort(of_cell, kind="stable").astype(np.int64)
    ends = np.cumsum(np.bincount(of_cell, minlength=len(labels)))
    contexts = np.split(by_context, ends[:-1]) if len(labels) else []
    return tuple(contexts), tuple(str(label) for label in labels)


def read_coordinates(
    adata: Any, spatial_key: str | None, needed: bool
) -> NDArray[np.float64] | None:
    """Give ``obsm[spatial_key]``, or None where there is none.

    What is there must be usable if `needed`; otherwise, unusable coordinates are none. NaN is a
    cell without coordinates.
    """
    if spatial_key is None or spatial_key not in adata.obsm:
        if spatial_key not in (None, "spatial"):
            raise SlotError(
                f"spatial_key={spatial_key!r} is not in adata.obsm; the keys are "
                f"{', '.join(map(repr, adata.obsm)) or 'none'}."
            )
        return None
    stored = adata.obsm[spatial_key]
    found = np.asarray(stored.to_numpy() if isinstance(stored, pd.DataFrame) else stored)
    problem = _problem(found, adata.obs_names)
    if problem is None:
        return found.astype(np.float64)
    if needed:
        raise ContextError(f"adata.obsm[{spatial_key!r}] {problem}")
    return None


def _problem(coordinates: NDArray, obs_names: pd.Index) -> str | None:
    if coordinates.ndim != 2 or coordinates.shape[1] != 2:
        return (
            f"must have the shape (cells, 2), x and y; it is {coordinates.shape}. Put the two axes "
            "to be used into a key of their own, and name it with spatial_key='…'."
        )
    if coordinates.dtype.kind not in "biuf":
        return f"must hold numbers; its type is {coordinates.dtype}."
    is_bad = np.any(np.isinf(coordinates.astype(np.float64)), axis=1)
    if is_bad.any():
        return (
            f"is infinite for {name_rows(obs_names, is_bad)}. Leave these cells out, or "
            "all coordinates with spatial_key=None."
        )
    return None


def name_rows(obs_names: pd.Index, is_bad: NDArray[np.bool_]) -> str:
    """Say how many cells are concerned, and which the first of them are, by name and position."""
    rows = np.flatnonzero(is_bad)
    first = ", ".join(f"{str(obs_names[row])!r} (row {row})" for row in rows[:5])
    more = ", …" if len(rows) > 5 else ""
    return f"{len(rows):,} of {len(is_bad):,} cells: {first}{more}"
