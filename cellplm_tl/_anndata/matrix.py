"""Rows of a matrix of any form, as CSR, a block at a time.

Whatever holds the matrix (sparse or dense, in memory, on disk, in a view, lazy), a block of its
rows comes out in one form. Nothing is written to what the user gave, not even a sorted order of
indices; the whole is never made dense, and of all forms only CSC is ever copied as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cellplm_tl._errors import CountsError

Rows = slice | NDArray[np.int64]

# Rows on disk that lie closer together than this are read in one go, with what is in between, up
# to so many.
MAX_GAP = 8
MAX_RUN = 1024
# Bytes, if it were dense, of a block in which a matrix is passed through as a whole.
PASS_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Matrix:
    """A matrix that gives its rows.

    Attributes
    ----------
    shape
        Cells and columns.
    dtype
        Type of the values.
    in_memory
        Whether passing through all of it costs little.
    where
        Name of the slot, for messages: ``"X"`` or ``"layers['counts']"``.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    in_memory: bool
    where: str
    _read: Callable[[Rows], Any]

    def rows(self, rows: Rows) -> sp.csr_matrix:
        """Give some rows, in the order asked for.

        Columns ascend and no entry is there twice; zeros may be among the entries.
        The arrays may be those of the user: they are not to be written to.
        """
        return _as_csr(self._read(as_slice(rows, self.shape[0])), self.shape[1])

    def blocks(self) -> Iterator[tuple[slice, NDArray]]:
        """Pass through all rows: numbers of the rows of each block, and its values as stored."""
        n_rows, n_columns = self.shape
        step = max(1, PASS_BYTES // max(1, n_columns * self.dtype.itemsize))
        for start in range(0, n_rows, step):
            rows = slice(start, min(start + step, n_rows))
            block = self._read(rows)
            yield rows, block.data if sp.issparse(block) else np.asarray(block)

    def sample(self, n_rows: int, n_runs: int = 16) -> NDArray[np.int64]:
        """Choose up to `n_rows` rows: short runs of neighbours, spread evenly over the matrix."""
        total = self.shape[0]
        if total <= n_rows:
            return np.arange(total)
        length = n_rows // n_runs
        starts = np.linspace(0, total - length, n_runs).astype(np.int64)
        return (starts[:, None] + np.arange(length)).ravel()


def open_matrix(adata: Any, layer: str | None) -> Matrix:
    """Open ``adata.X`` or a layer.

    A CSC matrix is turned into CSR at once, in memory and sparse as it is: its rows cannot be had
    otherwise without passing through all of it for every block.
    """
    where = "X" if layer is None else f"layers[{layer!r}]"
    stored = _stored(adata._adata_ref if adata.is_view else adata, layer)
    if stored is None:
        raise CountsError(
            f"adata.{where} is None; counts were expected. The layers are "
            f"{', '.join(map(repr, adata.layers)) or 'none'}: name one with layer='…'."
        )
    dtype = np.dtype(stored.dtype)
    if dtype.kind not in "biuf":
        raise CountsError(f"adata.{where} must hold numbers; its type is {dtype}.")
    read, in_memory = _reader(adata, layer)
    return Matrix(adata.shape, dtype, in_memory, where, read)


def _reader(adata: Any, layer: str | None) -> tuple[Callable[[Rows], Any], bool]:
    """Give a function that reads rows, and whether what it reads from is in memory."""
    owner = adata._adata_ref if adata.is_view else adata  # adata.X of a view is a copy of all of it
    stored = _stored(owner, layer)
    if getattr(stored, "format", None) == "csc":
        whole = _stored(adata, layer)
        matrix = sp.csr_matrix(whole.to_memory() if hasattr(whole, "to_memory") else whole)
        return partial(_rows_of_csr, matrix), True
    read: Callable[[Rows], Any]
    if sp.issparse(stored):
        matrix = stored if stored.format == "csr" else sp.csr_matrix(stored)
        read, in_memory = partial(_rows_of_csr, matrix), True
    elif isinstance(stored, np.ndarray):
        read, in_memory = stored.__getitem__, True
    else:  # a file's, or lazy
        is_dense_file = not hasattr(stored, "format") and not hasattr(stored, "compute")
        part = partial(_read_runs, stored) if is_dense_file else stored.__getitem__
        read, in_memory = partial(_read_ascending, part), False
    if not adata.is_view:
        return read, in_memory
    rows_of_view = np.arange(owner.n_obs)[adata._oidx]
    columns_of_view = np.arange(owner.n_vars)[adata._vidx]
    if np.array_equal(columns_of_view, np.arange(owner.n_vars)):
        return lambda rows: read(as_slice(rows_of_view[rows], owner.n_obs)), in_memory
    return (
        lambda rows: read(as_slice(rows_of_view[rows], owner.n_obs))[:, columns_of_view],
        in_memory,
    )


def _stored(adata: Any, layer: str | None) -> Any:
    return adata.X if layer is None else adata.layers[layer]


def as_slice(rows: Rows, n_rows: int) -> Rows:
    """Give neighbouring rows as a slice, which needs no copy; others as they are."""
    if isinstance(rows, slice):
        return slice(*rows.indices(n_rows))
    rows = np.asarray(rows, dtype=np.int64)
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _rows_of_csr(matrix: Any, rows: Rows) -> sp.csr_matrix:
    """Rows of a CSR matrix; neighbours as views of its arrays."""
    n_columns = matrix.shape[1]
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(matrix.shape[0])
        first, last = matrix.indptr[start], matrix.indptr[stop]
        values, columns = matrix.data[first:last], matrix.indices[first:last]
        return csr_around(values, columns, matrix.indptr[start : stop + 1] - first, n_columns)
    lengths = np.diff(matrix.indptr)[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    entries = np.repeat(matrix.indptr[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
    return csr_around(matrix.data[entries], matrix.indices[entries], offsets, n_columns)


def _read_ascending(read: Callable[[Rows], Any], rows: Rows) -> Any:
    """Read rows, in any order asked for, from what gives them in ascending order only."""
    if isinstance(rows, slice):
        return read(rows)
    wanted, back = np.unique(rows, return_inverse=True)
    return _in_memory(read(wanted))[back]


def _read_runs(array: Any, rows: Rows) -> NDArray:
    """Read ascending rows of a dense array on disk by slices; h5py is slow at all else."""
    if isinstance(rows, slice) or not len(rows):
        return array[rows if isinstance(rows, slice) else slice(0, 0)]
    is_cut = (np.diff(rows) > MAX_GAP) | (np.diff(rows // MAX_RUN) > 0)
    runs = np.split(rows, np.flatnonzero(is_cut) + 1)
    return np.concatenate([array[run[0] : run[-1] + 1][run - run[0]] for run in runs])


def _in_memory(block: Any) -> Any:
    """Compute a lazy block (dask); give any other as it is."""
    return block.compute() if hasattr(block, "compute") else block


def _as_csr(block: Any, n_columns: int) -> sp.csr_matrix:
    """Bring a block of any form to CSR, sorted and without duplicate entries."""
    block = _in_memory(block)
    if not sp.issparse(block):
        return _csr_of_dense(np.asarray(block))
    block = block.tocsr()  # itself, if it is that already
    block = csr_around(block.data, block.indices, block.indptr, n_columns)
    if not block.has_canonical_format:
        block = block.copy()
        block.sum_duplicates()
    return block


def _csr_of_dense(block: NDArray) -> sp.csr_matrix:
    """Do what scipy's own constructor does, in a third of its time."""
    n_rows, n_columns = block.shape
    is_entry = block != 0
    offsets = np.concatenate([[0], np.cumsum(np.count_nonzero(is_entry, axis=1))])
    entries = np.flatnonzero(is_entry)
    starts = np.repeat(np.arange(n_rows) * n_columns, np.diff(offsets))
    return csr_around(
        block.ravel()[entries], (entries - starts).astype(np.int32), offsets, n_columns
    )


def csr_around(
    values: NDArray, columns: NDArray, offsets: NDArray, n_columns: int
) -> sp.csr_matrix:
    """Put a CSR matrix around arrays. They are shared; scipy's own constructor copies slices."""
    if values.dtype == np.float16:  # scipy has no operations for it
        values = values.astype(np.float32)
    matrix = sp.csr_matrix((len(offsets) - 1, n_columns), dtype=values.dtype)
    matrix.data, matrix.indices = values, columns
    matrix.indptr = offsets.astype(columns.dtype, copy=False)
    return matrix
