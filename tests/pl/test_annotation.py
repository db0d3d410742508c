"""The picture of an annotation: what is drawn is read back from the axes."""

from __future__ import annotations

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

import cellplm_tl as cp
from cellplm_tl._errors import InputError, SlotError

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _closed():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


@pytest.fixture
def annotated():
    """Give 6 cells with labels, one of a type that the tool does not know, one without any."""
    obs = pd.DataFrame(index=list("abcdef"))
    obs["type"] = ["T", "T", "B", "B", "mast", None]
    obs["found"] = pd.Categorical(["T", "B", "B", "Unknown", "Unknown", "T"])
    adata = ad.AnnData(np.ones((6, 2), np.float32), obs=obs)
    proba = {"B": [0.2, 0.6, 0.9, 0.5, 0.5, 0.3], "T": [0.8, 0.4, 0.1, 0.5, 0.5, 0.7]}
    adata.obsm["found_proba"] = pd.DataFrame(proba | {"NK": 0.0}, index=obs.index)
    return adata


def labels_of(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def numbers(axes):
    """Give what stands in the cells of the matrix, by (true, predicted)."""
    columns, rows = labels_of(axes.xaxis), labels_of(axes.yaxis)
    places = {text.get_position(): text.get_text() for text in axes.texts}
    return {(rows[int(y)], columns[int(x)]): int(text) for (x, y), text in places.items()}


def test_confusion_with_labels_of_the_query(annotated):
    confusion, _ = cp.pl.annotation(annotated, key="found", labels_key="type")
    assert labels_of(confusion.yaxis) == ["B", "T", "mast"]  # known ones first, on the diagonal
    assert labels_of(confusion.xaxis) == ["B", "T", "Unknown"]
    assert numbers(confusion) == {
        ("B", "B"): 1,
        ("B", "Unknown"): 1,
        ("T", "B"): 1,
        ("T", "T"): 1,
        ("mast", "Unknown"): 1,
    }
    (image,) = confusion.images
    assert image.get_array().tolist() == [[0.5, 0, 0.5], [0.5, 0.5, 0], [0, 0, 1]]
    assert confusion.get_title() == "type: 5 cells"


def test_a_label_that_nobody_is_taken_for_keeps_its_place(annotated):
    annotated.obs["found"] = pd.Categorical(["T", "T", "T", "T", "T", "T"])
    confusion, _ = cp.pl.annotation(annotated, key="found", labels_key="type")
    assert labels_of(confusion.xaxis) == ["B", "T"]
    assert numbers(confusion) == {("B", "T"): 2, ("T", "T"): 2, ("mast", "T"): 1}


def test_reliability_of_the_cells_whose_label_the_tool_knows(annotated):
    _, diagram = cp.pl.annotation(annotated, key="found", labels_key="type")
    (dots,) = diagram.collections
    # largest probabilities .5 (B, a draw: the first; right), .6 (wrong), .8 and .9 (right)
    assert dots.get_offsets().tolist() == [[0.5, 1], [0.6, 0], [0.8, 1], [0.9, 1]]
    assert diagram.get_title() == f"ECE {(0.5 + 0.6 + 0.2 + 0.1) / 4:.3f}, 4 cells"
    assert len(set(dots.get_sizes())) == 1


def recorded(**validation):
    adata = ad.AnnData(np.ones((1, 1), np.float32))
    record = {"tool": "annotate", "validation": validation}
    adata.uns["cellplm"] = {"cellplm_annotation": record}
    return adata


def test_validation_cells_of_the_record_survive_a_file(tmp_path):
    table = pd.DataFrame({"Unknown": [1, 0], "T": [1, 8], "B": [6, 0]}, index=["B", "T"])
    bins = pd.DataFrame({"confidence": [0.5, 0.9], "accuracy": [0.5, 1.0], "n_cells": [4, 12]})
    recorded(confusion=table, reliability=bins).write_h5ad(tmp_path / "written.h5ad")
    confusion, diagram = cp.pl.annotation(ad.read_h5ad(tmp_path / "written.h5ad"))
    assert labels_of(confusion.xaxis) == ["B", "T", "Unknown"]
    assert numbers(confusion)["B", "Unknown"] == 1
    assert numbers(confusion)["T", "T"] == 8
    assert confusion.get_title() == "validation cells: 16 cells"
    assert diagram.get_title() == "ECE 0.075, 16 cells"
    sizes = diagram.collections[0].get_sizes()
    assert (sizes[1] - 10) / (sizes[0] - 10) == pytest.approx(3)


def test_many_labels_have_colours_alone():
    names = [f"type {i}" for i in range(20)]
    table = pd.DataFrame(np.eye(20, dtype=int) * 5, names, names)
    bins = pd.DataFrame({"confidence": [0.9], "accuracy": [1.0], "n_cells": [100]})
    confusion, _ = cp.pl.annotation(recorded(confusion=table, reliability=bins))
    assert not confusion.texts
    assert (confusion.images[0].get_array() == np.eye(20)).all()


def test_nothing_is_changed(annotated):
    before = annotated.copy()
    cp.pl.annotation(annotated, key="found", labels_key="type")
    pd.testing.assert_frame_equal(annotated.obs, before.obs)
    pd.testing.assert_frame_equal(annotated.obsm["found_proba"], before.obsm["found_proba"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key": "other", "labels_key": "type"}, SlotError, "adata.obs has no 'other'; there are"),
        ({"labels_key": "no_such"}, SlotError, "adata.obs has no 'no_such'"),
        ({"key": "type", "labels_key": "type"}, SlotError, "adata.obsm has no 'type_proba'"),
        ({}, SlotError, "has no record of annotate under 'found'"),
        ({"labels_key": "empty"}, InputError, "'empty'\\] is missing in all 6 cells"),
        ({"labels_key": "foreign"}, InputError, "no label of .*'foreign'\\] is one that the tool"),
    ],
)
def test_what_is_not_there(annotated, options, error, message):
    annotated.obs["empty"] = None
    annotated.obs["foreign"] = "x"
    with pytest.raises(error, match=message):
        cp.pl.annotation(annotated, **({"key": "found"} | options))


def test_nothing_held_out_and_no_anndata():
    with pytest.raises(SlotError, match="nothing was held out. Pass labels_key="):
        cp.pl.annotation(recorded())
    with pytest.raises(InputError, match="adata must be an AnnData object; got ndarray"):
        cp.pl.annotation(np.ones((2, 2)))
