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

from cellplm_tl._anndata.columns import Columns, match_columns
from cellplm_tl._anndata.contexts import name_rows, read_contexts, read_coordinates
from cellplm_tl._anndata.matrix import Matrix, Rows, csr_around, open_matrix
from cellplm_tl._anndata.state import State, find_state
from cellplm_tl._errors import (
    CountsError,
    CountsWarning,
    OptionError,
    SlotError,
    check_is_anndata,
)
from cellplm_tl._genes import check_coverage, check_names, choose_gene_names
from cellplm_tl._settings import logger

# Cells in which the state of the input and the coverage of the counts are found.
SAMPLE_CELLS = 512
# What genes of the data are matched with, in words.
WANTED = "genes of the model"


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
        In which state the input was found and what became of it, as plain values: `kind`,
        `read_from`, `counts` (as stored, recovered, inverted), `n_cells_sampled`; where it is so:
        `transform`, `decimals` or `relative_tolerance`, `median_total` before the log,
        `on_grid_share` of cells, `exact_share` of values, `scaled_to_total`, `chosen_because`,
        `fractional_share`, `lost` in words, `state_of_X`, `layers_counts`.
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
    _lacks_counts: NDArray[np.bool_] = field(repr=False)  # (cells,) set as they are read

    @property
    def columns(self) -> NDArray[np.int64]:
        """Columns of the matrix that stand for `genes`, gene after gene, shape ``(columns,)``."""
        return self._columns.selected

    @property
    def gene_of_column(self) -> NDArray[np.int64]:
        """Position in `genes` of each of `columns`; with repetitions where a gene has several."""
        return self._columns.gene_of

    @property
    def n_without_counts(self) -> int:
        """How many cells read so far hold no integers, although the state promises them."""
        return int(self._lacks_counts.sum())

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

        Warns
        -----
        CountsWarning
            Cells hold no counts although those that the state was found from do; once.
        """
        block = self.all_counts(rows)
        library_size = _library_size(block, self._columns.is_resolved)
        block = _select(block, self._columns)
        return CountBlock(block.data, block.indices, block.indptr, library_size)

    def all_counts(self, rows: Rows) -> sp.csr_matrix:
        """Give the counts of some cells in all columns, whatever these are called.

        As :meth:`counts`; shape ``(cells, columns of the AnnData)``.
        """
        block = self._matrix.rows(rows)
        if not self._matrix.in_memory:
            check_values(block.data, rows, self._matrix, self._obs_names)
        block = without_zeros(block)
        values, has_counts = self._state.to_counts(block.data, block.indptr)
        if self._state.promises_counts and not has_counts.all():
            self._note(rows, ~has_counts)
        return csr_around(values, block.indices, block.indptr, block.shape[1])

    def _note(self, rows: Rows, lacks_counts: NDArray[np.bool_]) -> None:
        was_said = self._lacks_counts.any() or "lost" in self._state.facts
        self._lacks_counts[rows] = lacks_counts
        if was_said:
            return
        if self._state.way == "recovered":
            what = (
                "no multiples of one step, as those of other cells are: scaled as the median cell"
            )
        else:
            what = "no integers, as those of other cells are: used as they stand"
        warnings.warn(
            f"adata.{self._matrix.where} has values in "
            f"{name_rows(self._obs_names, self._lacks_counts)} (and maybe more) which are {what}. "
            "Are raw and processed cells mixed? Pass raw counts with layer='…' if you have them.",
            CountsWarning,
            stacklevel=4,
        )


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
        Whether coordinates that cannot be used (not two columns, infinite) are an error. Otherwise
        they count as none.

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
    judged = columns.names, columns.is_selected, columns.where
    check_names(*judged, wanted=WANTED)
    found, remarks = choose_matrix(adata, layer)
    matrix, state = found.matrix, found.state
    coverage = check_coverage(*judged, found.sum_columns(), wanted=WANTED)
    _say(matrix, state, columns)
    slots_read = [matrix.where]
    slots_read += [] if batch_key is None else [f"obs[{batch_key!r}]"]
    slots_read += [] if coordinates is None else [f"obsm[{spatial_key!r}]"]
    slots_read += columns.slots_read
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
            "n_cells_sampled": found.sample.shape[0],
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
        _lacks_counts=np.zeros(adata.n_obs, dtype=bool),
    )


def read_genes(adata: Any, genes: Sequence[str], *, gene_key: str | None = None) -> Columns:
    """Read which columns of an AnnData stand for which genes; whatever it counts is not looked at.

    Parameters
    ----------
    adata
        Cells × genes, in memory or backed; it may have no cells and no ``X``.
    genes
        Ensembl ids that the model knows.
    gene_key
        Column of ``var`` with gene names; by default one of Ensembl ids, or else ``var_names``.

    Raises
    ------
    InputError
        `adata` is no AnnData.
    SlotError
        ``var`` has no column `gene_key`.
    GenesError
        The names look like mouse genes, or none is known.
    """
    check_is_anndata(adata)
    columns = match_columns(adata.var, genes, gene_key)
    check_names(columns.names, columns.is_selected, columns.where, wanted=WANTED, at_least=1)
    return columns


def find_columns(adata: Any, names: Sequence[str] | None) -> NDArray[np.int64]:
    """Find the columns of some names of ``var_names``, in the order of the names; None is all.

    Raises
    ------
    OptionError
        A text in place of a list, no name, or one that is there twice.
    SlotError
        ``var_names`` lacks a name, or has it more than once.
    """
    if names is None:
        return np.arange(adata.n_vars)
    if isinstance(names, str):
        raise OptionError(
            f"genes must be a list of names; got the text {names!r}: pass [{names!r}]."
        )
    if np.ndim(names) != 1:  # a number, a set, rows of names
        raise OptionError(f"genes must be a list of names; got {type(names).__name__}.")
    asked = pd.Index(names)
    if not len(asked) or asked.has_duplicates:
        raise OptionError("genes must name one gene or more, each once.")
    if missing := [str(name) for name in asked if name not in adata.var_names]:
        raise SlotError(
            f"{len(missing)} of {len(asked)} genes are not in adata.var_names: "
            f"{', '.join(map(repr, missing[:5]))}. Name measured genes, as adata.var_names does."
        )
    positions = adata.var_names.get_indexer_for(asked)
    if len(positions) > len(asked):
        raise SlotError(
            "adata.var_names has some of genes more than once: adata.var_names_make_unique() first."
        )
    return np.asarray(positions, np.int64)


def read_gene_names(adata: Any, gene_key: str | None) -> tuple[NDArray[np.object_], str]:
    """Read what the genes are called and where that stands, as :func:`choose_gene_names` does."""
    check_is_anndata(adata)
    return choose_gene_names(adata.var, gene_key)


def read_gene_counts(adata: Any) -> NDArray[np.float64] | None:
    """Sum the counts of each column over a sample of cells; None where there are no counts."""
    try:
        found, _ = choose_matrix(adata, None)
    except CountsError:
        return None
    return found.sum_columns()


# ------------------------------------------------------------------------ which matrix, which state


class _Found(NamedTuple):
    matrix: Matrix
    state: State
    sample: sp.csr_matrix  # rows of the matrix, as stored, without zeros

    def sum_columns(self) -> NDArray[np.float64]:
        """Sum the counts of each column over the sample."""
        counts, _ = self.state.to_counts(self.sample.data, self.sample.indptr)
        return np.bincount(self.sample.indices, counts, self.sample.shape[1]).astype(np.float64)


def choose_matrix(adata: Any, layer: str | None) -> tuple[_Found, dict[str, Any]]:
    """Open the matrix to be read and find its state; with remarks for the record."""
    if layer is not None or "counts" not in adata.layers:
        return _examine(adata, layer), {}
    problem = None
    try:
        found = _examine(adata, None)
    except CountsError as error:
        problem = error
    else:
        if _is_raw(found.state):
            return found, {}
    try:
        counts = _examine(adata, "counts")
    except CountsError:
        pass  # the layer is not what its name says; what is wrong with X is what to report
    else:
        if _is_raw(counts.state):
            state_of_x = found.state.kind if problem is None else "no counts"
            return counts, {"state_of_X": state_of_x}
    if problem is not None:
        raise problem
    return found, {"layers_counts": "left alone: it holds no raw counts"}


def _is_raw(state: State) -> bool:
    return state.way == "as stored" and state.promises_counts


def _examine(adata: Any, layer: str | None) -> _Found:
    """Open a matrix, look for what cannot be used, and find the state of the rest."""
    matrix = open_matrix(adata, layer)
    sampled = matrix.sample(SAMPLE_CELLS)
    try:
        if matrix.in_memory:
            for rows, values in matrix.blocks():
                check_values(values, rows, matrix, adata.obs_names)
        sample = matrix.rows(sampled)
        check_values(sample.data, sampled, matrix, adata.obs_names)
    except CountsError as error:
        raise CountsError(f"{error} {_advice(adata, layer)}") from None
    sample = without_zeros(sample)
    return _Found(matrix, find_state(sample.data, sample.indptr), sample)


def check_values(values: NDArray, rows: Rows, matrix: Matrix, obs_names: pd.Index) -> None:
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


def _say(matrix: Matrix, state: State, columns: Columns) -> None:
    """Log or warn about what is not as it should be; silence for raw counts in X."""
    if "lost" in state.facts:
        kind = "fractions" if state.way == "as stored" else state.kind
        warnings.warn(
            f"adata.{matrix.where} holds no raw counts ({kind}; {state.way}): "
            f"{state.facts['lost']}. Pass raw counts with layer='…' if you have them.",
            CountsWarning,
            stacklevel=4,  # the line that called the tool
        )
    elif state.way == "recovered":
        logger.info(
            "adata.%s is %s (%s): counts are recovered.", matrix.where, state.kind, state.transform
        )
    if matrix.where == "layers['counts']":
        logger.info("Counts are read from adata.layers['counts'].")
    if columns.n_summed:
        logger.info("%d columns are of genes that have another column: summed.", columns.n_summed)


# ---------------------------------------------------------------------------------------- one block


def without_zeros(block: sp.csr_matrix) -> sp.csr_matrix:
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
    elif (np.diff(selected) > 0).all():
        part = block[:, selected]
    else:
        # Through CSC and back: it sorts in linear time, which sort_indices does not.
        part = block.tocsc()[:, selected].tocsr()
    if columns.n_summed:
        values = part.data.copy() if part is block else part.data  # summing is done in place
        genes = gene_of.astype(part.indices.dtype)[part.indices]
        part = csr_around(values, genes, part.indptr.copy(), len(columns.genes))
        part.sum_duplicates()
    return part
