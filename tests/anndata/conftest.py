"""One small set of cells, in every form that an AnnData can hold it in."""

from __future__ import annotations

import hashlib
import lzma
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

N_CELLS, N_GENES = 37, 113
# Ids of today that are no two of one gene.
with lzma.open(Path(__file__).parents[1] / "data" / "cellplm_85M_gene_ids.txt.xz", "rt") as file:
    GENE_IDS = file.read().split()[:2000]


@pytest.fixture
def counts() -> np.ndarray:
    """Give counts of 37 cells × 113 genes; one cell and one gene have none."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.5, 1.0, N_GENES) * rng.lognormal(0, 0.5, (N_CELLS, 1)))
    counts[4] = 0
    counts[:, 9] = 0
    return counts.astype(np.float32)


@pytest.fixture
def model_genes() -> list[str]:
    """Give what a model may know: most of the genes measured and others, in an order of its own."""
    rng = np.random.default_rng(1)
    return [GENE_IDS[i] for i in rng.permutation([*range(10, N_GENES), *range(200, 250)])]


def to_anndata(matrix: Any) -> ad.AnnData:
    n_cells, n_genes = matrix.shape
    obs = pd.DataFrame(
        {"sample": pd.Categorical([("b", "a", "c")[i % 3] for i in range(n_cells)])},
        index=[f"cell{i}" for i in range(n_cells)],
    )
    return ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=GENE_IDS[:n_genes]))


@pytest.fixture(scope="session")
def make_anndata() -> Callable[[Any], ad.AnnData]:
    """Give a function that makes an AnnData of a matrix: known genes, three samples."""
    return to_anndata


def csr(counts: np.ndarray, dtype: Any = np.float32) -> sparse.csr_matrix:
    return sparse.csr_matrix(counts, dtype=dtype)


def unsorted(counts: np.ndarray) -> sparse.csr_matrix:
    m = csr(counts)
    for start, stop in zip(m.indptr, m.indptr[1:], strict=False):
        m.data[start:stop] = m.data[start:stop][::-1]
        m.indices[start:stop] = m.indices[start:stop][::-1]
    m.has_sorted_indices = False
    return m


def with_duplicates(counts: np.ndarray) -> sparse.csr_matrix:
    """Give every entry as 1 + (count - 1), and so some zeros as well."""
    m = csr(counts)
    data = np.column_stack([np.ones_like(m.data), m.data - 1]).ravel()
    return sparse.csr_matrix((data, np.repeat(m.indices, 2), 2 * m.indptr), m.shape)


def with_zeros(counts: np.ndarray) -> sparse.csr_matrix:
    m = csr(counts + 1)
    m.data -= 1
    return m


def wide_indices(counts: np.ndarray) -> sparse.csr_matrix:
    m = csr(counts)
    m.indices, m.indptr = m.indices.astype(np.int64), m.indptr.astype(np.int64)
    return m


def read_only(counts: np.ndarray) -> sparse.csr_matrix:
    m = csr(counts)
    for array in (m.data, m.indices, m.indptr):
        array.flags.writeable = False
    return m


def view(form: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray, Path], ad.AnnData]:
    """Give a view, of rows and columns in another order, of something larger."""

    def make(counts: np.ndarray, _: Path) -> ad.AnnData:
        rows = np.random.default_rng(2).permutation(2 * N_CELLS)
        columns = np.random.default_rng(3).permutation(2 * N_GENES)
        larger = np.full((2 * N_CELLS, 2 * N_GENES), 7, np.float32)
        larger[np.ix_(rows[:N_CELLS], columns[:N_GENES])] = counts
        adata = to_anndata(form(larger))
        names = np.array(adata.obs_names, dtype=object)
        names[rows[:N_CELLS]] = [f"cell{i}" for i in range(N_CELLS)]
        names[rows[N_CELLS:]] = [f"other{i}" for i in range(N_CELLS)]
        adata.obs_names = names
        ids = np.empty(2 * N_GENES, dtype=object)
        ids[columns] = GENE_IDS[: 2 * N_GENES]
        adata.var_names = ids
        column = np.empty(2 * N_CELLS, dtype=object)
        column[rows] = [("b", "a", "c")[i % N_CELLS % 3] for i in range(2 * N_CELLS)]
        adata.obs["sample"] = pd.Categorical(column)
        return adata[rows[:N_CELLS], columns[:N_GENES]]

    return make


def backed(form: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray, Path], ad.AnnData]:
    def make(counts: np.ndarray, tmp_path: Path) -> ad.AnnData:
        to_anndata(form(counts)).write_h5ad(tmp_path / "cells.h5ad")
        return ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")

    return make


def backed_view(counts: np.ndarray, tmp_path: Path) -> ad.AnnData:
    larger = np.vstack([np.full((5, N_GENES), 3, np.float32), counts])
    to_anndata(csr(larger)).write_h5ad(tmp_path / "cells.h5ad")
    adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    adata.obs = to_anndata(csr(np.vstack([counts, np.ones((5, N_GENES))]))).obs.iloc[
        np.r_[N_CELLS : N_CELLS + 5, :N_CELLS]
    ]
    return adata[5:]


def zarr_store(form: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray, Path], ad.AnnData]:
    def make(counts: np.ndarray, tmp_path: Path) -> ad.AnnData:
        zarr = pytest.importorskip("zarr")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of zarr's, about formats to come
            to_anndata(form(counts)).write_zarr(tmp_path / "cells.zarr")
        stored = zarr.open(tmp_path / "cells.zarr", mode="r")["X"]
        return to_anndata(ad.io.sparse_dataset(stored) if form is csr else stored)

    return make


def dask_array(form: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray, Path], ad.AnnData]:
    def make(counts: np.ndarray, _: Path) -> ad.AnnData:
        da = pytest.importorskip("dask.array")
        return to_anndata(da.from_array(form(counts), chunks=(10, N_GENES), asarray=False))

    return make


def plain(form: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray, Path], ad.AnnData]:
    return lambda counts, _: to_anndata(form(counts))


FORMS: dict[str, Callable[[np.ndarray, Path], ad.AnnData]] = {
    "csr": plain(csr),
    "csc": plain(sparse.csc_matrix),
    "dense": plain(np.array),
    "dense in columns": plain(np.asfortranarray),
    "csr_array": plain(sparse.csr_array),
    "csc_array": plain(sparse.csc_array),
    "float64": plain(lambda c: csr(c, np.float64)),
    "int32": plain(lambda c: csr(c, np.int32)),
    "uint8": plain(lambda c: csr(c, np.uint8)),
    "dense int64": plain(lambda c: c.astype(np.int64)),
    "dense float16": plain(lambda c: c.astype(np.float16)),
    "unsorted indices": plain(unsorted),
    "duplicate entries": plain(with_duplicates),
    "explicit zeros": plain(with_zeros),
    "64-bit indices": plain(wide_indices),
    "read-only": plain(read_only),
    "view of csr": view(csr),
    "view of csc": view(sparse.csc_matrix),
    "view of dense": view(np.array),
    "backed csr": backed(csr),
    "backed csc": backed(sparse.csc_matrix),
    "backed dense": backed(np.array),
    "backed view": backed_view,
    "zarr csr": zarr_store(csr),
    "zarr dense": zarr_store(np.array),
    "dask csr": dask_array(csr),
    "dask dense": dask_array(np.array),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[np.ndarray], ad.AnnData]:
    """Give a function that puts cells × genes into an AnnData, once for each form."""
    return lambda counts: FORMS[request.param](counts, tmp_path)


def digest(adata: ad.AnnData, folder: Path) -> str:
    """Digest every array that holds the matrices, as it lies in memory, and every file."""
    found = hashlib.sha256()
    if adata.is_view:
        adata = adata._adata_ref
    for matrix in [adata.X, *adata.layers.values()]:
        parts = ["data", "indices", "indptr"] if sparse.issparse(matrix) else []
        for array in [getattr(matrix, part) for part in parts] or [matrix]:
            if isinstance(array, np.ndarray):
                found.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


@pytest.fixture
def unchanged(tmp_path: Path) -> Callable[[ad.AnnData], str]:
    return lambda adata: digest(adata, tmp_path)
