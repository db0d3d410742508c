"""`cp.tl.embed` beyond the contract that all tools keep (tests/test_contract*.py)."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from sklearn.metrics import adjusted_rand_score

import cellplm_tl as cp
from cellplm_tl._errors import (
    ContextWarning,
    CountsError,
    GenesError,
    ModelNotFoundError,
    OptionError,
    SlotError,
)
from cellplm_tl._genes import canonical, resolve

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
MODELS = ["mini", "linear_transfer"]


@pytest.mark.parametrize("model", MODELS)
def test_clusters_of_real_cells(pbmc, model):
    """Clusters of the embedding agree with labels that were not made from it."""
    cp.tl.embed(pbmc, model=model)
    sc.pp.neighbors(pbmc, use_rep="X_cellplm")
    sc.tl.leiden(pbmc, resolution=1.0, flavor="igraph", n_iterations=2, directed=False)
    assert adjusted_rand_score(pbmc.obs["bulk_labels"], pbmc.obs["leiden"]) > 0.38


@pytest.mark.parametrize("model", MODELS)
def test_what_is_written(pbmc_counts, model):
    adata = pbmc_counts
    cp.tl.embed(adata, model=model, n_components=12)
    embedding, known = adata.obsm["X_cellplm"], adata.obs["cellplm_known"]
    record = adata.uns["cellplm"]["X_cellplm"]
    assert embedding.shape == (700, 12)
    assert embedding.dtype == known.dtype == np.float32
    assert known.between(0, 1).all()
    assert record["model"]["name"] == model
    assert record["known"] == pytest.approx(known.mean(), abs=0.1)
    np.testing.assert_allclose(embedding.mean(0), 0, atol=1e-3)
    variances = embedding.var(0)
    assert (np.diff(variances) <= 1e-3 * variances[0]).all()


def test_more_components_than_there_are(pbmc_counts):
    adata = pbmc_counts[:40, :80].copy()
    cp.tl.embed(adata, n_components=500)
    embedding = adata.obsm["X_cellplm"]
    assert embedding.shape == (40, 500)
    np.testing.assert_allclose(embedding[:, 40:], 0, atol=1e-2)  # the rank of 40 cells is 39


@pytest.mark.parametrize("batch_key", [None, "sample"])
def test_the_floor_written_out(pbmc_counts, batch_key):
    """`linear_transfer` in dense float64, from the formulas of docs/methods/embed.md."""
    adata = pbmc_counts
    adata.obs["sample"] = np.arange(700) % 2
    cp.tl.embed(adata, model="linear_transfer", batch_key=batch_key, n_components=8)

    model = cp.models.load("linear_transfer")
    spectrum = {name: t.double().numpy() for name, t in model.network.embedder.state_dict().items()}
    gene_ids = canonical(resolve(adata.var_names).gene_ids)
    position = {gene: row for row, gene in enumerate(canonical(model.genes))}
    columns = [c for c, gene in enumerate(gene_ids) if gene in position]
    rows = [position[gene_ids[c]] for c in columns]
    assert len(set(rows)) == len(rows)  # no gene stands in two columns here
    counts = adata.X.toarray().astype(float)
    library = counts[:, [c for c, gene in enumerate(gene_ids) if gene]].sum(1, keepdims=True)
    y = np.log1p(1e4 * counts[:, columns] / library)
    context = np.zeros(700) if batch_key is None else adata.obs[batch_key].to_numpy()
    mean = np.stack([y[context == c].mean(0) for c in context])
    x = np.clip((y - mean) / spectrum["scale"][rows], -5, 10)
    v, eigenvalues = spectrum["loadings"][rows], spectrum["eigenvalues"]
    f = np.linalg.solve(v.T @ v / 0.2 + np.diag(1 / eigenvalues), v.T @ x.T / 0.2).T
    z, residual = f / np.sqrt(eigenvalues), x - f @ v.T
    scaled = z * np.sqrt(f.var(0).sum() / z.var(0).sum())
    representation = np.hstack([scaled, 0.7 * residual])
    u, s, _ = np.linalg.svd(representation - representation.mean(0), full_matrices=False)
    expected = u[:, :8] * s[:8]

    embedding = adata.obsm["X_cellplm"]
    expected *= np.sign((expected * embedding).sum(0))
    # The iteration tells components apart as their variances differ; the first are well apart.
    np.testing.assert_allclose(embedding[:, :3], expected[:, :3], atol=2e-2)
    captured = (embedding.astype(float) ** 2).sum() / (expected**2).sum()
    assert 0.997 < captured < 1.0001
    known = 1 - (residual**2).sum(1) / (x**2).sum(1)
    np.testing.assert_allclose(adata.obs["cellplm_known"], known, atol=1e-4)


def test_the_bar_ends_at_the_last_cell(pbmc_counts, monkeypatch):
    bars = []
    module = sys.modules["cellplm_tl.tl.embed"]
    make = module.progress_bar
    monkeypatch.setattr(module, "progress_bar", lambda n: bars.append(make(n)) or bars[-1])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with cp.settings.override(progress=True):
        cp.tl.embed(pbmc_counts)
    assert [round(bar.n, 3) for bar in bars] == [700]


def test_key_added_moves_everything(pbmc_counts):
    cp.tl.embed(pbmc_counts, key_added="X_mine")
    assert "X_mine" in pbmc_counts.obsm
    assert "mine_known" in pbmc_counts.obs
    assert set(pbmc_counts.uns["cellplm"]) == {"X_mine"}


def test_counts_and_their_logarithms_give_the_same(pbmc, pbmc_counts):
    cp.tl.embed(pbmc)
    cp.tl.embed(pbmc_counts)
    np.testing.assert_allclose(
        pbmc.obsm["X_cellplm"], pbmc_counts.obsm["X_cellplm"], rtol=1e-3, atol=1e-2
    )


def test_a_context_does_not_see_another(pbmc_counts):
    """Latents, before the rotation that all cells share: known shares are per cell and context."""
    adata = pbmc_counts
    adata.obs["sample"] = np.where(np.arange(700) < 300, "a", "b")
    cp.tl.embed(adata, batch_key="sample")
    changed = adata.copy()
    changed.X[:300] *= 3
    cp.tl.embed(changed, batch_key="sample")
    np.testing.assert_array_equal(
        adata.obs["cellplm_known"][300:], changed.obs["cellplm_known"][300:]
    )
    assert not np.array_equal(adata.obs["cellplm_known"][:300], changed.obs["cellplm_known"][:300])


def test_what_a_sample_has_in_common_is_taken_off(pbmc_counts):
    """Capture that differs between samples by gene is not seen with the samples as contexts."""
    adata = pbmc_counts
    rng = np.random.default_rng(0)
    adata.obs["sample"] = rng.permutation(np.repeat(["a", "b"], 350))
    is_b = (adata.obs["sample"] == "b").to_numpy()
    capture = rng.uniform(0.1, 1, adata.n_vars)
    dense = adata.X.toarray().astype(int)
    dense[is_b] = rng.binomial(dense[is_b], capture)
    adata.X = dense.astype(np.float32)
    mixing = {}
    for key in (None, "sample"):
        cp.tl.embed(adata, batch_key=key)
        scores = cp.metrics.clustering(
            adata.obsm["X_cellplm"], adata.obs["bulk_labels"], adata.obs["sample"]
        )
        mixing[key] = scores["batch_mixing"]
    assert mixing["sample"] > mixing[None] + 0.1


def test_contexts_that_look_like_types_are_warned_of(pbmc_counts):
    """Cells of one type, and the same with their genes in another order: two more types."""
    adata = pbmc_counts[pbmc_counts.obs["bulk_labels"] == "CD14+ Monocyte"].copy()
    adata.obs["sample"] = np.arange(adata.n_obs) % 3
    cp.tl.embed(adata, batch_key="sample")  # a warning would be an error here
    dense = adata.X.toarray()
    for number in (1, 2):
        dense[adata.obs["sample"] == number] = np.roll(
            dense[adata.obs["sample"] == number], 100 * number, axis=1
        )
    adata.X = dense
    with pytest.warns(ContextWarning, match="lies between the contexts"):
        cp.tl.embed(adata, batch_key="sample")


def test_small_contexts_are_warned_of(pbmc_counts):
    pbmc_counts.obs["sample"] = ["single"] + ["rest"] * 699
    with pytest.warns(ContextWarning, match="1 of 2 contexts have fewer than 10 cells"):
        cp.tl.embed(pbmc_counts, batch_key="sample")


def test_unmeasured_genes_are_not_zeros(pbmc_counts):
    """Genes that are missing change less than genes that are there and never counted."""
    cp.tl.embed(pbmc_counts)
    panel = pbmc_counts[:, ::3].copy()
    zeros = pbmc_counts.copy()
    keep = np.zeros(zeros.n_vars, bool)
    keep[::3] = True
    zeros.X = zeros.X.multiply(keep[None, :]).tocsr()
    scores = {}
    for name, adata in (("panel", panel), ("zeros", zeros)):
        cp.tl.embed(adata)
        scores[name] = adata.obs["cellplm_known"].mean()
    assert scores["panel"] > scores["zeros"]


@pytest.mark.parametrize("layout", ["gmvae", "vae"])
def test_released_checkpoints(layout):
    """The release's own input gives the release's own latent, in the order of the data."""
    stored = np.load(GOLDEN / f"forward_{layout}.npz")
    adata = ad.AnnData(stored["counts"].astype(np.float32))
    adata.var_names = stored["genes"].astype(str)
    adata.obs["batch"] = stored["batch"].astype(str)
    cp.tl.embed(adata, model=GOLDEN / f"golden_{layout}.best.ckpt")
    expected = stored["derived_latent_expected" if layout == "gmvae" else "whole_latent"]
    np.testing.assert_allclose(adata.obsm["X_cellplm"], expected, atol=2e-5)
    assert "cellplm_known" not in adata.obs
    if layout == "vae":
        cp.tl.embed(adata, model=GOLDEN / f"golden_{layout}.best.ckpt", batch_key="batch")
        np.testing.assert_allclose(adata.obsm["X_cellplm"], stored["perbatch_latent"], atol=2e-5)


def test_a_copy_of_a_file_is_in_memory(pbmc_counts, tmp_path):
    pbmc_counts.write_h5ad(tmp_path / "pbmc.h5ad")
    backed = ad.read_h5ad(tmp_path / "pbmc.h5ad", backed="r")
    copy = cp.tl.embed(backed, copy=True)
    assert not copy.isbacked
    assert "X_cellplm" in copy.obsm
    assert "X_cellplm" not in backed.obsm


def test_errors_say_what_to_do_and_change_nothing(pbmc_counts):
    before = pbmc_counts.copy()
    scaled = sc.pp.scale(pbmc_counts.X.toarray())
    mouse = pbmc_counts.copy()
    mouse.var_names = [name.capitalize() for name in mouse.var_names]
    cases = [
        (lambda: cp.tl.embed(ad.AnnData(scaled, var=pbmc_counts.var)), CountsError, "raw"),
        (lambda: cp.tl.embed(mouse), GenesError, "mouse"),
        (lambda: cp.tl.embed(pbmc_counts, model="maxi"), ModelNotFoundError, "'mini'"),
        (lambda: cp.tl.embed(pbmc_counts, model="20230926_85M"), ModelNotFoundError, "place them"),
        (lambda: cp.tl.embed(pbmc_counts, batch_key="sampel"), SlotError, "bulk_labels"),
        (lambda: cp.tl.embed(pbmc_counts, layer="raw"), SlotError, "layers are none"),
        (lambda: cp.tl.embed(pbmc_counts, n_components=0), OptionError, "positive"),
        (lambda: cp.tl.embed(pbmc_counts, random_state=-1), OptionError, "random_state must be"),
        (lambda: cp.tl.embed(pbmc_counts, batch_key=["phase"]), SlotError, "is no column"),
        (
            lambda: cp.tl.embed(pbmc_counts, model=GOLDEN / "golden_vae.best.ckpt", n_components=3),
            OptionError,
            "models with a spectrum",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    assert not pbmc_counts.obsm
    assert "cellplm" not in pbmc_counts.uns
    assert (pbmc_counts.X != before.X).nnz == 0
