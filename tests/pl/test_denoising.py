"""The picture of denoised genes: what is drawn is read back from the axes."""

from __future__ import annotations

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

import cellplm_tl as cp
from cellplm_tl._errors import CountsError, InputError, OptionError, SlotError

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _closed():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


@pytest.fixture
def denoised():
    """Give counts of 40 cells and 4 genes, and something that stands for the denoised ones."""
    counts = np.random.default_rng(0).poisson(3.0, (40, 4)).astype(np.float32)
    counts[0] = 0
    adata = ad.AnnData(counts)
    adata.var_names = ["CD3D", "CD3E", "MS4A1", "NKG7"]
    adata.layers["cellplm_denoised"] = counts.mean(axis=0) + 0.1 * counts
    adata.uns["cellplm"] = {
        "cellplm_denoised": {"tool": "denoise", "parameters": {"scale": "counts"}}
    }
    return adata


def lognorm(values, counts):
    return np.log1p(1e4 * values / np.maximum(counts.sum(axis=1, keepdims=True), 1))


def test_a_pair_before_and_after(denoised):
    before, after = cp.pl.denoising(denoised, [("CD3E", "MS4A1")])
    counts = denoised.X.astype(float)
    measured = lognorm(counts, counts)[:, [1, 2]]
    smoothed = lognorm(denoised.layers["cellplm_denoised"], counts)[:, [1, 2]]
    for axes, name, values in ((before, "measured", measured), (after, "denoised", smoothed)):
        np.testing.assert_allclose(axes.collections[0].get_offsets(), values, rtol=1e-6)
        assert axes.get_title() == f"{name}: r = {np.corrcoef(values.T)[0, 1]:.2f}"
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("CD3E", "MS4A1")
    assert before.get_xlim() == after.get_xlim()
    assert before.get_xlim()[1] >= max(measured[:, 0].max(), smoothed[:, 0].max())


def test_single_genes_as_violins(denoised):
    (violins,) = cp.pl.denoising(denoised, ["NKG7", "CD3D"])
    assert [text.get_text() for text in violins.get_xticklabels()] == ["NKG7", "CD3D"]
    counts = denoised.X.astype(float)
    states = {-0.2: counts, 0.2: denoised.layers["cellplm_denoised"]}
    means = {}
    for collection in violins.collections:
        if type(collection).__name__ == "LineCollection":
            for (left, height), (right, _) in collection.get_segments():
                means[round((left + right) / 2, 6)] = height
    for place, column in ((0, 3), (1, 0)):
        for offset, values in states.items():
            expected = lognorm(values, counts)[:, column].mean()
            assert means[round(place + offset, 6)] == pytest.approx(expected, rel=1e-6)
    assert [text.get_text() for text in violins.get_legend().get_texts()] == [
        "measured",
        "denoised",
    ]


def test_genes_asked_for_are_read_from_the_frame(denoised):
    expected = cp.pl.denoising(denoised, [("CD3E", "NKG7")])[1].collections[0].get_offsets()
    denoised.obsm["cellplm_denoised"] = denoised.to_df("cellplm_denoised")[["NKG7", "CD3E"]]
    del denoised.layers["cellplm_denoised"]
    _, after = cp.pl.denoising(denoised, [("CD3E", "NKG7")])
    np.testing.assert_allclose(after.collections[0].get_offsets(), expected)


@pytest.mark.parametrize("scale", ["lognorm", np.array(["lognorm", "counts"], dtype=object)])
def test_an_expected_logarithm_is_shown_as_it_is(denoised, scale):
    denoised.uns["cellplm"]["cellplm_denoised"]["parameters"]["scale"] = scale
    _, after = cp.pl.denoising(denoised, [("CD3D", "CD3E")])
    values = denoised.layers["cellplm_denoised"][:, :2]
    np.testing.assert_allclose(after.collections[0].get_offsets(), values, rtol=1e-6)


def test_invented_correlation_beside_the_genes(denoised):
    pairs = pd.DataFrame({"held_out": [0.1, -1.2], "denoised": [0.8, -0.3]})
    denoised.uns["cellplm"]["cellplm_denoised"]["smoothing"] = {"pairs": pairs, "invented": 0.5}
    axes = cp.pl.denoising(denoised, ["CD3D", ("CD3D", "CD3E"), ("CD3E", "NKG7")])
    assert len(axes) == 1 + 2 + 2 + 1
    np.testing.assert_allclose(axes[-1].collections[0].get_offsets(), pairs)
    (identity,) = axes[-1].lines
    assert identity.get_slope() == 1
    assert axes[-1].get_xlim()[0] < -1.2
    assert axes[-1].get_title() == "pairs of genes: 50% invented"
    assert len(cp.pl.denoising(denoised, ["CD3D"])) == 2


def test_counts_of_a_layer(denoised):
    counts = denoised.X.copy()
    expected = cp.pl.denoising(denoised, [("CD3D", "CD3E")])[0].collections[0].get_offsets()
    denoised.layers["counts"] = counts
    denoised.layers["raw"] = counts
    denoised.X = lognorm(counts, counts)
    for layer in (None, "raw"):
        found = cp.pl.denoising(denoised, [("CD3D", "CD3E")], layer=layer)[0]
        np.testing.assert_allclose(found.collections[0].get_offsets(), expected)


@pytest.mark.parametrize(
    ("genes", "error", "message"),
    [
        ("CD3D", OptionError, "genes must be a list .* got the text 'CD3D'"),
        ([], OptionError, "genes must hold one name or pair or more"),
        ([("CD3D", "CD3E", "NKG7")], OptionError, "names and pairs of names; got \\('CD3D'"),
        ([3], OptionError, "names and pairs of names; got 3"),
        (["CD3D", ("CD3E", "Cd4")], InputError, "Cd4: not in adata.var_names"),
        (
            ["NKG7", "MS4A1"],
            InputError,
            "MS4A1: not among the genes that were denoised, which are CD3D",
        ),
    ],
)
def test_genes_that_cannot_be_drawn(denoised, genes, error, message):
    asked = denoised[:, ["CD3D", "CD3E", "NKG7"]].to_df("cellplm_denoised")
    del denoised.layers["cellplm_denoised"]
    denoised.obsm["cellplm_denoised"] = asked
    with pytest.raises(error, match=message):
        cp.pl.denoising(denoised, genes)


def test_slots_that_are_not_there(denoised):
    with pytest.raises(SlotError, match="has no record of denoise under 'other'"):
        cp.pl.denoising(denoised, ["CD3D"], key="other")
    with pytest.raises(SlotError, match="layer='raw' is not in adata.layers"):
        cp.pl.denoising(denoised, ["CD3D"], layer="raw")
    with pytest.raises(InputError, match="adata must be an AnnData object; got ndarray"):
        cp.pl.denoising(denoised.X, ["CD3D"])
    denoised.X = denoised.X - 1
    with pytest.raises(CountsError, match="negative"):
        cp.pl.denoising(denoised, ["CD3D"])
    del denoised.layers["cellplm_denoised"]
    with pytest.raises(SlotError, match="neither adata.layers nor adata.obsm has"):
        cp.pl.denoising(denoised, ["CD3D"])
