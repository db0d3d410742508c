"""`cp.tl.gene_embeddings` beyond the contract that all tools keep (tests/test_contract*.py)."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import cellplm_tl as cp
from cellplm_tl._errors import GenesError, InputError, ModelNotFoundError, SlotError
from cellplm_tl._genes import symbols

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
KEY = "cellplm_gene"
# Ids of CD3D, CD3E, CD4, CD8A, CD19, not in any order.
IDS = ["ENSG00000198851", "ENSG00000010610", "ENSG00000177455", "ENSG00000153563"]
IDS += ["ENSG00000167286"]


def named(*names: str) -> ad.AnnData:
    """Give an AnnData of these genes, with neither cells nor values."""
    return ad.AnnData(var=pd.DataFrame(index=list(names)))


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.fixture
def table_model() -> cp.models.Model:
    """Build a model of the released layout for five genes, small and not stored anywhere."""
    config = cp.models.CellPLMConfig(
        genes=tuple(IDS), hidden=8, heads=2, encoder_layers=1, latent_size=4, decoder_hidden=8
    )
    return cp.models.Model(cp.models.CellPLM(config), "small")


@pytest.mark.parametrize("model", ["mini", "linear_transfer"])
def test_the_formula_written_out(model):
    """A model with a spectrum: V_g times the root of the eigenvalues, in double precision."""
    loaded = cp.models.load(model)
    spectrum = {
        name: t.double().numpy() for name, t in loaded.network.embedder.state_dict().items()
    }
    rows = [20_000, 3, 11_111, 26_000, 4]
    adata = named(*(loaded.genes[row] for row in rows))
    cp.tl.gene_embeddings(adata, model=model)
    vectors = adata.varm[KEY]
    assert isinstance(vectors, np.ndarray)
    assert vectors.dtype == np.float32
    expected = spectrum["loadings"][rows] * np.sqrt(spectrum["eigenvalues"])
    assert vectors.shape == expected.shape == (5, loaded.config.factors)
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)


def test_inner_products_are_the_covariances_of_the_factor_model():
    """Draws of the factors, read through the loadings, covary as the vectors say."""
    adata = named("HLA-A", "HLA-B", "HLA-DRA", "CD3E", "MS4A1")
    cp.tl.gene_embeddings(adata, model="linear_transfer")
    loaded = cp.models.load("linear_transfer")
    embedder = loaded.network.embedder
    known = list(symbols(loaded.genes))
    loadings = embedder.loadings[[known.index(name) for name in adata.var_names]].double().numpy()
    rng = np.random.default_rng(0)
    deviations = embedder.eigenvalues.double().sqrt().numpy()
    factors = rng.standard_normal((100_000, len(deviations))) * deviations
    vectors = adata.varm[KEY].astype(float)
    np.testing.assert_allclose(np.cov(loadings @ factors.T), vectors @ vectors.T, atol=0.01)


def test_genes_of_one_kind_lie_together():
    """HLA genes of class I and of class II (appendix H.2), T cells and B cells."""
    kinds = {
        "class I": ["HLA-A", "HLA-B", "HLA-C", "HLA-E", "HLA-F"],
        "class II": ["HLA-DRA", "HLA-DRB1", "HLA-DPA1", "HLA-DPB1", "HLA-DQA1", "HLA-DMA"],
        "T cell": ["CD3D", "CD3E", "CD3G", "TRAC"],
        "B cell": ["CD79A", "CD79B", "MS4A1"],
    }
    adata = named(*(name for names in kinds.values() for name in names))
    cp.tl.gene_embeddings(adata)
    of = dict(zip(adata.var_names, adata.varm[KEY], strict=True))
    for kind, names in kinds.items():
        others = [name for name in of if name not in names]
        for name in names:
            own = min(cosine(of[name], of[other]) for other in names)
            foreign = max(cosine(of[name], of[other]) for other in others)
            assert own > foreign, (kind, name)


def test_a_table_of_genes(table_model):
    adata = named("CD8A", "CD3E", "CD19")
    cp.tl.gene_embeddings(adata, model=table_model)
    table = table_model.network.embedder.table.detach().numpy()
    expected = [table[IDS.index(i)] for i in (IDS[3], IDS[0], IDS[2])]
    np.testing.assert_array_equal(adata.varm[KEY], expected)
    assert adata.varm[KEY].dtype == np.float32
    assert adata.uns["cellplm"][KEY]["model"] == {"name": "small", "sha256": ""}
    adata.varm[KEY][:] = 0  # what a user does to the result is nothing to the model
    assert table_model.network.embedder.table.detach().abs().min() > 0


@pytest.mark.parametrize("layout", ["gmvae", "vae"])
def test_released_checkpoints(layout):
    path = GOLDEN / f"golden_{layout}.best.ckpt"
    stored = torch.load(path, weights_only=True)["model_state_dict"]["embedder.feat_enc.emb"]
    genes = cp.models.load(path).genes
    adata = named(*genes[5:9], "no such gene")
    cp.tl.gene_embeddings(adata, model=path)
    np.testing.assert_array_equal(adata.varm[KEY][:4], stored[5:9].numpy())
    assert np.isnan(adata.varm[KEY][4]).all()


def test_genes_that_the_model_lacks_and_columns_of_one_gene(table_model):
    adata = named("no such gene", "CD3D", "HBB", "ENSG00000198851.15", "CD3E", "CD8A")
    cp.tl.gene_embeddings(adata, model=table_model)
    vectors = adata.varm[KEY]
    table = table_model.network.embedder.table.detach().numpy()
    assert np.isnan(vectors[[0, 2]]).all()
    np.testing.assert_array_equal(vectors[[1, 3, 4, 5]], table[[4, 0, 0, 3]])
    genes = adata.uns["cellplm"][KEY]["genes"]
    assert (genes["n_vars"], genes["n_used"], genes["n_unmatched"]) == (6, 3, 2)
    assert genes["n_duplicated_columns"] == 1


def test_neither_counts_nor_cells_matter(pbmc_counts):
    """Scaled values, NaN, no values, no cells: the names alone are read."""
    cp.tl.gene_embeddings(pbmc_counts)
    expected = pbmc_counts.varm[KEY]
    assert np.isfinite(expected).all(axis=1).sum() == 760
    var = pbmc_counts.var[[]]
    scaled = np.random.default_rng(0).normal(size=(3, len(var)))
    for x in (scaled, np.full((3, len(var)), np.nan), np.zeros((0, len(var))), None):
        adata = ad.AnnData(x, var=var)
        cp.tl.gene_embeddings(adata)
        np.testing.assert_array_equal(adata.varm[KEY], expected)


def test_gene_key_and_record(table_model):
    adata = named("a", "b", "c")
    adata.var["symbol"] = ["CD19", "CD4", "none"]
    cp.tl.gene_embeddings(adata, model=table_model, gene_key="symbol", key_added="mine")
    table = table_model.network.embedder.table.detach().numpy()
    np.testing.assert_array_equal(adata.varm["mine"][:2], table[[2, 1]])
    record = adata.uns["cellplm"]["mine"]
    assert record["tool"] == "gene_embeddings"
    assert record["parameters"] == {
        "model": "small",
        "gene_key": "symbol",
        "key_added": "mine",
        "copy": False,
    }
    assert list(record["slots_read"]) == ["var['symbol']"]
    assert record["genes"]["read_from"] == "var['symbol']"
    assert record["seconds"] > 0
    assert not {"device", "precision", "input", "contexts", "random_state"} & set(record)


def test_copy(table_model, tmp_path):
    adata = named("CD4", "CD19")
    new = cp.tl.gene_embeddings(adata, model=table_model, copy=True)
    assert KEY in new.varm
    assert not adata.varm
    assert "cellplm" not in adata.uns
    ad.AnnData(np.ones((2, 2)), var=adata.var).write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    copy = cp.tl.gene_embeddings(backed, model=table_model, copy=True)
    assert not copy.isbacked
    assert KEY not in backed.varm
    np.testing.assert_array_equal(copy.varm[KEY], new.varm[KEY])
    backed.file.close()


def test_errors_say_what_to_do_and_change_nothing(table_model):
    adata = named("CD4", "CD19")
    cases = [
        (lambda: cp.tl.gene_embeddings(adata.var), InputError, "must be an AnnData"),
        (
            lambda: cp.tl.gene_embeddings(named("gene 1", "gene 2")),
            GenesError,
            "0 of 2 .* 1 is needed",
        ),
        (lambda: cp.tl.gene_embeddings(named()), GenesError, "0 of 0 var_names"),
        (lambda: cp.tl.gene_embeddings(named("HBB"), model=table_model), GenesError, "'HBB'"),
        (lambda: cp.tl.gene_embeddings(named("Cd4", "Cd19", "Xkr4")), GenesError, "mouse"),
        (lambda: cp.tl.gene_embeddings(adata, gene_key="symbol"), SlotError, "gene_key='symbol'"),
        (lambda: cp.tl.gene_embeddings(adata, key_added="a/b"), SlotError, "without a slash"),
        (lambda: cp.tl.gene_embeddings(adata, model="maxi"), ModelNotFoundError, "'mini'"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    assert not adata.varm
    assert "cellplm" not in adata.uns
