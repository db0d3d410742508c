"""`cp.tl.denoise` beyond the contract that all tools keep (tests/test_contract*.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.stats import nbinom

import cellplm_tl as cp
from cellplm_tl import _genes
from cellplm_tl._anndata import read_cells
from cellplm_tl._denoising import POISSON_THETA, Denoiser, Judgement
from cellplm_tl._errors import (
    BaselineWarning,
    CountsError,
    GenesError,
    ModelError,
    OptionError,
    SlotError,
    SmoothingWarning,
    TrainingError,
)
from cellplm_tl._likelihood import expected_log1p, quantile

module = sys.modules["cellplm_tl.tl.denoise"]
GOLDEN = Path(__file__).parent.parent / "data" / "golden"
KEY = "cellplm_denoised"
SHORT = cp.train.TrainConfig(strategy="head", steps=3, warmup=1, validate_every=3)
# Of a network that has learned nothing, these are as they should be.
pytestmark = [
    pytest.mark.filterwarnings("ignore::cellplm_tl._errors.BaselineWarning"),
    pytest.mark.filterwarnings("ignore::cellplm_tl._errors.SmoothingWarning"),
]


@pytest.fixture
def model(spectrum_network) -> cp.models.Model:
    network = spectrum_network(decoder="profile", decoder_hidden=16, encoder_layers=1)
    return cp.models.Model(network, "small")


@pytest.fixture
def cells(pbmc_counts) -> ad.AnnData:
    """Sixty cells with all 765 genes, of which the model knows 300; the first has no counts."""
    adata = pbmc_counts[:60].copy()
    dense = adata.X.toarray()
    dense[0] = 0
    adata.X = sparse.csr_matrix(dense)
    adata.obs["sample"] = np.where(np.arange(60) % 3 == 0, "a", "b")
    return adata


def known(adata, model) -> np.ndarray:
    return np.isin(_genes.resolve(adata.var_names).gene_ids, model.genes)


def content(adata) -> tuple:
    slots = {f"{s}/{k}": 1 for s in ("layers", "obsm", "uns") for k in getattr(adata, s)}
    return sorted(slots), list(adata.obs), list(adata.var), adata.X.toarray().tobytes()


def denoised(adata, model, **parameters):
    cp.tl.denoise(adata, model=model, **parameters)
    return adata.layers[parameters.get("key_added", KEY)]


# --- the slots ------------------------------------------------------------------------------------


def test_what_is_written(cells, model):
    found = denoised(cells, model)
    assert found.shape == cells.shape
    assert found.dtype == np.float32
    assert (found >= 0).all()
    np.testing.assert_array_equal(cells.var[KEY], known(cells, model))
    record = cells.uns["cellplm"][KEY]
    assert record["model"]["name"] == "small"
    assert record["n_genes_by_mean"] == 765 - known(cells, model).sum()
    assert record["meaning"].startswith("expectation")
    assert set(record["held_out"]["scores"].index) == {
        "denoised",
        "decoder",
        "neighbors",
        "gene_mean",
    }
    assert record["held_out"]["coverage"]["level"] == 0.9
    assert "training" not in record or record["training"] is None


def test_expected_counts_sum_to_those_of_each_cell(cells, model):
    found, mask = denoised(cells, model), known(cells, model)
    totals = cells.X[:, mask].toarray().sum(1)
    np.testing.assert_allclose(found[:, mask].sum(1), totals, rtol=1e-4)
    assert (found[0] == 0).all()


@pytest.mark.parametrize("share", [0.35, None])
def test_a_weighted_mean_with_what_was_found_on_held_out_counts(monkeypatch, cells, model, share):
    if share is not None:
        fixed_judge(monkeypatch, 2.0, share=share)
    found = denoised(cells, model, random_state=0)
    share = cells.uns["cellplm"][KEY]["held_out"]["decoder_share"]
    read = read_cells(cells, model.genes)
    rng = np.random.default_rng(0)  # as in the call: nearly equal distances depend on it
    rng.integers(2**31)
    denoiser = Denoiser(model.network, read, device=torch.device("cpu"), rng=rng)
    decoded, smoothed = (f.numpy() for f in denoiser.fractions(np.arange(60)))
    fractions = share * decoded + (1 - share) * smoothed
    totals = cells.X[:, known(cells, model)].toarray().sum(1, keepdims=True)
    np.testing.assert_allclose(found[:, read.columns], totals * fractions, rtol=1e-3, atol=1e-5)


def test_genes_of_which_the_model_knows_nothing_get_their_contexts_mean(cells, model):
    found, mask = denoised(cells, model, batch_key="sample"), known(cells, model)
    counts = cells.X.toarray().astype(float)
    totals = counts[:, mask].sum(1, keepdims=True)
    for name in ("a", "b"):
        rows = (cells.obs["sample"] == name).to_numpy()
        mean = counts[rows][:, ~mask].sum(0) / totals[rows].sum()
        np.testing.assert_allclose(found[rows][:, ~mask], totals[rows] * mean, rtol=1e-4, atol=1e-7)


def test_columns_of_one_gene_share_its_expectation_as_they_share_its_counts(cells, model):
    whole = denoised(cells.copy(), model)
    column = int(np.flatnonzero(known(cells, model))[4])
    counts = cells.X.toarray()
    rng = np.random.default_rng(0)
    first = rng.binomial(counts[:, column].astype(int), 0.3)
    split = np.column_stack([counts, counts[:, column] - first])
    split[:, column] = first
    gene_id = _genes.resolve(cells.var_names[[column]]).gene_ids[0]
    var = pd.DataFrame(index=[*cells.var_names, gene_id])
    two = ad.AnnData(sparse.csr_matrix(split), obs=cells.obs, var=var)
    found = denoised(two, model)
    share = first.sum() / counts[:, column].sum()
    together = found[:, column] + found[:, -1]
    np.testing.assert_allclose(found[:, column], share * together, rtol=1e-4)
    np.testing.assert_allclose(together, whole[:, column], rtol=1e-3)
    alone = two.copy()
    cp.tl.denoise(alone, model=model, genes=[gene_id])
    np.testing.assert_allclose(alone.obsm[KEY][gene_id], found[:, -1], rtol=1e-5)


def test_some_genes_are_those_columns_of_all(cells, model):
    options = {"scale": ("lognorm", "counts"), "interval": 0.8}
    whole = cp.tl.denoise(cells, model=model, copy=True, **options)
    names = [cells.var_names[i] for i in (700, 3, 41)]
    cp.tl.denoise(cells, model=model, genes=names, **options)
    for key in (KEY, f"{KEY}_counts", f"{KEY}_lower", f"{KEY}_upper"):
        frame = cells.obsm[key]
        assert frame.columns.tolist() == names
        assert frame.index.equals(cells.obs_names)
        expected = whole[:, names].layers[key]
        np.testing.assert_allclose(frame.to_numpy(), expected, rtol=1e-4, atol=1e-6)
    assert not list(cells.layers)


def test_two_scales_and_limits(cells, model):
    cp.tl.denoise(cells, model=model, scale=("counts", "lognorm"), interval=0.8, key_added="d")
    assert set(cells.layers) == {"d", "d_lognorm", "d_lower", "d_upper"}
    counts, lognorm, lower, upper = (
        cells.layers[k] for k in ("d", "d_lognorm", "d_lower", "d_upper")
    )
    totals = cells.X[:, known(cells, model)].toarray().sum(1, keepdims=True)
    of_the_mean = np.log1p(counts * 1e4 / np.maximum(totals, 1))
    assert (lognorm <= of_the_mean + 2e-4).all()
    assert (lognorm < of_the_mean)[1:, known(cells, model)].mean() > 0.95  # Jensen
    assert (lower <= upper).all()
    assert (lower == np.rint(lower)).all()
    assert (upper == np.rint(upper)).all()
    assert cells.uns["cellplm"]["d"]["held_out"]["coverage"]["level"] == 0.8
    second = cp.tl.denoise(cells, model=model, scale="lognorm", key_added="e", copy=True)
    np.testing.assert_allclose(second.layers["e"], lognorm, rtol=1e-4, atol=1e-5)


def fixed_judge(monkeypatch, theta: float, share=0.5, **findings):
    """Stand in for what held-out counts say."""

    def judged(network, cells, **_):
        scores = pd.DataFrame(
            {"poisson_deviance": [1.0, findings.get("gene_mean", 2.0)]},
            index=["denoised", "gene_mean"],
        )
        dispersion = torch.full((len(cells.genes),), theta)
        smoothing = {"n_genes": 20, "invented": findings.get("invented", 0.1)}
        return Judgement(30, share, dispersion, scores, {"level": 0.9}, smoothing)

    monkeypatch.setattr(module, "judge", judged)


def test_values_are_those_of_a_negative_binomial(monkeypatch, cells, model):
    """Limits and expected logarithm, written out with scipy; unknown genes are Poisson."""
    fixed_judge(monkeypatch, 2.0)
    cp.tl.denoise(cells, model=model, scale=("counts", "lognorm"), interval=0.9)
    column = int(np.flatnonzero(known(cells, model))[10])
    other = int(np.flatnonzero(~known(cells, model))[10])
    totals = cells.X[:, known(cells, model)].toarray().sum(1)
    k = np.arange(3000)
    for j, theta in ((column, 2.0), (other, POISSON_THETA)):
        for i in range(1, 30):
            mean = float(cells.layers[KEY][i, j])
            counted = nbinom(theta, theta / (theta + mean))
            expected = (counted.pmf(k) * np.log1p(k * 1e4 / totals[i])).sum()
            assert cells.layers[f"{KEY}_lognorm"][i, j] == pytest.approx(expected, abs=5e-4)
            limits = [cells.layers[f"{KEY}_{end}"][i, j] for end in ("lower", "upper")]
            assert limits == [counted.ppf(0.05), counted.ppf(0.95)]


def test_limits_on_the_log_scale_are_those_of_counts(monkeypatch, cells, model):
    fixed_judge(monkeypatch, 2.0)
    cp.tl.denoise(cells, model=model, interval=0.9)
    cp.tl.denoise(cells, model=model, scale="lognorm", interval=0.9, key_added="l")
    totals = cells.X[:, known(cells, model)].toarray().sum(1, keepdims=True)
    for end in ("lower", "upper"):
        expected = np.log1p(cells.layers[f"{KEY}_{end}"] * 1e4 / np.maximum(totals, 1))
        np.testing.assert_allclose(cells.layers[f"l_{end}"], expected, rtol=1e-5)


@pytest.mark.parametrize("scale", ["counts", "lognorm"])
def test_what_is_expected_if_a_gene_is_counted(monkeypatch, cells, model, scale):
    """Expectation over the probability to see it: at least one count, in cells that have any."""
    fixed_judge(monkeypatch, 2.0)
    of_all = denoised(cells, model, scale=scale)
    counts = denoised(cells, model, key_added="c")
    found = denoised(cells, model, scale=scale, objective="nonzero", key_added="n")
    assert (found[0] == 0).all()
    assert (found[1:] >= of_all[1:] * (1 - 1e-5)).all()
    totals = cells.X[:, known(cells, model)].toarray().sum(1, keepdims=True)[1:]
    one = 1.0 if scale == "counts" else np.log1p(1e4 / totals)
    assert (found[1:] >= one * (1 - 2e-3)).all()
    mask = known(cells, model)
    seen = 1 - (1 + counts[1:, mask].astype(float) / 2) ** -2
    expected = of_all[1:, mask] / seen
    is_large = seen > 1e-3
    np.testing.assert_allclose(found[1:, mask][is_large], expected[is_large], rtol=2e-3)
    assert "not the expression" in cells.uns["cellplm"]["n"]["meaning"]


# --- cells ----------------------------------------------------------------------------------------


def test_one_cell(cells, model):
    one = cells[5].copy()
    found = denoised(one, model)
    mask = known(cells, model)
    assert found[:, mask].sum() == pytest.approx(float(one.X[:, mask].sum()), rel=1e-4)
    held_out = one.uns["cellplm"][KEY]["held_out"]
    assert held_out["n_cells"] == 0
    assert "too few" in held_out["why"]


def test_one_cell_can_be_trained_on(cells, model):
    one = cells[5].copy()
    assert np.isfinite(denoised(one, model, train=SHORT)).all()


def test_contexts_of_which_one_is_a_single_cell(cells, model):
    cells.obs["sample"] = ["a"] * 59 + ["b"]
    found = denoised(cells, model, batch_key="sample")
    assert np.isfinite(found).all()


def test_neighbours_are_of_the_own_context(monkeypatch, cells, model):
    """Counts of another context do not show in the neighbours' part."""
    fixed_judge(monkeypatch, 2.0, share=0.0)
    column = int(np.flatnonzero(known(cells, model))[7])
    dense = cells.X.toarray()
    dense[:, column] = np.where(cells.obs["sample"] == "a", 5, 0)
    cells.X = sparse.csr_matrix(dense)
    found = denoised(cells, model, batch_key="sample")[:, column]
    assert (found[(cells.obs["sample"] == "b").to_numpy()] == 0).all()
    assert (found[3::3] > 0).all()


def test_small_blocks_change_nothing(monkeypatch, cells, model):
    whole = denoised(cells, model)
    monkeypatch.setattr(Denoiser, "block_cells", lambda self: 7)
    found = denoised(cells, model, key_added="small")
    np.testing.assert_allclose(found, whole, rtol=1e-3, atol=1e-5)


def test_dense_cells_give_the_same(cells, model):
    whole = denoised(cells, model)
    dense = ad.AnnData(cells.X.toarray(), var=cells.var[[]])
    np.testing.assert_allclose(denoised(dense, model), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("out", [False, True])
def test_cells_on_disk(cells, model, tmp_path, out):
    whole = denoised(cells.copy(), model)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    path = tmp_path / "out.h5ad" if out else None
    cp.tl.denoise(backed, model=model, out=path)
    found = ad.read_h5ad(path).X if out else backed.layers[KEY]
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-6)
    backed.file.close()


# --- training -------------------------------------------------------------------------------------


def test_training_changes_the_result_and_leaves_the_model(monkeypatch, cells, model):
    monkeypatch.setattr("cellplm_tl._denoising.DECODER_SHARES", (0.5,))
    before = [p.clone() for p in model.network.parameters()]
    whole = denoised(cells, model)
    found = denoised(cells, model, train=SHORT, key_added="t")
    assert not np.allclose(found, whole, rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.network.parameters(), strict=True))
    record = cells.uns["cellplm"]["t"]
    assert record["training"]["strategy"] == "head"
    assert np.isfinite(record["training"]["held_out_loss"])
    again = denoised(cells, model, train=SHORT, key_added="u")
    np.testing.assert_array_equal(again, found)


def test_training_that_breaks_leaves_the_cells(monkeypatch, cells, model):
    before = content(cells)

    def breaks(*_, **__):
        raise TrainingError("the loss became nan")

    monkeypatch.setattr(module, "fine_tune", breaks)
    with pytest.raises(TrainingError, match="became nan"):
        cp.tl.denoise(cells, model=model, train=SHORT)
    assert content(cells) == before


def test_what_is_held_out_when_training_is_held_out_when_judging(monkeypatch, cells, model):
    seen = {}

    def tuned(network, cells, config, *, shares, device):
        seen["train"] = config.seed, shares
        return network, "head", 1.0

    def judged(network, cells, *, shares, level, device, seed):
        seen["judge"] = seed, shares

    monkeypatch.setattr(module, "fine_tune", tuned)
    monkeypatch.setattr(module, "judge", judged)
    config = cp.train.TrainConfig(validation_share=0.2, seed=5)
    cp.tl.denoise(cells, model=model, train=config, random_state=3)
    assert seen["train"] == seen["judge"]
    assert seen["judge"][1] == pytest.approx((0.6, 0.2, 0.2))


# --- out ------------------------------------------------------------------------------------------


def read_file(path: Path) -> ad.AnnData:
    return ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("some", [False, True])
def test_a_file_holds_what_memory_would(monkeypatch, cells, model, tmp_path, suffix, some):
    if suffix == ".zarr":
        pytest.importorskip("zarr")
    genes = cells.var_names[[5, 300, 2]].tolist() if some else cells.var_names.tolist()
    options = {"scale": ("counts", "lognorm"), "interval": 0.9, "model": model}
    expected = cp.tl.denoise(cells, copy=True, **options)
    monkeypatch.setattr(Denoiser, "block_cells", lambda self: 23)
    path = tmp_path / f"out{suffix}"
    cp.tl.denoise(cells, out=path, genes=genes if some else None, **options)
    assert not list(cells.layers)
    assert not list(cells.obsm)
    assert cells.uns["cellplm"][KEY]["parameters"]["out"].endswith(suffix)
    found = read_file(path)
    assert found.var_names.tolist() == genes
    assert found.obs_names.equals(cells.obs_names)
    assert found.obs["sample"].tolist() == cells.obs["sample"].tolist()
    assert found.X.dtype == np.float32
    close = {"rtol": 1e-3, "atol": 1e-5}
    np.testing.assert_allclose(found.X, expected[:, genes].layers[KEY], **close)
    for key in (f"{KEY}_lognorm", f"{KEY}_lower", f"{KEY}_upper"):
        ours, theirs = found.layers[key], expected[:, genes].layers[key]
        assert np.isclose(ours, theirs, **close).mean() > 0.999  # a limit is a step
    assert found.uns["cellplm"][KEY]["tool"] == "denoise"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_file_that_was_not_finished_is_none(monkeypatch, cells, model, tmp_path, suffix):
    if suffix == ".zarr":
        pytest.importorskip("zarr")
    before, written = content(cells), []
    monkeypatch.setattr(Denoiser, "block_cells", lambda self: 20)
    write = module.DenseFile.write

    def interrupted(self, rows, matrices):
        if written:
            raise KeyboardInterrupt
        written.append(rows)
        write(self, rows, matrices)

    monkeypatch.setattr(module.DenseFile, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cp.tl.denoise(cells, model=model, out=tmp_path / f"out{suffix}")
    assert written
    assert not list(tmp_path.iterdir())
    assert content(cells) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there.h5ad", "exists: choose another name, nothing is overwritten"),
        ("new.csv", r"out must end in .h5ad or .zarr; got"),
        ("no/new.h5ad", "the folder .* does not exist"),
    ],
)
def test_files_that_cannot_be(cells, model, tmp_path, name, message):
    (tmp_path / "there.h5ad").write_text("mine")
    before = content(cells)
    with pytest.raises(OptionError, match=message):
        cp.tl.denoise(cells, model=model, out=tmp_path / name)
    assert content(cells) == before
    assert (tmp_path / "there.h5ad").read_text() == "mine"


def test_a_disk_without_room(monkeypatch, cells, model, tmp_path):
    blockwise = sys.modules["cellplm_tl._anndata.blockwise"]
    full = blockwise.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(blockwise.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OptionError, match=r"needs 0.0 GB, 0.0 GB are free there: name another"):
        cp.tl.denoise(cells, model=model, out=tmp_path / "out.h5ad")


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": "log"}, OptionError, "scale must be one of 'counts', 'lognorm'; got 'log'"),
        ({"scale": ("counts", "raw")}, OptionError, "scale must be one of"),
        ({"scale": ()}, OptionError, "must name one scale or more, each once"),
        ({"scale": ("counts", "counts")}, OptionError, "must name one scale or more, each once"),
        ({"scale": None}, OptionError, "scale must be one of"),
        ({"scale": 5}, OptionError, "scale must be one of"),
        ({"interval": 1.0}, OptionError, "interval must be a number between 0 and 1"),
        ({"interval": 0}, OptionError, "interval must be a number between 0 and 1"),
        ({"interval": True}, OptionError, "interval must be a number between 0 and 1"),
        ({"interval": "0.9"}, OptionError, "interval must be a number between 0 and 1"),
        ({"interval": float("nan")}, OptionError, "interval must be a number between 0 and 1"),
        ({"objective": "mse"}, OptionError, "objective must be one of 'likelihood', 'nonzero'"),
        ({"objective": "nonzero", "interval": 0.9}, OptionError, "interval is of all counts"),
        ({"train": True}, OptionError, "train must be a cp.train.TrainConfig or None; got True"),
        (
            {"train": cp.train.TrainConfig(validation_share=0.4)},
            OptionError,
            "must be below 0.4; got 0.4",
        ),
        ({"genes": "CD3E"}, OptionError, "genes must be a list of names; got the text 'CD3E'"),
        ({"genes": []}, OptionError, "genes must name one gene or more"),
        ({"genes": ["NOSUCHGENE"]}, SlotError, "1 of 1 genes are not in adata.var_names"),
        ({"random_state": "one"}, OptionError, "random_state must be an integer"),
        ({"random_state": -1}, OptionError, "random_state must be an integer of at least 0"),
        ({"batch_key": "no"}, SlotError, "no"),
        ({"layer": "no"}, SlotError, "layer='no' is not in adata.layers"),
    ],
)
def test_options_that_cannot_be(cells, model, options, error, message):
    before = content(cells)
    with pytest.raises(error, match=message):
        cp.tl.denoise(cells, model=model, **options)
    assert content(cells) == before


def test_a_key_of_what_is_read_is_refused(cells, model):
    cells.layers["raw"] = cells.X.copy()
    with pytest.raises(SlotError):
        cp.tl.denoise(cells, model=model, layer="raw", key_added="raw")


def test_memory_that_cannot_hold_the_result(monkeypatch, cells, model, tmp_path):
    before = content(cells)
    monkeypatch.setattr(module, "free_memory", lambda: 4 * 60 * 765 - 1)
    with pytest.raises(OptionError, match=r"write it to a file with out='….h5ad', or name the ge"):
        cp.tl.denoise(cells, model=model)
    assert content(cells) == before
    cp.tl.denoise(cells, model=model, genes=cells.var_names[:3].tolist())
    cp.tl.denoise(cells, model=model, out=tmp_path / "out.h5ad")


def test_cells_without_any_counts_get_zeros(cells, model):
    cells.X = sparse.csr_matrix(cells.shape, dtype=np.float32)
    options = {"scale": ("counts", "lognorm"), "interval": 0.9}
    cp.tl.denoise(cells, model=model, **options)
    assert all((layer == 0).all() for layer in cells.layers.values())
    assert cells.uns["cellplm"][KEY]["held_out"]["n_cells"] == 0


def test_values_that_are_no_counts(cells, model):
    cells.X.data[3] = -1.0
    before = content(cells)
    with pytest.raises(CountsError):
        cp.tl.denoise(cells, model=model)
    assert content(cells) == before


def test_no_gene_of_the_model(cells, model):
    cells.var_names = [f"gene{i}" for i in range(cells.n_vars)]
    with pytest.raises(GenesError):
        cp.tl.denoise(cells, model=model)
    assert not list(cells.layers)


# --- models ---------------------------------------------------------------------------------------


def test_a_model_without_a_decoder(cells):
    before = content(cells)
    with pytest.raises(ModelError, match="'linear_transfer' has no decoder, so that nothing leads"):
        cp.tl.denoise(cells, model="linear_transfer")
    assert content(cells) == before


def test_a_gaussian_decoder_gives_means_alone(cells, spectrum_network):
    network = spectrum_network(decoder="gaussian", decoder_hidden=16, encoder_layers=1)
    model = cp.models.Model(network, "bell")
    found, mask = denoised(cells, model), known(cells, model)
    totals = cells.X[:, mask].toarray().sum(1)
    np.testing.assert_allclose(found[:, mask].sum(1), totals, rtol=1e-4)
    for option in ({"interval": 0.9}, {"train": SHORT}):
        with pytest.raises(OptionError, match="needs a likelihood of counts, which 'bell' lacks"):
            cp.tl.denoise(cells, model=model, **option)


@pytest.mark.parametrize("layout", ["vae", "gmvae"])
@pytest.mark.parametrize("train", [None, SHORT])
def test_released_models(pbmc_counts, layout, train):
    model = cp.models.load(GOLDEN / f"golden_{layout}.best.ckpt")
    adata = pbmc_counts[:50, :120].copy()
    adata.var_names = list(model.genes[:120])
    adata.obsm["spatial"] = np.random.default_rng(0).random((50, 2))
    found = denoised(adata, model, train=train, interval=0.9)
    np.testing.assert_allclose(found.sum(1), adata.X.toarray().sum(1), rtol=1e-4)
    assert adata.var[KEY].all()


@pytest.mark.parametrize("options", [{}, {"genes": ["CD3E", "MS4A1"], "scale": "lognorm"}])
def test_the_model_of_the_package(pbmc_counts, options):
    """Whatever it is today: T cells have more CD3 than B cells, and B cells more CD20."""
    adata = pbmc_counts[::3].copy()
    cp.tl.denoise(adata, **options)
    if options:
        values = adata.obsm[KEY]
    else:
        values = pd.DataFrame(adata.layers[KEY], adata.obs_names, adata.var_names)
        values = values.div(values.sum(1), axis=0)
    labels = adata.obs["bulk_labels"].astype(str)
    is_b, is_t = labels == "CD19+ B", labels.str.contains("T ")
    assert values["CD3E"][is_t].mean() > 2 * values["CD3E"][is_b].mean()
    assert values["MS4A1"][is_b].mean() > 2 * values["MS4A1"][is_t].mean()
    scores = adata.uns["cellplm"][KEY]["held_out"]["scores"]["poisson_deviance"]
    assert scores["denoised"] < scores["gene_mean"]


# --- warnings and record --------------------------------------------------------------------------


def caught(recwarn, kind) -> list[str]:
    return [str(w.message) for w in recwarn if issubclass(w.category, kind)]


@pytest.mark.parametrize(
    ("findings", "smoothing", "baseline"),
    [
        ({}, 0, 0),
        ({"invented": 0.76}, 1, 0),
        ({"invented": 0.74}, 0, 0),
        ({"invented": -0.5}, 0, 0),
        ({"gene_mean": 0.9}, 0, 1),
        ({"gene_mean": 0.9, "invented": 0.9}, 1, 1),
    ],
)
@pytest.mark.filterwarnings("always::cellplm_tl._errors.CellPLMWarning")
def test_warnings(monkeypatch, recwarn, cells, model, findings, smoothing, baseline):
    fixed_judge(monkeypatch, 2.0, **findings)
    cp.tl.denoise(cells, model=model)
    assert len(caught(recwarn, SmoothingWarning)) == smoothing
    assert len(caught(recwarn, BaselineWarning)) == baseline
    ours = [w for w in recwarn if issubclass(w.category, SmoothingWarning | BaselineWarning)]
    assert {w.filename for w in ours} <= {__file__}  # they point at the caller
    if smoothing:
        assert (
            f"{findings['invented']:.0%} of the gene-gene" in caught(recwarn, SmoothingWarning)[0]
        )
    if baseline:
        assert "(Poisson deviance 0.9000 against 1.0000)" in caught(recwarn, BaselineWarning)[0]


def test_the_record_survives_a_file(cells, model, tmp_path):
    options = {"scale": ("counts", "lognorm"), "interval": 0.9, "train": SHORT}
    cp.tl.denoise(cells, model=model, batch_key="sample", **options)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    before = cells.uns["cellplm"][KEY]
    after = ad.read_h5ad(tmp_path / "cells.h5ad").uns["cellplm"][KEY]
    assert after["held_out"]["decoder_share"] == before["held_out"]["decoder_share"]
    pd.testing.assert_frame_equal(after["held_out"]["scores"], before["held_out"]["scores"])
    assert after["held_out"]["coverage"] == before["held_out"]["coverage"]
    assert after["smoothing"]["n_genes"] == before["smoothing"]["n_genes"]
    assert after["training"]["strategy"] == "head"
    assert list(after["parameters"]["scale"]) == ["counts", "lognorm"]


def test_the_state_of_a_generator_goes_on(cells, model):
    rng = np.random.default_rng(0)
    first, second = (
        cp.tl.denoise(cells, model=model, random_state=rng, copy=True) for _ in range(2)
    )
    again = cp.tl.denoise(cells, model=model, random_state=np.random.default_rng(0), copy=True)
    np.testing.assert_array_equal(again.layers[KEY], first.layers[KEY])
    scores = [a.uns["cellplm"][KEY]["held_out"]["scores"] for a in (first, second)]
    assert not scores[0].equals(scores[1])


def test_helpers_of_the_likelihood_agree_with_what_is_written(monkeypatch, cells, model):
    """The scale of the logarithm is 10,000 over the counts of genes that the model knows."""
    fixed_judge(monkeypatch, 0.7)
    cp.tl.denoise(cells, model=model, scale=("counts", "lognorm"), interval=0.5)
    mask = known(cells, model)
    totals = torch.from_numpy(cells.X[:, mask].toarray().sum(1))
    mean = torch.from_numpy(cells.layers[KEY][:, mask])
    theta = torch.full((int(mask.sum()),), 0.7)
    log = expected_log1p(mean, theta, 1e4 / totals.clamp(min=1))
    np.testing.assert_allclose(cells.layers[f"{KEY}_lognorm"][:, mask], log, rtol=1e-4, atol=1e-5)
    upper = quantile(mean, theta, 0.75)
    np.testing.assert_array_equal(cells.layers[f"{KEY}_upper"][:, mask], upper)
