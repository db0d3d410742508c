"""From an AnnData of any form to cells: counts, genes, state, errors."""

from __future__ import annotations

import logging
import tracemalloc
import warnings

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from cellplm_tl._anndata import (
    Cells,
    CountBlock,
    find_columns,
    read_cells,
    read_gene_counts,
    read_gene_names,
)
from cellplm_tl._anndata import matrix as matrix_module
from cellplm_tl._anndata import read as read_module
from cellplm_tl._errors import (
    CountsError,
    CountsWarning,
    GenesError,
    InputError,
    OptionError,
    SlotError,
)


def dense(block: CountBlock, n_genes: int) -> np.ndarray:
    """Spread a block out, after a look at its form."""
    assert block.values.dtype == np.float32
    assert block.library_size.dtype == np.float64
    assert block.columns.dtype.kind == block.offsets.dtype.kind == "i"
    assert (block.values != 0).all()
    found = np.zeros((len(block.offsets) - 1, n_genes), np.float32)
    for row, (start, stop) in enumerate(zip(block.offsets, block.offsets[1:], strict=False)):
        columns = block.columns[start:stop]
        assert (np.diff(columns) > 0).all()
        found[row, columns] = block.values[start:stop]
    return found


def expected(counts: np.ndarray, names: list[str], genes: list[str]) -> np.ndarray:
    """Look up the counts of the genes of a list that are measured, one by one."""
    return np.column_stack([counts[:, names.index(gene)] for gene in genes if gene in names])


def lognorm(counts: np.ndarray) -> np.ndarray:
    totals = counts.sum(axis=1, keepdims=True, dtype=np.float64)
    return np.log1p(counts / np.maximum(totals, 1) * 1e4).astype(np.float32)


def all_rows(cells: Cells) -> np.ndarray:
    return dense(cells.counts(slice(None)), len(cells.genes))


# ------------------------------------------------------------------------------------------ forms


def test_every_form_gives_the_same_cells(form, counts, model_genes, unchanged):
    adata = form(counts)
    before = unchanged(adata)
    was_view = adata.is_view
    names = adata.var_names.tolist()
    cells = read_cells(adata, model_genes, batch_key="sample")
    assert cells.n_cells == len(counts)
    assert cells.genes.tolist() == [gene for gene in model_genes if gene in names]
    assert [model_genes[i] for i in cells.gene_index] == cells.genes.tolist()
    assert cells.context_names == ("a", "b", "c")
    assert [len(rows) for rows in cells.contexts] == [12, 13, 12]
    truth = expected(counts, names, model_genes)
    rng = np.random.default_rng(0)
    whole = slice(None)
    for rows in (
        whole,
        slice(3, 20),
        rng.permutation(len(counts)),
        *cells.contexts,
        np.arange(5),
        np.array([0, 2, 1, 3]),
    ):
        block = cells.counts(rows)
        assert np.array_equal(dense(block, len(cells.genes)), truth[rows])
        assert np.array_equal(block.library_size, counts[rows].sum(axis=1, dtype=np.float64))
    assert cells.counts(np.array([], dtype=np.int64)).offsets.tolist() == [0]
    assert cells.input_state == {
        "kind": "counts",
        "read_from": "X",
        "counts": "as stored",
        "n_cells_sampled": len(counts),
    }
    assert unchanged(adata) == before
    assert adata.is_view == was_view
    if adata.isbacked:
        adata.file.close()


def test_every_form_is_recovered_from_its_log(form, counts, model_genes, unchanged):
    adata = form(lognorm(counts))
    if np.dtype(adata.X.dtype).kind != "f" or adata.X.dtype == np.float16:
        pytest.skip("holds no logs in single precision")
    before = unchanged(adata)
    cells = read_cells(adata, model_genes)
    assert cells.input_state["counts"] == "recovered"
    truth = expected(counts, adata.var_names.tolist(), model_genes)
    assert np.array_equal(all_rows(cells), truth)
    assert np.array_equal(cells.counts(slice(None)).library_size, counts.sum(axis=1))
    assert cells.n_without_counts == 0
    assert unchanged(adata) == before
    if adata.isbacked:
        adata.file.close()


def test_every_form_tells_of_bad_values(form, counts, model_genes):
    counts[20, 30] = np.nan
    with np.errstate(invalid="ignore"):  # in the forms that cannot hold it
        adata = form(counts)
    if np.dtype(adata.X.dtype).kind != "f":
        pytest.skip("holds no NaN")
    with pytest.raises(CountsError, match=r"NaN or infinite values in 1 of 37 cells: 'cell20' \("):
        read_cells(adata, model_genes)
    if adata.isbacked:
        adata.file.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(data=st.data(), is_log=st.booleans(), name=st.sampled_from(["csr", "csc", "dense"]))
def test_blocks_never_change_a_result(data, is_log, name, counts, model_genes, make_anndata):
    make = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.array}[name]
    adata = make_anndata(make(lognorm(counts) if is_log else counts))
    cells = read_cells(adata, model_genes)
    order = np.array(data.draw(st.permutations(range(len(counts)))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(counts)), max_size=6)))
    blocks = [cells.counts(rows) for rows in np.split(order, cuts)]
    found = np.concatenate([dense(block, len(cells.genes)) for block in blocks])
    assert np.array_equal(found, all_rows(cells)[order])
    sizes = np.concatenate([block.library_size for block in blocks])
    assert np.array_equal(sizes, cells.counts(slice(None)).library_size[order])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(data=st.data())
def test_the_order_of_columns_never_changes_a_result(data, counts, model_genes, make_anndata):
    order = np.array(data.draw(st.permutations(range(counts.shape[1]))))
    if data.draw(st.booleans()):
        model_genes = make_anndata(counts).var_names.tolist()  # every column is used
    first = read_cells(make_anndata(counts), model_genes)
    second = read_cells(make_anndata(counts)[:, order], model_genes)
    assert np.array_equal(first.genes, second.genes)
    assert np.array_equal(all_rows(first), all_rows(second))
    assert first.gene_summary == second.gene_summary


def test_all_columns_in_order_cost_no_copy(counts, make_anndata):
    adata = make_anndata(sparse.csr_matrix(counts))
    block = read_cells(adata, adata.var_names.tolist()).counts(slice(5, 20))
    assert np.shares_memory(block.values, adata.X.data)
    assert np.shares_memory(block.columns, adata.X.indices)


def test_memory_is_a_block(make_anndata):
    rng = np.random.default_rng(0)
    matrix = sparse.random(4000, 2000, 0.1, "csr", np.float32, rng)
    matrix.data = np.ceil(matrix.data * 5)
    adata = make_anndata(matrix)
    cells = read_cells(adata, adata.var_names.tolist())
    n_bytes = matrix.data.nbytes + matrix.indices.nbytes
    tracemalloc.start()
    read_cells(adata, adata.var_names.tolist())
    for start in range(0, 4000, 100):
        cells.counts(slice(start, start + 100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.5 * n_bytes  # the sample of 512 cells is an eighth


def test_a_lazy_matrix_is_read_a_block_at_a_time(counts, model_genes, make_anndata):
    da = pytest.importorskip("dask.array")
    largest = 0

    def load(block):
        nonlocal largest
        largest = max(largest, len(block))
        return block

    lazy = da.from_array(np.tile(counts, (30, 1)), chunks=(30, -1)).map_blocks(load, meta=counts)
    adata = make_anndata(lazy)
    cells = read_cells(adata, model_genes)
    largest = 0
    cells.counts(slice(0, 60))
    assert largest == 30


# -------------------------------------------------------------------------------------- odd inputs


def test_no_cells(counts, model_genes, make_anndata):
    for matrix in (counts[:0], sparse.csr_matrix(counts[:0]), sparse.csc_matrix(counts[:0])):
        cells = read_cells(make_anndata(matrix), model_genes, batch_key="sample")
        assert (cells.n_cells, cells.contexts, cells.context_names) == (0, (), ())
        assert cells.input_state["kind"] == "counts"
        assert cells.gene_summary["coverage"] == 1.0
        block = cells.counts(slice(None))
        assert (len(block.values), len(block.columns), block.offsets.tolist()) == (0, 0, [0])
        assert block.library_size.shape == (0,)


def test_one_cell(counts, model_genes, make_anndata):
    for matrix in (counts[:1], lognorm(counts[:1])):
        cells = read_cells(make_anndata(sparse.csr_matrix(matrix)), model_genes)
        names = make_anndata(counts).var_names.tolist()
        assert np.array_equal(all_rows(cells), expected(counts[:1], names, model_genes))


def test_nothing_but_empty_cells(counts, model_genes, make_anndata):
    cells = read_cells(make_anndata(sparse.csr_matrix(counts * 0)), model_genes)
    assert not all_rows(cells).any()
    assert not cells.counts(slice(None)).library_size.any()


def test_repeated_names_of_cells(counts, model_genes, make_anndata):
    adata = make_anndata(counts)
    adata.obs_names = ["same"] * len(counts)
    cells = read_cells(adata, model_genes, batch_key="sample")
    assert np.array_equal(all_rows(cells), expected(counts, adata.var_names.tolist(), model_genes))


@pytest.mark.parametrize("make", [sparse.csr_matrix, sparse.csc_matrix, np.array])
def test_columns_of_one_gene_are_summed(make, counts, model_genes, make_anndata, caplog):
    """By the same id twice, with a version, and by a symbol; in the list by an id of old."""
    adata = make_anndata(make(counts))
    names = adata.var_names.tolist()
    names[20], names[30], names[40] = "ENSG00000105501", "ENSG00000105501.7", "SIGLEC5"
    adata.var_names = names
    genes = [gene for gene in model_genes if gene in names]
    genes.insert(7, "ENSG00000268500")  # what an older release called SIGLEC5
    genes.insert(3, "ENSG99999999999")  # nobody's
    with caplog.at_level(logging.INFO, "cellplm_tl"):
        cells = read_cells(adata, genes)
    assert "2 columns are of genes that have another column: summed." in caplog.messages
    assert cells.gene_summary["n_duplicated_columns"] == 2
    assert "ENSG00000268500" not in cells.genes
    at = cells.genes.tolist().index("ENSG00000105501")
    assert cells.gene_index[at] == genes.index("ENSG00000268500")
    assert 3 not in cells.gene_index
    found = all_rows(cells)
    assert np.array_equal(found[:, at], counts[:, [20, 30, 40]].sum(axis=1))
    rest = [gene for gene in cells.genes if gene != "ENSG00000105501"]
    assert np.array_equal(np.delete(found, at, axis=1), expected(counts, names, rest))


def test_names_that_are_repeated_are_summed_too(counts, model_genes, make_anndata):
    adata = make_anndata(counts)
    gene = adata.var_names[50]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's own, about the repetition
        adata.var_names = [*adata.var_names[:60], gene, *adata.var_names[61:]]
        cells = read_cells(adata, model_genes)
    at = cells.genes.tolist().index(gene)
    assert np.array_equal(all_rows(cells)[:, at], counts[:, 50] + counts[:, 60])


def test_columns_of_one_gene_side_by_side_are_not_summed_in_place(counts, make_anndata):
    counts = counts + 1
    adata = make_anndata(sparse.csr_matrix(counts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's own, about the repetition
        adata.var_names = adata.var_names[[0, 0, *range(2, 113)]]
        cells = read_cells(adata, adata.var_names.unique().tolist())
    assert cells.gene_summary["n_duplicated_columns"] == 1
    assert np.array_equal(all_rows(cells)[:, 0], counts[:, 0] + counts[:, 1])
    assert np.array_equal(adata.X.toarray(), counts)


def test_library_size_is_over_known_genes_whether_or_not_the_model_has_them(
    counts, model_genes, make_anndata
):
    adata = make_anndata(sparse.csr_matrix(counts))
    names = adata.var_names.tolist()
    names[70] = "NegControlProbe_00042"
    adata.var_names = names
    assert names[5] not in model_genes
    sizes = read_cells(adata, model_genes).counts(slice(None)).library_size
    assert np.array_equal(sizes, counts.sum(axis=1) - counts[:, 70])


def test_symbols_in_a_column(counts, model_genes, make_anndata):
    adata = make_anndata(counts)
    ids = adata.var_names.copy()
    adata.var_names = [f"feature{i}" for i in range(len(ids))]
    adata.var["chosen"] = ids
    cells = read_cells(adata, model_genes, gene_key="chosen")
    assert np.array_equal(all_rows(cells), expected(counts, ids.tolist(), model_genes))
    assert "var['chosen']" in cells.slots_read
    assert cells.gene_summary["read_from"] == "var['chosen']"
    with pytest.raises(GenesError):
        read_cells(adata, model_genes)


# ------------------------------------------------------------------------------------------- state


def test_a_layer_is_read_when_named(counts, model_genes, make_anndata):
    adata = make_anndata(counts * 3)
    adata.layers["mine"] = sparse.csr_matrix(counts)
    cells = read_cells(adata, model_genes, layer="mine")
    assert np.array_equal(all_rows(cells), expected(counts, adata.var_names.tolist(), model_genes))
    assert cells.slots_read == ("layers['mine']",)
    with pytest.raises(SlotError, match=r"layer='yours' is not in adata.layers; .* are 'mine'\."):
        read_cells(adata, model_genes, layer="yours")


@pytest.mark.parametrize("x", ["lognorm", "scaled", "none"])
def test_counts_beside_another_x_are_used_and_it_is_said(
    x, counts, model_genes, make_anndata, caplog
):
    adata = make_anndata(lognorm(counts))
    adata.layers["counts"] = sparse.csr_matrix(counts)
    if x == "scaled":
        adata.X -= 1
    elif x == "none":
        adata.X = None
    with caplog.at_level(logging.INFO, "cellplm_tl"):
        cells = read_cells(adata, model_genes)
    assert "Counts are read from adata.layers['counts']." in caplog.messages
    assert cells.input_state["read_from"] == "layers['counts']"
    assert cells.input_state["state_of_X"] == ("log-normalised" if x == "lognorm" else "no counts")
    assert np.array_equal(all_rows(cells), expected(counts, adata.var_names.tolist(), model_genes))


def test_x_is_used_where_the_layer_is_not_what_its_name_says(counts, model_genes, make_anndata):
    adata = make_anndata(lognorm(counts))
    for layer in (lognorm(counts), -counts):
        adata.layers["counts"] = layer
        cells = read_cells(adata, model_genes)
        assert cells.input_state["read_from"] == "X"
        assert "no raw counts" in cells.input_state["layers_counts"]
    adata.X = -counts
    with pytest.raises(CountsError, match=r"adata\.X has negative values"):
        read_cells(adata, model_genes)


def test_counts_in_x_are_used_whatever_the_layer(counts, model_genes, make_anndata):
    adata = make_anndata(counts)
    adata.layers["counts"] = counts + 1
    assert read_cells(adata, model_genes).input_state["read_from"] == "X"


def test_what_is_lost_is_warned_of(counts, model_genes, make_anndata):
    noise = np.random.default_rng(0).lognormal(0, 0.2, counts.shape)
    adata = make_anndata(np.log1p(counts * noise))
    with pytest.warns(CountsWarning, match=r"no raw counts \(log-normalised; inverted\): the libr"):
        cells = read_cells(adata, model_genes)
    assert cells.input_state["counts"] == "inverted"
    assert cells.input_state["scaled_to_total"] == 10_000
    totals = cells.counts(slice(None)).library_size
    assert np.median(totals[totals > 0]) == pytest.approx(10_000, rel=1e-6)
    assert totals / 10_000 == pytest.approx(
        (counts * noise).sum(axis=1) / np.median(np.delete((counts * noise).sum(axis=1), 4)),
        rel=1e-5,
    )


@pytest.mark.parametrize("is_log", [True, False])
def test_cells_unlike_those_looked_at_are_told_once(
    is_log, counts, model_genes, make_anndata, monkeypatch
):
    monkeypatch.setattr(read_module, "SAMPLE_CELLS", 16)  # one of two or three
    values = lognorm(counts) if is_log else counts.copy()
    odd = [1, 35]
    values[odd] *= np.random.default_rng(0).lognormal(0, 0.2, (2, counts.shape[1]))
    cells = read_cells(make_anndata(values), model_genes)
    with pytest.warns(CountsWarning, match=r"in 1 of 37 cells: 'cell1' \(row 1\) \(and maybe"):
        cells.counts(slice(0, 20))
    cells.counts(slice(20, 37))  # no second warning
    cells.counts(slice(20, 37))
    assert cells.n_without_counts == 2
    truth = counts if is_log else values
    found = all_rows(cells)
    good = np.delete(np.arange(37), odd)
    names = make_anndata(counts).var_names.tolist()
    assert np.array_equal(found[good], expected(truth, names, model_genes)[good])


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.nan, "NaN or infinite values"),
        (np.inf, "NaN or infinite values"),
        (-1, "negative values"),
    ],
)
def test_bad_values_name_the_rows_wherever_they_are(value, what, model_genes, make_anndata):
    counts = np.ones((3000, 113), np.float32)
    counts[[2990, 7, 7], [3, 4, 5]] = value
    first = r"2 of 3,000 cells: 'cell7' \(row 7\), 'cell2990' \(row 2990\)"
    for matrix in (counts, sparse.csr_matrix(counts), sparse.csc_matrix(counts)):
        with pytest.raises(CountsError, match=f"adata.X has {what}.* in {first}"):
            read_cells(make_anndata(matrix), model_genes)


def test_bad_values_on_disk_are_found_when_they_are_read(model_genes, make_anndata, tmp_path):
    counts = np.ones((3000, 113), np.float32)
    counts[1501, 7] = np.nan
    path = tmp_path / "cells.h5ad"
    make_anndata(sparse.csr_matrix(counts)).write_h5ad(path)
    adata = ad.read_h5ad(path, backed="r")
    cells = read_cells(adata, model_genes)
    cells.counts(slice(0, 1500))
    for rows in (slice(1500, 3000), np.array([2, 1501])):
        with pytest.raises(CountsError, match=r"1 of 3,000 cells: 'cell1501' \(row 1501\)"):
            cells.counts(rows)
    adata.file.close()


def test_scaled_data_are_refused_with_a_pointer(pbmc, model_genes, make_anndata):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = sc.datasets.pbmc68k_reduced()
    with pytest.raises(
        CountsError,
        match=r"negative values \(down to -2\.032\), as scaled data have, in 700 of 700 cells: "
        r".*adata\.raw has 765 genes: pass adata\.raw\.to_adata\(\)\.",
    ):
        read_cells(adata, read_gene_ids(adata))
    cells = read_cells(adata.raw.to_adata(), read_gene_ids(adata))
    assert cells.input_state["counts"] == "recovered"


def read_gene_ids(adata: ad.AnnData) -> list[str]:
    from cellplm_tl._genes import resolve

    return [gene for gene in resolve(adata.raw.var_names).gene_ids if gene]


def test_advice_where_there_is_no_raw(counts, model_genes, make_anndata):
    adata = make_anndata(-counts)
    with pytest.raises(CountsError, match=r"with layer='…' or as X\.$"):
        read_cells(adata, model_genes)
    adata.layers["lognorm"] = lognorm(counts)
    with pytest.raises(CountsError, match=r"the layers are 'lognorm': name one with layer='…'\.$"):
        read_cells(adata, model_genes)


def test_no_matrix_at_all(counts, model_genes, make_anndata):
    adata = make_anndata(counts)
    adata.X = None
    with pytest.raises(CountsError, match=r"adata\.X is None.* The layers are none"):
        read_cells(adata, model_genes)


def test_no_numbers(counts, model_genes, make_anndata):
    adata = make_anndata(counts)
    adata.layers["text"] = counts.astype(str)
    with pytest.raises(
        CountsError, match=r"adata\.layers\['text'\] must hold numbers; its type is <U"
    ):
        read_cells(adata, model_genes, layer="text")


def test_no_anndata(model_genes, counts):
    with pytest.raises(InputError, match="adata must be an AnnData object; got ndarray"):
        read_cells(counts, model_genes)


# ------------------------------------------------------------------------------------------- genes


def test_gene_summary(counts, model_genes, make_anndata):
    adata = make_anndata(counts)
    names = adata.var_names.tolist()
    names[100:] = [f"LOC99999{i}" for i in range(13)]
    adata.var_names = names
    cells = read_cells(adata, model_genes)
    assert cells.gene_summary == {
        "read_from": "var_names",
        "n_vars": 113,
        "n_used": 90,
        "n_unmatched": 23,
        "n_duplicated_columns": 0,
        "statuses": {"ensembl": 100, "unknown": 13},
        "coverage": pytest.approx(counts[:, 10:100].sum() / counts.sum(), rel=1e-6),
    }


def test_too_few_genes(counts, model_genes, make_anndata):
    few = make_anndata(counts)[:, :59]  # ten of which the model has not
    with pytest.raises(GenesError, match="49 of 59 var_names are genes of the model; at least 50"):
        read_cells(few, model_genes)
    assert len(read_cells(make_anndata(counts)[:, :60], model_genes).genes) == 50


def test_too_few_counts(counts, model_genes, make_anndata):
    counts[:, :10] = 0
    counts[:, 0] = 20 * counts.sum(axis=1)
    with pytest.raises(GenesError, match=r"they hold 4\.8% of the counts, and at least 10%"):
        read_cells(make_anndata(counts), model_genes)
    counts[:, 0] /= 10
    with pytest.warns(cp_warning(), match=r"they hold 33\.3% of the counts"):
        cells = read_cells(make_anndata(counts), model_genes)
    assert cells.gene_summary["coverage"] == pytest.approx(1 / 3)


def cp_warning() -> type[Warning]:
    from cellplm_tl._errors import GenesWarning

    return GenesWarning


def test_mouse_genes(counts, model_genes, make_anndata):
    adata = make_anndata(counts)
    adata.var_names = [f"Cd{i}a" for i in range(113)]
    with pytest.raises(GenesError, match="113 of 113 var_names are spelled like mouse genes"):
        read_cells(adata, [*model_genes, "ENSG00000153563"])  # CD8A, which Cd8a is taken for
    adata.var_names = [f"ENSMUSG{i:011}" for i in range(113)]
    with pytest.raises(GenesError, match="113 of 113 var_names are spelled like mouse genes"):
        read_cells(adata, model_genes)


def test_names_and_counts_of_all_genes(counts, make_anndata):
    adata = make_anndata(sparse.csr_matrix(lognorm(counts)))
    names, where = read_gene_names(adata, None)
    assert (names.tolist(), where) == (adata.var_names.tolist(), "var_names")
    assert np.array_equal(read_gene_counts(adata), counts.sum(axis=0))
    adata.X = adata.X * -1
    assert read_gene_counts(adata) is None
    with pytest.raises(InputError, match="must be an AnnData"):
        read_gene_names(counts, None)


# ------------------------------------------------------------------------------------- all columns


def test_columns_of_names(pbmc):
    names = pbmc.var_names
    assert find_columns(pbmc, None).tolist() == list(range(765))
    asked = [names[40], names[3], names[764]]
    for form in (asked, tuple(asked), np.array(asked, object), names[[40, 3, 764]]):
        assert find_columns(pbmc, form).tolist() == [40, 3, 764]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("CD3E", OptionError, r"must be a list of names; got the text 'CD3E': pass \['CD3E'\]"),
        (5, OptionError, "must be a list of names; got int"),
        ({"CD3E"}, OptionError, "must be a list of names; got set"),
        ([], OptionError, "must name one gene or more, each once"),
        (["CD3E", "CD3E"], OptionError, "must name one gene or more, each once"),
        (
            ["CD3E", "NO1", "NO2"],
            SlotError,
            "2 of 3 genes are not in adata.var_names: 'NO1', 'NO2'",
        ),
        ([5], SlotError, "1 of 1 genes are not in adata.var_names"),
    ],
)
def test_names_that_are_no_columns(pbmc, names, error, message):
    with pytest.raises(error, match=message):
        find_columns(pbmc, names)


def test_a_name_of_several_columns(pbmc):
    names = pbmc.var_names.to_list()
    names[7] = names[8]
    pbmc.var_names = names
    with pytest.raises(SlotError, match="more than once: adata.var_names_make_unique"):
        find_columns(pbmc, [names[8]])
    assert find_columns(pbmc, [names[3]]).tolist() == [3]


def test_all_counts_are_those_of_every_column(counts, model_genes, make_anndata):
    rows = np.array([5, 0, 9])
    for stored in (counts.astype(np.float32), lognorm(counts)):
        cells = read_cells(make_anndata(sparse.csr_matrix(stored)), model_genes)
        found = cells.all_counts(rows)
        assert found.shape == (3, counts.shape[1])
        np.testing.assert_allclose(found.toarray(), counts[rows])


def test_columns_lead_from_all_counts_to_those_of_genes(counts, model_genes, make_anndata):
    cells = read_cells(make_anndata(sparse.csr_matrix(counts.astype(np.float32))), model_genes)
    whole = cells.all_counts(slice(None)).toarray()
    of_genes = np.zeros((len(counts), len(cells.genes)))
    for column, gene in zip(cells.columns, cells.gene_of_column, strict=True):
        of_genes[:, gene] += whole[:, column]
    np.testing.assert_array_equal(of_genes, all_rows(cells))


# -------------------------------------------------------------------------------------- the sample


def test_the_sample_is_bounded_and_spread(counts, make_anndata):
    adata = make_anndata(sparse.csr_matrix(np.tile(counts, (100, 1))))
    rows = matrix_module.open_matrix(adata, None).sample(512)
    assert len(np.unique(rows)) == len(rows) == 512
    assert (rows[0], rows[-1]) == (0, 3699)
    assert np.diff(rows).max() < 3700 / 14
