"""Data and surroundings that all tests share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import anndata as ad
import hypothesis
import numpy as np
import pytest
import scanpy as sc
from scipy import sparse

import cellplm_tl as cp

# The same examples in every run: a change is to blame for a failure, not the day.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _own_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Run every test with the default settings, without bars and without the user's models."""
    empty = tmp_path_factory.getbasetemp() / "no_weights"
    monkeypatch.setenv("CELLPLM_WEIGHTS_DIR", str(empty))
    with cp.settings.override(progress=False):
        yield


@pytest.fixture(scope="session")
def _pbmc() -> ad.AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scanpy's file is older than its own format
        full = sc.datasets.pbmc68k_reduced()
    return ad.AnnData(full.raw.X, obs=full.obs[["bulk_labels", "phase"]], var=full.raw.var[[]])


@pytest.fixture
def pbmc(_pbmc: ad.AnnData) -> ad.AnnData:
    """Give the 700 real cells × 765 genes that scanpy ships, log-normalised (CSR, float32)."""
    return _pbmc.copy()


@pytest.fixture
def pbmc_counts(_pbmc: ad.AnnData) -> ad.AnnData:
    """Give the counts of `pbmc` (CSR, float32): the smallest value of each cell is one count.

    Three decimals suffice for that: no quotient is further than 0.12 from an integer.
    """
    lognorm = sparse.csr_matrix(_pbmc.X)
    scaled = np.expm1(lognorm.data.astype(np.float64))
    step = np.minimum.reduceat(scaled, lognorm.indptr[:-1])
    counts = np.rint(scaled / np.repeat(step, np.diff(lognorm.indptr))).astype(np.float32)
    matrix = sparse.csr_matrix((counts, lognorm.indices, lognorm.indptr), shape=lognorm.shape)
    return ad.AnnData(matrix, obs=_pbmc.obs.copy(), var=_pbmc.var.copy())
