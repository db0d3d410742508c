"""Known labels of cells."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplm_tl._anndata.contexts import name_rows
from cellplm_tl._errors import InputError, SlotError, check_is_anndata


class Labels(NamedTuple):
    """Labels of all cells of an AnnData."""

    codes: NDArray[np.int64]  # (cells,)
    names: tuple[str, ...]  # of the labels, in the order of the categories, numbers or letters
    colors: tuple[str, ...]  # one per name; empty where there are none


def read_labels(adata: Any, key: str, name: str = "adata") -> Labels:
    """Read a column of labels; every cell must have one, and two must occur.

    Parameters
    ----------
    adata
        An AnnData, which the caller calls `name`.
    key
        Column of ``obs``; its colours stand in ``uns[f"{key}_colors"]``, if anywhere.
    """
    check_is_anndata(adata, name)
    if not isinstance(key, str) or key not in adata.obs.columns:
        raise SlotError(
            f"labels_key={key!r} is no column of {name}.obs; the columns are "
            f"{', '.join(map(repr, adata.obs.columns)) or 'none'}. Name the one with cell types."
        )
    column = adata.obs[key]
    is_missing = column.isna().to_numpy()
    if is_missing.any():
        raise InputError(
            f"{name}.obs[{key!r}] is missing for {name_rows(adata.obs_names, is_missing)}. Leave "
            f"them out: {name}[{name}.obs[{key!r}].notna()]."
        )
    is_categorical = isinstance(column.dtype, pd.CategoricalDtype)
    values = column if is_categorical else column.astype("category")
    stored = list(values.cat.categories)
    used = [number for number, n_cells in enumerate(np.bincount(values.cat.codes)) if n_cells]
    if len(used) < 2:
        found = f"one label only, {str(stored[used[0]])!r}" if used else "no label"
        raise InputError(
            f"{name}.obs[{key!r}] has {found}; two or more are needed to tell cells apart."
        )
    new_code = np.full(len(stored), -1)
    new_code[used] = np.arange(len(used))
    colors = adata.uns.get(f"{key}_colors", ())
    has_colors = is_categorical and len(colors) == len(stored)
    return Labels(
        codes=new_code[values.cat.codes.to_numpy()].astype(np.int64),
        names=tuple(str(stored[number]) for number in used),
        colors=tuple(str(colors[number]) for number in used) if has_colors else (),
    )


def read_batches(adata: Any, batch_key: str | None) -> NDArray[np.object_] | None:
    """Read which batch each cell is of, as text; None where there is no such column."""
    if batch_key is None or batch_key not in adata.obs:
        return None
    batches: NDArray[np.object_] = adata.obs[batch_key].astype(str).to_numpy(dtype=object)
    return batches


def if_there(adata: Any, slot: str, key: str | None) -> str | None:
    """Return a key if the slot (``"layers"``, ``"var"``) has it, else None."""
    return key if key is not None and key in getattr(adata, slot) else None
