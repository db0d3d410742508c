"""`cp.pp.match_genes`: what it writes, says, warns of and refuses."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

import cellplm_tl as cp
from cellplm_tl._errors import GenesError, GenesWarning, InputError, SlotError

GENES = ["CD3E", "IL8", "HLA.A", "COX1", "MUC3B", "NegPrb3", "LOC12345"]
IDS = ["ENSG00000198851", "ENSG00000169429", "ENSG00000206503", "", "", "", ""]
STATUSES = ["symbol", "previous", "repaired", "ambiguous", "no_id", "unknown", "unknown"]


@pytest.fixture
def cells(pbmc_counts):
    """20 cells × 67 genes: 60 of the PBMCs', and one of each kind."""
    rng = np.random.default_rng(0)
    others = sparse.csr_matrix(rng.poisson(0.5, (20, len(GENES))).astype(np.float32))
    counts = sparse.hstack([others, pbmc_counts.X[:20, :60]], format="csr")
    names = [*GENES, *pbmc_counts.var_names[:60]]
    return ad.AnnData(counts, var=pd.DataFrame(index=names))


def test_slots(cells):
    assert cp.pp.match_genes(cells) is None
    ids, statuses = cells.var["cellplm_gene_id"], cells.var["cellplm_gene_status"]
    assert ids.tolist()[:7] == IDS
    assert statuses.tolist()[:7] == STATUSES
    assert all(isinstance(value, str) for value in [*ids, *statuses])
    assert list(cells.var.columns) == ["cellplm_gene_id", "cellplm_gene_status"]


def test_record(cells):
    cells.X = cells.X.toarray()
    cells.X[:, 6] = 5.0  # of the unmatched genes the one with most counts is named first
    cp.pp.match_genes(cells)
    record = cells.uns["cellplm"]["match_genes"]
    assert record["tool"] == "match_genes"
    assert record["package_version"] == cp.__version__
    genes = record["genes"]
    assert (genes["read_from"], genes["n_vars"], genes["n_matched"]) == ("var_names", 67, 63)
    assert genes["n_unmatched"] == 4
    assert sum(genes["statuses"].values()) == 67
    assert {key: genes["statuses"][key] for key in ("ambiguous", "no_id", "unknown")} == {
        "ambiguous": 1,
        "no_id": 1,
        "unknown": 2,
    }
    assert genes["unmatched"][0] == "LOC12345"
    assert set(genes["unmatched"]) == {"LOC12345", "COX1", "MUC3B"}  # no control probes
    is_matched = (cells.var["cellplm_gene_id"] != "").to_numpy()
    expected = cells.X[:, is_matched].sum() / cells.X.sum()
    assert genes["coverage"] == pytest.approx(expected, rel=1e-6)
    assert genes["coverage_of"] == "counts"


def test_record_and_slots_survive_a_file(cells, tmp_path):
    cp.pp.match_genes(cells)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    read = ad.read_h5ad(tmp_path / "cells.h5ad")
    for key in ("cellplm_gene_id", "cellplm_gene_status"):
        assert read.var[key].astype(str).tolist() == cells.var[key].astype(str).tolist()
    genes = read.uns["cellplm"]["match_genes"]["genes"]
    assert genes["statuses"] == cells.uns["cellplm"]["match_genes"]["genes"]["statuses"]


def test_copy(cells):
    result = cp.pp.match_genes(cells, copy=True)
    assert "cellplm_gene_id" in result.var
    assert cells.var.empty
    assert "cellplm" not in cells.uns


def test_the_log_says_what_was_found(cells, caplog):
    names = [*cells.var_names]
    names[8] = names[7] + "-1"
    cells.var_names = names
    with caplog.at_level(logging.INFO, "cellplm_tl"):
        cp.pp.match_genes(cells)
    text = caplog.text
    assert "63 of 67 var_names are known human genes:" in text
    assert "Without a gene: 1 no_id, 1 ambiguous, 2 unknown, first " in text
    assert "Columns of a gene that has another column: 1; tools sum them." in text
    assert "adata.var['cellplm_gene_id'] is written." in text
    assert cells.uns["cellplm"]["match_genes"]["genes"]["n_duplicated_columns"] == 1


def test_real_cells_as_scanpy_ships_them():
    adata = sc.datasets.pbmc68k_reduced()
    cp.pp.match_genes(adata)
    genes = adata.uns["cellplm"]["match_genes"]["genes"]
    assert (genes["n_matched"], genes["n_vars"]) == (764, 765)
    assert genes["unmatched"].tolist() == ["AC084018.1"]
    assert genes["coverage_of"] == "names"  # X is scaled: there are no counts
    raw = adata.raw.to_adata()
    cp.pp.match_genes(raw)
    assert raw.uns["cellplm"]["match_genes"]["genes"]["coverage"] > 0.999
    assert np.array_equal(raw.var["cellplm_gene_id"], adata.var["cellplm_gene_id"])


def test_which_column_is_read(cells):
    cells.var["gene_ids"] = ["ENSG00000010610.4", *[None] * 66]
    cp.pp.match_genes(cells)
    assert cells.var["cellplm_gene_id"].tolist()[:2] == ["ENSG00000010610", "ENSG00000169429"]
    assert cells.var["cellplm_gene_status"].iloc[0] == "ensembl"
    record = cells.uns["cellplm"]["match_genes"]
    assert record["genes"]["read_from"] == "var['gene_ids']"
    assert record["parameters"] == {}
    assert record["slots_read"].tolist() == ["var['gene_ids']"]
    cp.pp.match_genes(cells, gene_key="var_names")
    record = cells.uns["cellplm"]["match_genes"]
    assert cells.var["cellplm_gene_id"].iloc[0] == "ENSG00000198851"
    assert record["parameters"] == {"gene_key": "var_names"}
    assert record["slots_read"].tolist() == []


def test_a_second_call_gives_the_same(cells):
    cp.pp.match_genes(cells)
    first = cells.var.copy()
    cp.pp.match_genes(cells)
    pd.testing.assert_frame_equal(cells.var, first)


def test_coverage_is_that_of_the_counts_behind_a_log(cells):
    cp.pp.match_genes(cells)
    raw = cells.uns["cellplm"]["match_genes"]["genes"]["coverage"]
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    cp.pp.match_genes(cells)
    assert cells.uns["cellplm"]["match_genes"]["genes"]["coverage"] == pytest.approx(raw, rel=1e-3)


@pytest.mark.parametrize("spoil", [-1.0, np.nan, np.inf])
def test_names_count_where_there_are_no_counts(cells, spoil):
    cells.X[0, 0] = spoil
    cp.pp.match_genes(cells)
    genes = cells.uns["cellplm"]["match_genes"]["genes"]
    assert genes["coverage_of"] == "names"
    assert genes["coverage"] == 63 / 67


def test_without_a_matrix(cells):
    adata = ad.AnnData(obs=cells.obs, var=cells.var)
    cp.pp.match_genes(adata)
    assert adata.uns["cellplm"]["match_genes"]["genes"]["coverage_of"] == "names"


def test_few_counts_in_known_genes_are_warned_of(cells):
    cells.X = cells.X.toarray()
    cells.X[:, 6] = 1e4
    with pytest.raises(GenesError, match=r"hold \d\.\d% of the counts.*'LOC12345', "):
        cp.pp.match_genes(cells)
    assert cells.var.empty
    cells.X[:, 6] = 2 * cells.X[:, [0, 1, 2, *range(7, 67)]].sum(axis=1)
    with pytest.warns(
        GenesWarning, match=r"63 of 67 var_names .* they hold 3\d\.\d% of the counts"
    ):
        cp.pp.match_genes(cells)
    assert "cellplm_gene_id" in cells.var


def refuse(error, adata, match, **options):
    before = adata.copy()
    with pytest.raises(error, match=match):
        cp.pp.match_genes(adata, **options)
    pd.testing.assert_frame_equal(adata.var, before.var)
    assert "cellplm" not in adata.uns


def test_mouse_genes_are_refused(pbmc_counts):
    pbmc_counts.var_names = pbmc_counts.var_names.str.capitalize()
    refuse(GenesError, pbmc_counts, "of 765 var_names are spelled like mouse genes.*orthologs")


def test_too_few_genes_are_refused(pbmc_counts):
    refuse(GenesError, pbmc_counts[:, :49].copy(), "49 of 49 var_names.*at least 50 are needed")
    refuse(GenesError, pbmc_counts[:, :0].copy(), "0 of 0 var_names")
    pbmc_counts.var_names = [f"feature_{i}" for i in range(765)]
    refuse(GenesError, pbmc_counts, "0 of 765 var_names are known human genes.*'feature_0'")


def test_slots_that_cannot_be_are_refused(pbmc_counts):
    refuse(SlotError, pbmc_counts, "gene_key='ensembl' is no column", gene_key="ensembl")
    pbmc_counts.var["cellplm_gene_id"] = "ENSG00000198851"
    refuse(SlotError, pbmc_counts, "is an input of this call", gene_key="cellplm_gene_id")


def test_what_is_no_anndata_is_refused(pbmc_counts):
    with pytest.raises(InputError, match="must be an AnnData object; got DataFrame"):
        cp.pp.match_genes(pbmc_counts.to_df())
