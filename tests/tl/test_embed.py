"""`cp.tl.embed` beyond the contract that all tools keep (tests/test_contract*.py)."""

from __future__ import annotations

import dataclasses
import io
import re
import sys
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import torch
from sklearn.metrics import adjusted_rand_score

import cellplm_tl as cp
from cellplm_tl import _anndata
from cellplm_tl._errors import (
    ContextWarning,
    CountsError,
    GenesError,
    InputError,
    ModelNotFoundError,
    OptionError,
    SlotError,
)
from cellplm_tl._genes import canonical, resolve
from cellplm_tl._stored import context_of_pool, context_to_tensors

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


# --- in the space of a reference ------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini() -> cp.models.Model:
    return cp.models.load("mini")


@pytest.fixture(scope="module")
def _with_context(mini, _pbmc) -> cp.models.Model:
    lognorm = _pbmc[::4].copy()
    cells = _anndata.read_cells(lognorm, mini.genes)
    context = context_of_pool(mini.network, [cells], 9, np.random.default_rng(0))
    return dataclasses.replace(mini, context=context_to_tensors(*context))


@pytest.fixture
def mini_with_context(_with_context) -> cp.models.Model:
    """Give mini with a stored context of 175 cells, nine components wide."""
    return dataclasses.replace(_with_context, context=dict(_with_context.context))


def assert_same_cells(one, other, relative=1e-4) -> None:
    """Compare two embeddings; the largest number sets the scale."""
    np.testing.assert_allclose(one, other, rtol=0, atol=relative * np.abs(other).max())


@pytest.fixture
def reference(pbmc_counts, mini) -> ad.AnnData:
    """Give 300 cells in two samples, embedded twelve wide."""
    adata = pbmc_counts[:300].copy()
    adata.obs["sample"] = np.arange(300) % 2
    cp.tl.embed(adata, model=mini, batch_key="sample", n_components=12)
    return adata


def without_results(adata: ad.AnnData) -> ad.AnnData:
    return ad.AnnData(adata.X.copy(), obs=adata.obs[["sample"]].copy(), var=adata.var.copy())


def test_a_copy_of_the_reference_has_its_coordinates(reference, mini):
    query = without_results(reference)
    cp.tl.embed(query, reference=reference, model=mini, batch_key="sample")
    assert query.obsm["X_cellplm"].shape == (300, 12)  # as wide as the reference is
    assert_same_cells(query.obsm["X_cellplm"], reference.obsm["X_cellplm"], 1e-5)
    np.testing.assert_array_equal(query.obs["cellplm_known"], reference.obs["cellplm_known"])
    record = query.uns["cellplm"]["X_cellplm"]
    assert record["parameters"]["reference"] == "AnnData"
    assert "reference" not in reference.uns["cellplm"]["X_cellplm"]["parameters"]
    again = without_results(reference)
    cp.tl.embed(again, reference=query, model=mini, batch_key="sample")  # it has the same frame
    assert_same_cells(again.obsm["X_cellplm"], reference.obsm["X_cellplm"], 1e-5)


def test_cells_lie_near_those_of_their_type_in_the_reference(pbmc_counts):
    reference, query = pbmc_counts[:300].copy(), pbmc_counts[300:500].copy()
    options = {"model": "linear_transfer", "n_components": 12}
    cp.tl.embed(reference, **options)
    before = reference.copy()
    own = cp.tl.embed(query, **options, copy=True).obsm["X_cellplm"]
    cp.tl.embed(query, **options, reference=reference)
    embedding, space = query.obsm["X_cellplm"], reference.obsm["X_cellplm"]
    truth, labels = (a.obs["bulk_labels"].astype(str).to_numpy() for a in (query, reference))
    agreement = {}
    for name, cells in (("reference", embedding), ("own", own)):
        distance = ((cells[:, None] - space[None]) ** 2).sum(2)
        agreement[name] = (labels[distance.argmin(1)] == truth).mean()
    assert agreement["reference"] > 0.5
    assert agreement["reference"] > agreement["own"] + 0.1  # components of another data set
    # And the reference is as it was.
    np.testing.assert_array_equal(space, before.obsm["X_cellplm"])
    assert reference.obs.equals(before.obs)
    for name, value in before.uns["cellplm"]["X_cellplm"]["frame"].items():
        np.testing.assert_array_equal(reference.uns["cellplm"]["X_cellplm"]["frame"][name], value)


def test_contexts_are_those_of_the_query(reference, pbmc_counts, mini):
    """Each of its samples by itself: in a space that is there, one does not see another."""
    query = pbmc_counts[300:500].copy()
    query.obs["sample"] = np.arange(200) % 2
    cp.tl.embed(query, reference=reference, model=mini, batch_key="sample")
    for number in range(2):
        sample = query[query.obs["sample"] == number].copy()
        expected = sample.obsm["X_cellplm"].copy()
        cp.tl.embed(sample, reference=reference, model=mini)
        assert_same_cells(sample.obsm["X_cellplm"], expected)
    cp.tl.embed(sample, reference=reference[:50].copy(), model=mini)
    assert_same_cells(sample.obsm["X_cellplm"], expected)
    joined = query.copy()
    cp.tl.embed(joined, reference=reference, model=mini)
    assert np.abs(joined.obsm["X_cellplm"] - query.obsm["X_cellplm"]).max() > 0.05


@pytest.mark.parametrize("model", MODELS)
def test_a_reference_from_a_file_and_in_part(model, pbmc_counts, tmp_path):
    reference = pbmc_counts[:300].copy()
    cp.tl.embed(reference, model=model, n_components=5)
    query = pbmc_counts[250:400].copy()
    cp.tl.embed(query, reference=reference, model=model)
    expected = query.obsm["X_cellplm"]
    path = tmp_path / "reference.h5ad"
    reference.write_h5ad(path)
    read = ad.read_h5ad(path)
    in_memory, kept = (a.uns["cellplm"]["X_cellplm"]["frame"] for a in (reference, read))
    assert in_memory.keys() == kept.keys()
    for name, values in kept.items():
        assert values.dtype == in_memory[name].dtype
        np.testing.assert_array_equal(values, in_memory[name])
    references = {
        "file": read,
        "backed": ad.read_h5ad(path, backed="r"),
        "some cells": reference[::3].copy(),
        "a view of cells": reference[10:20],
        "some genes": reference[:, ::2].copy(),
        "no cells": reference[:0].copy(),
    }
    for name, one in references.items():
        cp.tl.embed(query, reference=one, model=model)
        np.testing.assert_array_equal(query.obsm["X_cellplm"], expected, err_msg=name)
    query.write_h5ad(tmp_path / "query.h5ad")
    again = pbmc_counts[250:400].copy()
    cp.tl.embed(again, reference=ad.read_h5ad(tmp_path / "query.h5ad"), model=model)
    np.testing.assert_array_equal(again.obsm["X_cellplm"], expected)


def test_adata_may_be_its_own_reference(reference, mini):
    before = reference.obsm["X_cellplm"].copy()
    cp.tl.embed(reference, reference=reference, model=mini, batch_key="sample")
    assert_same_cells(reference.obsm["X_cellplm"], before, 1e-5)


@pytest.mark.parametrize("fewer", ["query", "reference"])
def test_fewer_genes_on_either_side(fewer, pbmc_counts):
    """Half of the genes say much the same of a cell, in the same space."""
    reference, query = pbmc_counts[:300].copy(), pbmc_counts[:300].copy()
    if fewer == "query":
        query = query[:, ::2].copy()
    else:
        reference = reference[:, ::2].copy()
    cp.tl.embed(reference, model="linear_transfer", n_components=6)
    cp.tl.embed(query, reference=reference, model="linear_transfer")
    one, other = query.obsm["X_cellplm"], reference.obsm["X_cellplm"]
    assert one.shape == other.shape == (300, 6)
    for column in range(2):
        assert np.corrcoef(one[:, column], other[:, column])[0, 1] > 0.85


def test_fewer_components_than_the_reference_has(reference, mini):
    query = without_results(reference)
    cp.tl.embed(query, reference=reference, model=mini, batch_key="sample", n_components=4)
    assert_same_cells(query.obsm["X_cellplm"], reference.obsm["X_cellplm"][:, :4])


def test_under_another_key(reference, mini):
    query = without_results(reference)
    cp.tl.embed(reference, model=mini, n_components=3, key_added="X_other")
    cp.tl.embed(query, reference=reference, model=mini, key_added="X_other")
    assert_same_cells(query.obsm["X_other"], reference.obsm["X_other"])


def test_the_frame_in_the_record(reference, mini):
    frame = reference.uns["cellplm"]["X_cellplm"]["frame"]
    n_genes = reference.uns["cellplm"]["X_cellplm"]["genes"]["n_used"]
    shapes = {name: values.shape for name, values in frame.items()}
    assert shapes == {
        "latent": (mini.config.latent_size, 12),
        "directions": (n_genes, 12),
        "genes": (n_genes,),
        "mean": (12,),
        "scales": (2,),
    }
    known = resolve(reference.var_names).gene_ids
    assert set(np.array(mini.genes)[frame["genes"]]) <= set(known)


@pytest.mark.parametrize("options", [{"reference": True}, {"context": "model"}])
def test_the_bar_ends_at_the_last_cell_in_a_frame_too(
    options, reference, mini_with_context, monkeypatch
):
    query, bars = without_results(reference), []
    if "reference" in options:
        options = {"reference": reference}
    module = sys.modules["cellplm_tl.tl.embed"]
    make = module.progress_bar
    monkeypatch.setattr(module, "progress_bar", lambda n: bars.append(make(n)) or bars[-1])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with cp.settings.override(progress=True):
        cp.tl.embed(query, model=mini_with_context, batch_key="sample", **options)
    assert [round(bar.n, 3) for bar in bars] == [300]


# --- in the space of the model --------------------------------------------------------------------


def test_a_cell_in_the_model_s_context_depends_on_itself(mini_with_context, pbmc_counts):
    adata = pbmc_counts[:300].copy()
    adata.obs["sample"] = np.arange(300) % 2
    options = {"model": mini_with_context, "context": "model"}
    cp.tl.embed(adata, **options)
    expected, known = adata.obsm["X_cellplm"], adata.obs["cellplm_known"].to_numpy()
    assert expected.shape == (300, 9)  # as wide as what is stored
    assert known.min() > 0
    order = np.random.default_rng(0).permutation(300)
    for rows in (order, np.arange(0, 300, 7), [42]):
        part = adata[rows].copy()
        cp.tl.embed(part, **options)
        assert_same_cells(part.obsm["X_cellplm"], expected[rows])
        np.testing.assert_allclose(part.obs["cellplm_known"], known[rows], atol=1e-5)
    cp.tl.embed(adata, **options, batch_key="sample", random_state=7, n_components=5)
    assert_same_cells(adata.obsm["X_cellplm"], expected[:, :5])


def test_data_that_are_the_model_s_context_are_embedded_alike(mini_with_context, pbmc):
    """The stored context is that of these cells: only rounding, and signs, lie in between."""
    adata = pbmc[::4].copy()
    cp.tl.embed(adata, model=mini_with_context, n_components=9)
    own, known = adata.obsm["X_cellplm"], adata.obs["cellplm_known"].to_numpy()
    cp.tl.embed(adata, model=mini_with_context, context="model")
    stored = adata.obsm["X_cellplm"] * np.sign((adata.obsm["X_cellplm"] * own).sum(0))
    assert_same_cells(stored[:, :3], own[:, :3], 2e-3)
    np.testing.assert_allclose(adata.obs["cellplm_known"], known, atol=1e-5)


def test_the_record_of_the_model_s_context(mini_with_context, pbmc_counts, tmp_path):
    adata = pbmc_counts[:50].copy()
    cp.tl.embed(adata, model=mini_with_context, context="model")
    record = adata.uns["cellplm"]["X_cellplm"]
    assert record["parameters"]["context"] == "model"
    assert "frame" not in record  # it is the model's
    adata.write_h5ad(tmp_path / "adata.h5ad")
    reference = ad.read_h5ad(tmp_path / "adata.h5ad")
    query = pbmc_counts[30:80].copy()
    cp.tl.embed(query, reference=reference, model=mini_with_context, context="model")
    np.testing.assert_allclose(
        query.obsm["X_cellplm"][:20], adata.obsm["X_cellplm"][30:], atol=1e-3
    )


def test_small_contexts_are_no_matter_to_the_model_s(mini_with_context, pbmc_counts):
    pbmc_counts.obs["sample"] = ["single"] + ["rest"] * 699
    cp.tl.embed(pbmc_counts, model=mini_with_context, context="model", batch_key="sample")


def test_a_model_with_a_context_from_a_file(mini_with_context, pbmc_counts, tmp_path):
    adata = pbmc_counts[:50].copy()
    cp.tl.embed(adata, model=mini_with_context, context="model")
    expected = adata.obsm["X_cellplm"]
    for dtype, relative in (("float32", 1e-6), ("float16", 0.02)):
        path = cp.models.save(mini_with_context, tmp_path / dtype, dtype=dtype)
        cp.tl.embed(adata, model=path, context="model")
        assert_same_cells(adata.obsm["X_cellplm"], expected, relative)


# --- what cannot be done in either ----------------------------------------------------------------


def copies(adata: ad.AnnData) -> tuple:
    return adata.X.toarray(), adata.obs.copy(), {k: v.copy() for k, v in adata.obsm.items()}


def test_references_that_cannot_be_used(reference, mini, mini_with_context, pbmc_counts):
    """Each is said before anything is computed, and changes neither object."""
    query = pbmc_counts[300:400].copy()
    never = pbmc_counts[:50].copy()
    other_tool = never.copy()
    other_tool.uns["cellplm"] = {"X_cellplm": {"tool": "annotate"}}
    damaged = never.copy()
    damaged.uns["cellplm"] = "mine"
    of_model = never.copy()
    cp.tl.embed(of_model, model=mini_with_context, context="model")
    golden = GOLDEN / "golden_vae.best.ckpt"
    cases = [
        ({"reference": never}, SlotError, "has no record of embed under 'X_cellplm'"),
        ({"reference": never}, SlotError, r"run cp.tl.embed\(reference, …\) first"),
        ({"reference": other_tool}, SlotError, "has no record of embed"),
        ({"reference": damaged}, SlotError, "has no record of embed"),
        ({"key_added": "X_other"}, SlotError, "has no record of embed under 'X_other'"),
        ({"model": "linear_transfer"}, OptionError, "with the model 'mini' .*'linear_transfer'"),
        (
            {"model": dataclasses.replace(mini, sha256="0" * 64)},
            OptionError,
            "(000000000000).*embed both alike",
        ),
        (
            {"model": mini_with_context, "context": "model"},
            OptionError,
            "context='data', adata would be .*context='model'",
        ),
        (
            {"model": mini_with_context, "reference": of_model},
            OptionError,
            "context='model', adata would be .*context='data'",
        ),
        ({"n_components": 13}, OptionError, "n_components=13 is more than the 12 of the space"),
        (
            {"model": mini_with_context, "reference": None, "context": "model", "n_components": 10},
            OptionError,
            "n_components=10 is more than the 9 of the space",
        ),
        ({"reference": reference.X}, InputError, "reference must be an AnnData object"),
        ({"reference": "reference.h5ad"}, InputError, "reference must be an AnnData object"),
        ({"model": golden}, OptionError, "reference is for models with a spectrum"),
    ]
    before = copies(reference), copies(query)
    records = repr(reference.uns)
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            cp.tl.embed(query, **{"reference": reference, "model": mini, **options})
    after = copies(reference), copies(query)
    for (x, obs, obsm), (x_then, obs_then, obsm_then) in zip(after, before, strict=True):
        np.testing.assert_array_equal(x, x_then)
        assert obs.equals(obs_then)
        assert obsm.keys() == obsm_then.keys()
        assert all(np.array_equal(value, obsm_then[key]) for key, value in obsm.items())
    assert repr(reference.uns) == records
    assert not query.uns


def test_contexts_that_cannot_be_used(mini, pbmc_counts):
    adata = pbmc_counts[:50].copy()
    none_kept = dataclasses.replace(mini, context={})
    message = "context='model' needs a model that keeps a context, which 'mini' does not"
    with pytest.raises(OptionError, match=message):
        cp.tl.embed(adata, model=none_kept, context="model")
    with pytest.raises(OptionError, match="keeps a context, which 'linear_transfer' does not"):
        cp.tl.embed(adata, model="linear_transfer", context="model")
    for value in ("pool", None, True, ["data"]):
        message = f"context must be one of 'data', 'model'; got {re.escape(repr(value))}"
        with pytest.raises(OptionError, match=message):
            cp.tl.embed(adata, model=mini, context=value)
    with pytest.raises(OptionError, match="context='model' is for models with a spectrum"):
        cp.tl.embed(adata, model=GOLDEN / "golden_vae.best.ckpt", context="model")
    assert not adata.obsm
    assert not adata.uns


def test_a_record_without_a_frame(reference, pbmc_counts, mini):
    """Versions before wrote none: there is no space to put the query into."""
    del reference.uns["cellplm"]["X_cellplm"]["frame"]
    with pytest.raises((SlotError, OptionError)):
        cp.tl.embed(pbmc_counts, reference=reference, model=mini)


def test_a_reference_of_another_model_that_was_never_stored(mini, pbmc_counts):
    reference, query = pbmc_counts[:50].copy(), pbmc_counts[:50].copy()
    cp.tl.embed(reference, model=dataclasses.replace(mini, sha256=""))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = cp.models.CellPLM(mini.config).eval()
    network.embedder.load_state_dict(mini.network.embedder.state_dict())
    with pytest.raises(OptionError):
        cp.tl.embed(query, reference=reference, model=cp.models.Model(network, "mine"))
