"""From an AnnData to cells: counts of the genes that a model knows, contexts, coordinates."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cellplm_tl._anndata.columns import Columns, check_coverage, check_genes, match_columns
from cellplm_tl._anndata.contexts import name_rows, read_contexts, read_coordinates
from cellplm_tl._anndata.matrix import Matrix, Rows, open_matrix
from cellplm_tl._anndata.state import State, find_state
from cellplm_tl._errors import CountsError, CountsWarning, SlotError, check_is_anndata
from cellplm_tl._settings import logger

# Cells in which the state of the input and the coverage of the counts are found.
SAMPLE_CELLS = 512


class CountBlock(NamedTuple):
    """Counts of a block of cells, as CSR with ascending columns and no entry that is 0.

    The arrays may be those of the AnnData: they are not to be written to.
    """

    values: NDArray[np.float32]  # (entries,)
    columns: NDArray[np.integer]  # (entries,) positions in Cells.genes
    offsets: NDArray[np.integer]  # (cells + 1,)
    library_size: NDArray[np.float64]  # (cells,) over all columns that are known human genes


@dataclass(frozen=True)
class Cells:
    """The cells of an AnnData as models see them.

    Attributes
    ----------
    n_cells
        Number of cells.
    genes
        Ensembl ids (of today) that are measured and in the caller's list, in the order of the
        list, shape ``(genes,)``.
    gene_index
        Position of each in the caller's list, shape ``(genes,)``.
    contexts
        Row numbers of each context, ascending; together they are every row once.
    context_names
        Name of each context; they are sorted.
    coordinates
        Shape ``(cells, 2)``, or None.
    input_state
        In which state the input was found, what became of it and what is lost: plain values.
    gene_summary
        Numbers of columns used, unmatched and summed, coverage, statuses: plain values.
    slots_read
        The slots all this comes from, like ``"obs['sample']"``.
    """

    n_cells: int
    genes: NDArray[np.object_] = field(repr=False)
    gene_index: NDArray[np.int64] = field(repr=False)
    contexts: tuple[NDArray[np.int64], ...] = field(repr=False)
    context_names: tuple[str, ...]
    coordinates: NDArray[np.float64] | None = field(repr=False)
    input_state: dict[str, Any]
    gene_summary: dict[str, Any]
    slots_read: tuple[str, ...]
    _matrix: Matrix = field(repr=False)
    _state: State = field(repr=False)
    _columns: Columns = field(repr=False)
    _obs_names: pd.Index = field(repr=False)
    _is_scaled: NDArray[np.bool_] = field(repr=False)  # (cells,) set where no counts were found

    @property
    def n_scaled(self) -> int:
        """How many of the cells read so far had no counts to recover, and were scaled."""
        return int(self._is_scaled.sum())

    def counts(self, rows: Rows) -> CountBlock:
        """Give the counts of some cells.

        Parameters
        ----------
        rows
            Row numbers in any order, or a slice; neighbours are read fastest.

        Returns
        -------
        CountBlock
            Columns of one gene are summed. A cell's counts do not depend on the cells read along.

        Raises
        ------
        CountsError
            A value is NaN, infinite or negative. (Of matrices in memory, all values were looked at
            before.)
        """
        if isinstance(rows, slice):
            rows = slice(*rows.indices(self.n_cells))
        block = self._matrix.rows(rows)
        if not self._matrix.in_memory:
            _check_values(block.data, rows, self._matrix, self._obs_names)
        block = _without_zeros(block)
        values, has_counts = self._state.to_counts(block.data, block.indptr)
        self._note_scaled(rows, has_counts)
        block = sp.csr_matrix((values, block.indices, block.indptr), block.shape, copy=False)
        library_size = _library_size(block, self._columns.is_resolved)
        block = _select(block, self._columns)
        return CountBlock(block.data, block.indices, block.indptr, library_size)

    def _note_scaled(self, rows: Rows, has_counts: NDArray[np.bool_]) -> None:
        if self._state.way != "recovered" or has_counts.all():
            return
        if not self._is_scaled.any():
            row_numbers = np.arange(self.n_cells)[rows]
            is_scaled = np.zeros(self.n_cells, dtype=bool)
            is_scaled[row_numbers[~has_counts]] = True
            warnings.warn(
                f"No counts can be recovered for {name_rows(self._obs_names, is_scaled)} and maybe "
                "more: their values are no multiples of one step, as those of other cells are. "
                "They are scaled as the median cell is. Pass raw counts with layer='…' if you "
                "have them.",
                CountsWarning,
                stacklevel=3,
            )
        self._is_scaled[rows] = ~has_counts


def read_cells(
    adata: Any,
    genes: Sequence[str],
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = "spatial",
    need_coordinates: bool = False,
) -> Cells:
    """Read cells from an AnnData, which stays as it is.

    Everything that can be wrong with the input is found here, before anything is computed; only
    values of matrices on disk are looked at when they are read.

    Parameters
    ----------
    adata
        Cells × genes, in memory or backed.
    genes
        Ensembl ids that the model knows.
    layer
        Layer to read; by default ``X``, or ``layers["counts"]`` if that holds counts and ``X``
        does not.
    gene_key
        Column of ``var`` with gene names; by default one of Ensembl ids, or else ``var_names``.
    batch_key
        Column of ``obs`` that names each cell's context; by default all cells are one.
    spatial_key
        Key of ``obsm`` with coordinates; None for none. Without ``obsm["spatial"]`` there are
        none; any other key must be there.
    need_coordinates
        Whether coordinates that cannot be used (not two columns, NaN) are an error. Otherwise they
        count as none.

    Returns
    -------
    Cells
        Counts to be read block by block, and what goes with them.

    Raises
    ------
    InputError
        `adata` is no AnnData.
    SlotError
        A layer, column or key that was named does not exist.
    CountsError
        The matrix holds negative, NaN or infinite values, or nothing.
    GenesError
        The names look like mouse genes, or too few are known, or they hold too few of the counts.
    ContextError
        A cell has no context, or coordinates are needed and cannot be used.
    """
    check_is_anndata(adata)
    if layer is not None and layer not in adata.layers:
        raise SlotError(
            f"layer={layer!r} is not in adata.layers; the layers are "
            f"{', '.join(map(repr, adata.layers)) or 'none'}."
        )
    contexts, context_names = read_contexts(adata.obs, batch_key)
    coordinates = read_coordinates(adata, spatial_key, need_coordinates)
    columns = match_columns(adata.var, genes, gene_key)
    check_genes(columns, len(genes))
    matrix, state, remarks = _choose_matrix(adata, layer)
    coverage, n_sampled = _coverage(matrix, state, columns)
    check_coverage(columns, coverage)
    _say(matrix, state, columns)
    slots_read = [matrix.where]
    slots_read += [] if batch_key is None else [f"obs[{batch_key!r}]"]
    slots_read += [] if coordinates is None else [f"obsm[{spatial_key!r}]"]
    slots_read += [] if columns.where == "var_names" else [columns.where]
    return Cells(
        n_cells=adata.n_obs,
        genes=columns.genes,
        gene_index=columns.gene_index,
        contexts=contexts,
        context_names=context_names,
        coordinates=coordinates,
        input_state={
            "kind": state.kind,
            "read_from": matrix.where,
            "counts": state.way,
            "n_cells_sampled": n_sampled,
            **({} if state.transform == "none" else {"transform": state.transform}),
            **state.facts,
            **remarks,
        },
        gene_summary={**columns.summary(), "coverage": coverage},
        slots_read=tuple(slots_read),
        _matrix=matrix,
        _state=state,
        _columns=columns,
        _obs_names=adata.obs_names,
        _is_scaled=np.zeros(adata.n_obs, dtype=bool),
    )


# ------------------------------------------------------------------------ which matrix, which state


def _choose_matrix(adata: Any, layer: str | None) -> tuple[Matrix, State, dict[str, Any]]:
    """Open the matrix to be read and find its state, with remarks for the record."""
    if layer is not None or "counts" not in adata.layers:
        return *_examine(adata, layer), {}
    try:
        matrix, state = _examine(adata, None)
        found = state.kind
    except CountsError as error:
        problem: CountsError | None = error
        found = "no counts"
    else:
        if state.way == "as stored" and not state.facts:
            return matrix, state, {}
        problem = None
    try:
        counts, counts_state = _examine(adata, "counts")
    except CountsError:
        counts_state = None
    if counts_state is not None and counts_state.way == "as stored" and not counts_state.facts:
        return counts, counts_state, {"state_of_X": found}
    if problem is not None:
        raise problem
    return matrix, state, {"state_of_layers_counts": "no raw counts either"}


def _examine(adata: Any, layer: str | None) -> tuple[Matrix, State]:
    matrix = open_matrix(adata, layer)
    try:
        if matrix.in_memory:
            for rows, values in matrix.blocks():
                _check_values(values, rows, matrix, adata.obs_names)
        sampled = matrix.sample(SAMPLE_CELLS)
        sample = matrix.rows(sampled)
        _check_values(sample.data, sampled, matrix, adata.obs_names)
    except CountsError as error:
        raise CountsError(f"{error} {_advice(adata, layer)}") from None
    sample = _without_zeros(sample)
    return matrix, find_state(sample.data, sample.indptr)


def _check_values(values: NDArray, rows: Rows, matrix: Matrix, obs_names: pd.Index) -> None:
    """Raise if a value of these rows is NaN, infinite or negative."""
    if values.dtype.kind in "bu" or not values.size:
        return
    # One pass each, without an array in between; NaN goes through both.
    smallest, largest = values.min(), values.max()
    if smallest >= 0 and largest < np.inf:
        return
    block = matrix.rows(rows)
    is_bad = ~np.isfinite(block.data)
    what = "NaN or infinite values"
    if not is_bad.any():
        is_bad = block.data < 0
        what = f"negative values (down to {smallest:.4g}), as scaled data have,"
    of_entry = np.repeat(np.arange(len(obs_names))[rows], np.diff(block.indptr))
    is_bad_cell = np.zeros(len(obs_names), dtype=bool)
    is_bad_cell[of_entry[is_bad]] = True
    raise CountsError(f"adata.{matrix.where} has {what} in {name_rows(obs_names, is_bad_cell)}.")


def _advice(adata: Any, layer: str | None) -> str:
    """Where else counts may be."""
    places = []
    if adata.raw is not None:
        places.append(f"adata.raw has {adata.raw.n_vars:,} genes: pass adata.raw.to_adata()")
    others = [repr(name) for name in adata.layers if name != layer]
    if others:
        places.append(f"the layers are {', '.join(others)}: name one with layer='…'")
    if not places:
        places.append("pass the counts as they were before, with layer='…' or as X")
    return f"CellPLM needs raw counts, or their log1p: {'; or '.join(places)}."


def _coverage(matrix: Matrix, state: State, columns: Columns) -> tuple[float, int]:
    """Share of the counts that the matched genes hold in a sample, and the cells of the sample."""
    rows = matrix.sample(SAMPLE_CELLS)
    sample = _without_zeros(matrix.rows(rows))
    counts, _ = state.to_counts(sample.data, sample.indptr)
    is_selected = np.zeros(matrix.shape[1], dtype=bool)
    is_selected[columns.selected] = True
    total = counts.sum(dtype=np.float64)
    matched = counts[is_selected[sample.indices]].sum(dtype=np.float64)
    return float(matched / total) if total else 1.0, len(rows)


def _say(matrix: Matrix, state: State, columns: Columns) -> None:
    """Log or warn about what is not as it should be; silence for raw counts in X."""
    if "lost" in state.facts:
        warnings.warn(
            f"adata.{matrix.where} holds no raw counts ({state.kind}; {state.way}): "
            f"{state.facts['lost']}. Pass raw counts with layer='…' if you have them.",
            CountsWarning,
            stacklevel=4,
        )
    elif state.way == "recovered":
        logger.info(
            "adata.%s is %s (%s): counts are recovered.", matrix.where, state.kind, state.transform
        )
    if matrix.where == "layers['counts']":
        logger.info("Counts are read from adata.layers['counts'].")
    n_summed = len(columns.selected) - len(columns.genes)
    if n_summed:
        logger.info("%d columns are of genes that have another column: summed.", n_summed)


# ---------------------------------------------------------------------------------------- one block


def _without_zeros(block: sp.csr_matrix) -> sp.csr_matrix:
    """Give the block without entries that are 0; itself if it has none."""
    if block.data.all():
        return block
    block = block.copy()
    block.eliminate_zeros()
    return block


def _library_size(block: sp.csr_matrix, is_resolved: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Sum of each cell over the columns that are known genes."""
    if not is_resolved.all():
        return block @ is_resolved.astype(np.float64)
    sums = np.zeros(block.shape[0])
    is_filled = np.diff(block.indptr) > 0
    if is_filled.any():
        starts = block.indptr[:-1][is_filled]
        sums[is_filled] = np.add.reduceat(block.data, starts, dtype=np.float64)
    return sums


def _select(block: sp.csr_matrix, columns: Columns) -> sp.csr_matrix:
    """Give the selected columns, gene after gene, those of one gene summed; indices ascending."""
    selected, gene_of = columns.selected, columns.gene_of
    if np.array_equal(selected, np.arange(block.shape[1])):
        part = block
    elif block.has_sorted_indices and (np.diff(selected) > 0).all():
        part = block[:, selected]
    else:
        # Through CSC and back: it sorts in linear time, which sort_indices does not.
        part = block.tocsc()[:, selected].tocsr()
    shape = (block.shape[0], len(columns.genes))
    if len(selected) > len(columns.genes):
        part = sp.csr_matrix((part.data, gene_of[part.indices], part.indptr), shape)
        part.sum_duplicates()
    elif not part.has_sorted_indices:
        part = part.sorted_indices()
    return part
