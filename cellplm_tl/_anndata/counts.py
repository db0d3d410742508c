"""All counts of an AnnData as one matrix, whatever its genes are called."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from cellplm_tl._anndata.contexts import name_rows
from cellplm_tl._anndata.matrix import PASS_BYTES
from cellplm_tl._anndata.read import check_values, choose_matrix, without_zeros
from cellplm_tl._errors import CountsError, SlotError, check_is_anndata
from cellplm_tl._settings import logger


class Counts(NamedTuple):
    """Counts, and where they come from.

    Attributes
    ----------
    matrix
        Shape ``(cells, columns)``, float32, columns ascending, no entry that is 0. Its arrays may
        be those of the AnnData: they are not to be written to.
    input_state
        As that of :class:`Cells`, for the record.
    slots_read
        Like ``("layers['counts']",)``.
    """

    matrix: sp.csr_matrix
    input_state: dict[str, Any]
    slots_read: tuple[str, ...]


def read_counts(adata: Any, *, layer: str | None = None) -> Counts:
    """Read whole counts, for what needs integers and nothing like them.

    Log-normalised values are led back to counts where every cell's step shows; else they are
    refused.

    Parameters
    ----------
    adata
        Cells × genes, in memory or backed; it stays as it is.
    layer
        Layer to read; by default ``X``, or ``layers["counts"]`` if that holds counts and ``X``
        does not.

    Raises
    ------
    InputError
        `adata` is no AnnData.
    SlotError
        There is no such layer.
    CountsError
        Values are negative, NaN or infinite, or they are not counts of every cell.
    """
    check_is_anndata(adata)
    if layer is not None and layer not in adata.layers:
        raise SlotError(
            f"layer={layer!r} is not in adata.layers; the layers are "
            f"{', '.join(map(repr, adata.layers)) or 'none'}."
        )
    found, remarks = choose_matrix(adata, layer)
    matrix, state = found.matrix, found.state
    if not state.promises_counts:
        raise CountsError(_refusal(matrix.where, f"holds no counts: {state.facts['lost']}"))
    n_cells, n_columns = matrix.shape
    step = max(1, PASS_BYTES // max(1, n_columns * matrix.dtype.itemsize))
    blocks, has_counts = [], np.ones(n_cells, dtype=bool)
    for start in range(0, n_cells, step):
        rows = slice(start, min(start + step, n_cells))
        block = matrix.rows(rows)
        if not matrix.in_memory:
            check_values(block.data, rows, matrix, adata.obs_names)
        block = without_zeros(block)
        values, has_counts[rows] = state.to_counts(block.data, block.indptr)
        blocks.append(sp.csr_matrix((values, block.indices, block.indptr), block.shape))
    if not has_counts.all():
        cells = name_rows(adata.obs_names, ~has_counts)
        raise CountsError(_refusal(matrix.where, f"has values that are no counts in {cells}"))
    if state.way == "recovered":
        logger.info("adata.%s is %s: counts are recovered.", matrix.where, state.kind)
    whole = sp.vstack(blocks, format="csr") if blocks else sp.csr_matrix((0, n_columns))
    facts = {
        "kind": state.kind,
        "read_from": matrix.where,
        "counts": state.way,
        **({} if state.transform == "none" else {"transform": state.transform}),
        **state.facts,
        **remarks,
    }
    return Counts(whole.astype(np.float32, copy=False), facts, (matrix.where,))


def _refusal(where: str, what: str) -> str:
    return (
        f"adata.{where} {what}. Entries can only be hidden or divided where something was "
        "counted: pass raw counts, in X or with layer='…'."
    )
