"""Data and surroundings that all tests share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import anndata as ad
import hypothesis
import numpy as np
import pytest
import scanpy as sc
import torch
from scipy import sparse

import cellplm_tl as cp
from cellplm_tl import _anndata, _genes

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


# --- small networks with a spectrum ---------------------------------------------------------------

FACTORS = 12


@pytest.fixture(scope="session")
def spectrum_genes(_pbmc: ad.AnnData) -> tuple[str, ...]:
    """Give the Ensembl ids of the 300 most detected genes of `pbmc`, in the order of their ids."""
    ids = _genes.resolve(_pbmc.var_names).gene_ids
    names, first = np.unique(ids, return_index=True)
    detected = np.asarray((_pbmc.X > 0).sum(0)).ravel()[first] * (names != "")
    return tuple(names[np.sort(np.argsort(-detected, kind="stable")[:300])])


@pytest.fixture
def spectrum_network(spectrum_genes):
    """Build a small network for `spectrum_genes`, from the fields that differ, each time the same.

    Nothing starts at zero or at one, so that no part of it can hide behind its initial value.
    """

    def make(**fields) -> cp.models.CellPLM:
        small = {
            "embedder": "spectrum",
            "factors": FACTORS,
            "latent_size": FACTORS,
            "hidden": 32,
            "heads": 4,
            "encoder_layers": 2,
            "latent": "gaussian",
            "decoder": "none",
            "positions": "none",
            "dropout": 0.0,
            "genes": spectrum_genes,
        }
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            network = cp.models.CellPLM(cp.models.CellPLMConfig(**{**small, **fields}))
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            embedder = network.embedder
            embedder.loadings.copy_(torch.linalg.qr(torch.randn_like(embedder.loadings))[0])
            embedder.eigenvalues.copy_(torch.linspace(20, 2, FACTORS))
            embedder.scale.uniform_(0.5, 2)
            embedder.pool_profile.uniform_(0.5, 1).div_(embedder.pool_profile.sum())
        return network.eval()

    return make


@pytest.fixture
def spectrum_cells(_pbmc: ad.AnnData, pbmc_counts: ad.AnnData, spectrum_genes):
    """Read cells of `pbmc` that measure some of `spectrum_genes`; cell 0 has no counts."""
    ids = _genes.resolve(_pbmc.var_names).gene_ids
    column = {gene: number for number, gene in enumerate(ids)}
    dense = pbmc_counts.X.toarray()
    dense[0] = 0

    def read(rows: slice = slice(0, 160), genes: slice = slice(None), **parameters):
        columns = [column[gene] for gene in spectrum_genes[genes]]
        adata = ad.AnnData(dense[rows][:, columns], var=_pbmc.var.iloc[columns])
        adata.obs["sample"] = np.where(np.arange(adata.n_obs) % 3 == 0, "a", "b")
        return _anndata.read_cells(adata, spectrum_genes, **parameters)

    return read


@pytest.fixture(scope="session")
def representation():
    """Write [c z, w r] of cells out in float64, from their counts, latents and contexts' means.

    Takes a network, cells, latents (cells, latent), and the mean of log-normalised expression of
    the measured genes, one row per context or one for all; by default each context's own. Gives the
    part of the latent without c, that of the residual without w, factors, and what x and r are long
    (squared).
    """

    def write_out(network, cells, latents, means=None):
        config, embedder = network.config, network.embedder
        genes = cells.gene_index
        v, scale, eigenvalues, pool = (
            tensor.double().numpy()
            for tensor in (
                embedder.loadings[genes],
                embedder.scale[genes],
                embedder.eigenvalues,
                embedder.pool_profile[genes],
            )
        )
        block = cells.counts(np.arange(cells.n_cells))
        shape = (cells.n_cells, len(genes))
        counts = sparse.csr_matrix((block.values, block.columns, block.offsets), shape).toarray()
        target = 1e4 * (pool.sum() if config.target_sum == "panel" else 1)
        library = block.library_size[:, None]
        y = np.log1p(target * counts.astype(float) / np.where(library > 0, library, 1))
        x = np.zeros(shape)
        for number, rows in enumerate(cells.contexts):
            seen = rows[library[rows, 0] > 0]
            mean = y[seen].mean(0) if means is None else np.atleast_2d(means)[number % len(means)]
            x[seen] = np.clip((y[seen] - mean) / scale, -5, 10)
        precision = v.T @ v / config.noise + np.diag(1 / eigenvalues)
        factors = np.linalg.solve(precision, v.T @ x.T / config.noise).T
        residual = x - factors @ v.T
        left = (residual**2).sum(1)
        latent = np.asarray(latents, float)
        if config.unit_length:
            share = config.factor_share
            direction = _directions(factors / np.sqrt(eigenvalues))
            latent = _directions((1 - share) * _directions(latent) + share * direction)
            residual = _directions(residual)
        return latent, residual, factors, (x**2).sum(1), left

    return write_out


def _directions(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 1e-12)
