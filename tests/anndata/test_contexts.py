"""Contexts from a column of `obs`, coordinates from `obsm`."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellplm_tl._anndata import read_cells
from cellplm_tl._errors import ContextError, SlotError


@pytest.fixture
def adata(counts, make_anndata) -> ad.AnnData:
    return make_anndata(counts)


@pytest.fixture
def genes(adata) -> list[str]:
    return adata.var_names.tolist()


def test_one_context_by_default(adata, genes):
    cells = read_cells(adata, genes)
    assert cells.context_names == ("all cells",)
    assert np.array_equal(cells.contexts[0], np.arange(37))
    assert cells.contexts[0].dtype == np.int64
    assert cells.slots_read == ("X",)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b", "c"], ("a", "b", "c")),
        (pd.Categorical(["b", "a", "b", "c"], ["unused", "c", "b", "a"]), ("a", "b", "c")),
        ([10, 9, 10, 11], ("9", "10", "11")),
        (pd.array([10, 9, 10, 11], dtype="Int64"), ("9", "10", "11")),
        (pd.Categorical([10, 9, 10, 11]), ("9", "10", "11")),
        ([0.5, 0.0, 0.5, 1.5], ("0.0", "0.5", "1.5")),
        (pd.array(["b", "a", "b", "c"], dtype="string"), ("a", "b", "c")),
        (["1", 0, 1, "x"], ("0", "1", "x")),  # as text, 1 and "1" are one
    ],
)
def test_columns_of_any_type(values, names, adata, genes):
    part = adata[:4].copy()
    part.obs["fov"] = values
    cells = read_cells(part, genes, batch_key="fov")
    assert cells.context_names == names
    assert [rows.tolist() for rows in cells.contexts] == [[1], [0, 2], [3]]
    assert "obs['fov']" in cells.slots_read


def test_booleans(adata, genes):
    adata.obs["treated"] = np.arange(37) % 2 == 0
    assert read_cells(adata, genes, batch_key="treated").context_names == ("False", "True")


def test_contexts_hold_every_row_once(adata, genes):
    cells = read_cells(adata, genes, batch_key="sample")
    assert sorted(np.concatenate(cells.contexts)) == list(range(37))
    for name, rows in zip(cells.context_names, cells.contexts, strict=True):
        assert (adata.obs["sample"].iloc[rows] == name).all()
        assert (np.diff(rows) > 0).all()


def test_a_column_that_is_not_there(adata, genes):
    with pytest.raises(
        SlotError, match=r"batch_key='donor' is no column .* columns are 'sample'\."
    ):
        read_cells(adata, genes, batch_key="donor")
    del adata.obs["sample"]
    with pytest.raises(SlotError, match="the columns are none"):
        read_cells(adata, genes, batch_key="donor")


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
def test_cells_without_a_context(missing, adata, genes):
    column = adata.obs["sample"].astype(object)
    column.iloc[[2, 5, 6, 7, 8, 9]] = missing
    adata.obs["sample"] = column
    with pytest.raises(
        ContextError,
        match=r"adata\.obs\['sample'\] is missing for 6 of 37 cells: 'cell2' \(row 2\), .*"
        r"'cell8' \(row 8\), …\. Every cell needs a context",
    ):
        read_cells(adata, genes, batch_key="sample")


@pytest.mark.parametrize("form", ["array", "frame", "integers"])
def test_coordinates(form, adata, genes):
    xy = np.random.default_rng(0).integers(0, 1000, (37, 2))
    adata.obsm["spatial"] = {
        "array": xy.astype(np.float32),
        "frame": pd.DataFrame(xy, index=adata.obs_names, columns=["x", "y"]),
        "integers": xy,
    }[form]
    cells = read_cells(adata, genes)
    assert np.array_equal(cells.coordinates, xy)
    assert cells.coordinates.dtype == np.float64
    assert cells.slots_read == ("X", "obsm['spatial']")
    assert read_cells(adata, genes, spatial_key=None).coordinates is None


def test_no_coordinates_are_no_error_unless_named(adata, genes):
    assert read_cells(adata, genes, need_coordinates=True).coordinates is None
    adata.obsm["xy"] = np.zeros((37, 2))
    assert read_cells(adata, genes, spatial_key="xy").coordinates.shape == (37, 2)
    with pytest.raises(
        SlotError, match=r"spatial_key='yx' is not in adata.obsm; the keys are 'xy'"
    ):
        read_cells(adata, genes, spatial_key="yx")


def bad(row: int, value: float) -> np.ndarray:
    xy = np.ones((37, 2))
    xy[row, 1] = value
    return xy


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        (np.ones((37, 3)), r"must have the shape \(cells, 2\), x and y; it is \(37, 3\)\."),
        (np.ones((37, 1)), r"must have .* it is \(37, 1\)"),
        (bad(5, np.inf), r"is infinite for 1 of 37 cells: 'cell5' \(row 5\)\."),
        (np.full((37, 2), "1"), "must hold numbers; its type is <U1"),
    ],
)
def test_unusable_coordinates_are_an_error_where_they_are_needed(stored, problem, adata, genes):
    adata.obsm["spatial"] = stored
    with pytest.raises(ContextError, match=r"adata\.obsm\['spatial'\] " + problem):
        read_cells(adata, genes, need_coordinates=True)
    cells = read_cells(adata, genes)
    assert cells.coordinates is None
    assert cells.slots_read == ("X",)
