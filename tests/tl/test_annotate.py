"""`cp.tl.annotate` beyond the contract that all tools keep (tests/test_contract*.py)."""

from __future__ import annotations

import logging
import re
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import cellplm_tl as cp
from cellplm_tl import _weights
from cellplm_tl._errors import (
    BaselineWarning,
    CountsError,
    GenesError,
    InputError,
    OptionError,
    SlotError,
    TrainingError,
)
from cellplm_tl.models import CellPLM, CellPLMConfig

KEY = "cellplm_annotation"
KINDS = {
    "CD19+ B": "B",
    "CD14+ Monocyte": "monocyte",
    "Dendritic": "dendritic",
    "CD56+ NK": "T/NK",
    "CD8+ Cytotoxic T": "T/NK",
    "CD4+/CD25 T Reg": "T/NK",
}


@pytest.fixture
def halves(pbmc_counts):
    """Give a labelled reference and a query: even and odd cells, four types, colours."""
    kind = pbmc_counts.obs["bulk_labels"].astype(str).map(KINDS)
    adata = pbmc_counts[kind.notna().to_numpy()].copy()
    order = ["monocyte", "T/NK", "B", "dendritic"]
    adata.obs["cell_type"] = pd.Categorical(kind[kind.notna()], order)
    reference, query = adata[::2].copy(), adata[1::2].copy()
    reference.uns["cell_type_colors"] = ["#ff0000", "#00ff00", "#0000ff", "#ffff00"]
    return reference, query


def record(adata: ad.AnnData) -> dict:
    return adata.uns["cellplm"][KEY]


@pytest.mark.parametrize("model", ["mini", "linear_transfer"])
def test_types_are_told(halves, model):
    reference, query = halves
    cp.tl.annotate(query, reference, model=model)
    known = query.obs[KEY] != "Unknown"
    is_right = query.obs[KEY].astype(str) == query.obs["cell_type"].astype(str)
    assert is_right[known].mean() > 0.88
    assert (~known).mean() < 0.15
    proba = query.obsm[f"{KEY}_proba"]
    assert list(proba.columns) == ["monocyte", "T/NK", "B", "dendritic"]
    np.testing.assert_allclose(proba.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(query.obs[f"{KEY}_confidence"], proba.max(axis=1))
    scores = cp.metrics.annotation(query.obs["cell_type"], proba.idxmax(axis=1), proba)
    assert scores["ece"] < 0.08
    validation = record(query)["validation"]
    assert validation["accuracy"] == pytest.approx(scores["accuracy"], abs=0.07)
    assert validation["unit"] == "cell"
    assert validation["set_coverage"] >= 0.85


def test_what_is_carried_over(halves, tmp_path):
    """The order of categories, colours, and names with a slash, through a file."""
    reference, query = halves
    cp.tl.annotate(query, reference)
    categories = list(query.obs[KEY].cat.categories)
    assert categories[:4] == ["monocyte", "T/NK", "B", "dendritic"]
    assert query.uns[f"{KEY}_colors"][:4] == ["#ff0000", "#00ff00", "#0000ff", "#ffff00"]
    assert len(query.uns[f"{KEY}_colors"]) == len(categories)
    with warnings.catch_warnings():  # anndata announces that such names will have to go
        warnings.simplefilter("ignore", FutureWarning)
        query.write_h5ad(tmp_path / "query.h5ad")
    read = ad.read_h5ad(tmp_path / "query.h5ad")
    pd.testing.assert_frame_equal(read.obsm[f"{KEY}_proba"], query.obsm[f"{KEY}_proba"])
    confusion = record(read)["validation"]["confusion"]
    assert list(confusion.index) == list(confusion.columns) == categories[:4]
    assert confusion.to_numpy().sum() == record(read)["validation"]["n_cells"]


def test_a_type_that_the_reference_lacks(halves):
    reference, query = halves
    reference = reference[reference.obs["cell_type"] != "B"].copy()
    cp.tl.annotate(query, reference)
    is_b = (query.obs["cell_type"] == "B").to_numpy()
    called = (query.obs[KEY] == "Unknown").to_numpy()
    score = query.obs[f"{KEY}_unknown_score"].to_numpy()
    assert (score[is_b][:, None] > score[~is_b]).mean() > 0.85  # the AUROC
    assert called[is_b].mean() > 0.3
    assert called[~is_b].mean() < 0.15
    assert "B" not in query.obs[KEY].cat.categories
    cp.tl.annotate(query, reference, unknown=False)
    assert "Unknown" not in query.obs[KEY].cat.categories


def test_a_query_of_one_type(halves):
    """Its own mean would be that of the type; it is compared with the reference."""
    reference, query = halves
    cells = query[query.obs["cell_type"] == "T/NK"].copy()
    cp.tl.annotate(cells, reference, unknown=False)
    assert (cells.obs[KEY] == "T/NK").mean() > 0.9


def test_a_cell_does_not_see_the_others(halves):
    reference, query = halves
    alone = query[:60].copy()
    cp.tl.annotate(query, reference)
    cp.tl.annotate(alone, reference)
    np.testing.assert_allclose(
        alone.obsm[f"{KEY}_proba"], query.obsm[f"{KEY}_proba"][:60], atol=1e-4
    )


def test_the_query_does_not_train(halves):
    """Neither its labels nor its counts enter what is learned."""
    reference, query = halves
    cp.tl.annotate(query, reference)
    other = query[:30].copy()
    other.X = other.X * 2
    cp.tl.annotate(other, reference)
    for part in ("weights", "depth"):
        np.testing.assert_array_equal(
            record(query)["calibration"][part], record(other)["calibration"][part]
        )


def test_a_saved_model_says_the_same(halves, tmp_path):
    reference, query = halves
    again = query.copy()
    cp.tl.annotate(query, reference, save_model=tmp_path / "types")
    model = cp.models.load(tmp_path / "types")
    cp.tl.annotate(again, model=tmp_path / "types")
    np.testing.assert_allclose(query.obsm[f"{KEY}_proba"], again.obsm[f"{KEY}_proba"], atol=1e-5)
    assert list(again.obs[KEY]) == list(query.obs[KEY])
    assert again.uns[f"{KEY}_colors"] == query.uns[f"{KEY}_colors"]
    old, new = record(query)["validation"], record(again)["validation"]
    pd.testing.assert_frame_equal(old["confusion"], new["confusion"])
    assert old["ece"] == new["ece"]
    assert model.outputs["labels"] == ["monocyte", "T/NK", "B", "dendritic"]
    with pytest.raises(FileExistsError, match="save_model"):
        cp.tl.annotate(again, reference, save_model=tmp_path / "types")
    with pytest.raises(OptionError, match="Leave the reference out"):
        cp.tl.annotate(again, reference, model=model)


def test_a_saved_model_on_fewer_genes(halves, tmp_path):
    reference, query = halves
    cp.tl.annotate(query.copy(), reference, save_model=tmp_path / "types")
    panel = query[:, ::3].copy()
    cp.tl.annotate(panel, model=tmp_path / "types", unknown=False)
    assert (panel.obs[KEY].astype(str) == panel.obs["cell_type"].astype(str)).mean() > 0.7
    assert record(panel)["reference"]["n_genes_shared"] < 300


def test_shallow_cells_are_compared_with_a_thinned_reference(halves):
    reference, query = halves
    query.X.data = np.random.default_rng(0).binomial(query.X.data.astype(int), 0.2).astype("f4")
    query.X.eliminate_zeros()
    cp.tl.annotate(query, reference, unknown=False)
    np.testing.assert_allclose(record(query)["reference_thinned_to"], [0.2])
    assert (query.obs[KEY].astype(str) == query.obs["cell_type"].astype(str)).mean() > 0.75


def test_batches_of_the_reference_are_held_out(halves):
    reference, query = halves
    reference.obs["sample"] = np.arange(reference.n_obs) % 3
    query.obs["sample"] = "mine"
    cp.tl.annotate(query, reference, batch_key="sample")
    assert record(query)["validation"]["unit"] == "batch"
    assert record(query)["validation"]["n_folds"] == 3
    reference.obs["sample"] = reference.obs["cell_type"].astype(str)  # sorted fractions
    cp.tl.annotate(query, reference, batch_key="sample")
    assert record(query)["validation"]["unit"] == "cell"


@pytest.mark.filterwarnings("ignore::cellplm_tl._errors.CellPLMWarning")
def test_types_with_one_or_two_cells(halves):
    reference, query = halves
    kind = reference.obs["cell_type"].astype(str)
    kind.iloc[0], kind.iloc[1:3] = "one", "two"
    reference.obs["cell_type"] = kind
    cp.tl.annotate(query, reference)
    assert list(query.obsm[f"{KEY}_proba"].columns) == sorted(set(kind))
    assert np.isfinite(query.obsm[f"{KEY}_proba"]).all(axis=None)


@pytest.mark.filterwarnings("ignore::cellplm_tl._errors.CellPLMWarning")
def test_a_reference_of_a_few_cells(halves):
    reference, query = halves
    few = reference[[0, 1, 2, 3, 4, 5]].copy()
    cp.tl.annotate(query, few)
    assert np.isfinite(query.obsm[f"{KEY}_proba"]).all(axis=None)


@pytest.mark.parametrize("kind", ["text", "numbers"])
def test_labels_of_other_types(halves, kind):
    reference, query = halves
    text = reference.obs["cell_type"].astype(str)
    number = text.map({"B": 2, "T/NK": 10, "monocyte": 1, "dendritic": 7})
    reference.obs["cell_type"] = text if kind == "text" else number
    cp.tl.annotate(query, reference)
    expected = ["B", "T/NK", "dendritic", "monocyte"] if kind == "text" else ["1", "2", "7", "10"]
    assert list(query.obsm[f"{KEY}_proba"].columns) == expected
    assert f"{KEY}_colors" not in query.uns


def test_cells_without_counts(halves):
    reference, query = halves
    keep = np.ones(query.n_obs, dtype=np.float32)
    keep[:3] = 0
    query.X = sp.diags(keep).tocsr() @ query.X
    cp.tl.annotate(query, reference)
    assert list(query.obs[KEY][:3]) == ["Unknown"] * 3
    prior = reference.obs["cell_type"].value_counts(normalize=True, sort=False)
    np.testing.assert_allclose(query.obsm[f"{KEY}_proba"].iloc[0], prior, atol=1e-5)
    assert record(query)["unknown"]["empty_cells"] == 3


def test_the_reference_may_be_the_query(halves):
    reference, _ = halves
    cp.tl.annotate(reference, reference)
    assert (reference.obs[KEY].astype(str) == reference.obs["cell_type"].astype(str)).mean() > 0.85
    with pytest.raises(SlotError, match="is an input of this call"):
        cp.tl.annotate(reference, reference, key_added="cell_type")


def test_lognormalised_reference_and_counts(halves, pbmc):
    reference, query = halves
    same = query.copy()
    cp.tl.annotate(query, reference)
    lognorm = pbmc[reference.obs_names].copy()
    lognorm.obs["cell_type"] = reference.obs["cell_type"]
    cp.tl.annotate(same, lognorm)
    np.testing.assert_allclose(same.obsm[f"{KEY}_proba"], query.obsm[f"{KEY}_proba"], atol=1e-3)


def test_a_baseline_that_wins_is_told(halves, monkeypatch):
    from cellplm_tl import _annotation

    monkeypatch.setattr(_annotation, "compare", lambda *_: (0.99, 1.0))
    reference, query = halves
    with pytest.warns(BaselineWarning, match=r"macro F1 of 0\.990, this head one of"):
        cp.tl.annotate(query, reference)


# Training


def test_fine_tuning(halves, tmp_path):
    """Encoder and latent move, the spectrum does not; a model with its own context is saved."""
    reference, query = halves
    train = cp.train.TrainConfig(strategy="full", steps=6, validate_every=3, learning_rate=1e-4)
    cp.tl.annotate(query, reference, train=train, save_model=tmp_path / "tuned", unknown=False)
    strategy = record(query)["validation"]["strategy"]
    assert strategy["chosen"] == "full"
    assert set(strategy["log_loss"]) == {"head", "full"}
    assert (query.obs[KEY].astype(str) == query.obs["cell_type"].astype(str)).mean() > 0.85
    before = cp.models.load("mini").network.state_dict()
    after = cp.models.load(tmp_path / "tuned").network.state_dict()
    moved = {n for n, t in before.items() if n in after and not torch.equal(t, after[n])}
    assert any(name.startswith("encoder.") for name in moved)
    assert not any(name.startswith("embedder.loadings") for name in moved)


@pytest.mark.parametrize("tuned_is", ["better", "a little better"])
def test_auto_takes_what_is_better_beyond_error(halves, monkeypatch, tuned_is):
    """What fine-tuning gains on the cells that stopped it must be more than noise."""
    from cellplm_tl import _annotation

    losses, calls = _annotation._losses, []

    def changed(fitted, codes):
        calls.append(fitted)
        found = losses(fitted, codes)
        if len(calls) < 3:  # that of the head alone, and once more
            return found * 0 + 1.0
        noise = np.where(np.arange(len(found)) % 2, 0.5, -0.5)
        return found * 0 + (0.5 if tuned_is == "better" else 0.97 + noise)

    monkeypatch.setattr(_annotation, "_losses", changed)
    reference, query = halves
    train = cp.train.TrainConfig(steps=2, validate_every=1, learning_rate=1e-5)
    cp.tl.annotate(query, reference, train=train)
    strategy = record(query)["validation"]["strategy"]
    assert strategy["log_loss"]["full"] < strategy["log_loss"]["head"] == 1.0
    assert strategy["chosen"] == ("full" if tuned_is == "better" else "head")


def test_a_loss_that_is_none_leaves_the_input_alone(halves):
    reference, query = halves
    before = query.copy()
    train = cp.train.TrainConfig(strategy="full", steps=50, warmup=1, learning_rate=1e30)
    with pytest.raises(TrainingError):
        cp.tl.annotate(query, reference, train=train)
    assert list(query.obs) == list(before.obs)
    assert not query.uns


def test_settings_of_the_release():
    config = cp.train.TrainConfig.release("annotation")
    assert (config.strategy, config.learning_rate, config.patience) == ("full", 5e-3, 200)
    with pytest.raises(OptionError, match="task"):
        cp.train.TrainConfig.release("imputation")


@pytest.mark.filterwarnings("ignore::cellplm_tl._errors.CellPLMWarning")
def test_a_model_without_a_spectrum(halves, tmp_path):
    """A small network as the release builds it: a gene table, flow attention, a latent."""
    reference, query = halves
    torch.manual_seed(0)
    genes = cp.models.load("mini").genes
    config = CellPLMConfig(
        genes=genes, hidden=32, heads=2, encoder_layers=1, latent_size=16, positions="none",
        components=3, decoder_hidden=8,
    )  # fmt: skip
    model = _weights.Model(CellPLM(config).eval(), "small")
    again = query.copy()
    cp.tl.annotate(query, reference, model=model, unknown=False, save_model=tmp_path / "small")
    assert (query.obs[KEY].astype(str) == query.obs["cell_type"].astype(str)).mean() > 0.7
    cp.tl.annotate(again, model=tmp_path / "small", unknown=False)
    np.testing.assert_allclose(query.obsm[f"{KEY}_proba"], again.obsm[f"{KEY}_proba"], atol=1e-5)


# What is refused


def _unlabelled(reference: ad.AnnData) -> ad.AnnData:
    reference.obs["cell_type"] = reference.obs["cell_type"].where(np.arange(reference.n_obs) > 1)
    return reference


def _one_type(reference: ad.AnnData) -> ad.AnnData:
    return reference[reference.obs["cell_type"] == "B"].copy()


def _other_genes(reference: ad.AnnData) -> ad.AnnData:
    return reference[:, :4].copy()


def _scaled(reference: ad.AnnData) -> ad.AnnData:
    dense = reference.X.toarray()
    reference.X = (dense - dense.mean(0)) / (dense.std(0) + 1)
    return reference


def _with_unknown(reference: ad.AnnData) -> ad.AnnData:
    reference.obs["cell_type"] = reference.obs["cell_type"].astype(str).replace("B", "Unknown")
    return reference


REFUSED = {
    "no label": (_unlabelled, InputError, r"missing for 2 of .*reference\[.*notna\(\)\]"),
    "one type": (_one_type, InputError, "one label only, 'B'"),
    "few genes": (_other_genes, GenesError, "[Tt]he reference|share"),
    "scaled": (_scaled, CountsError, r"The reference: reference\.X has negative values"),
    "Unknown": (_with_unknown, OptionError, "'Unknown'.*unknown=False"),
    "no AnnData": (lambda r: r.X, InputError, "reference must be an AnnData"),
    "no column": (lambda r: ad.AnnData(r.X, var=r.var), SlotError, "labels_key='cell_type'"),
    "none": (lambda _: None, OptionError, "pass a labelled reference"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_references_that_are_refused(halves, case):
    change, error, message = REFUSED[case]
    reference, query = halves
    before = query.copy()
    with pytest.raises(error, match=message):
        cp.tl.annotate(query, change(reference))
    assert list(query.obs) == list(before.obs)
    assert not query.obsm
    assert not query.uns


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"coverage": 1.0}, OptionError, "coverage must be a number between 0 and 1"),
        ({"coverage": "high"}, OptionError, "coverage"),
        ({"unknown": "yes"}, OptionError, "unknown must be True or False"),
        ({"train": "full"}, OptionError, "TrainConfig"),
        ({"reference_layer": "nowhere"}, SlotError, "The reference: layer='nowhere'"),
        ({"key_added": "a/b"}, SlotError, "slash"),
    ],
)
def test_options_that_are_refused(halves, options, error, message):
    reference, query = halves
    with pytest.raises(error, match=re.escape(message)):
        cp.tl.annotate(query, reference, **options)
    assert not query.uns


def test_genes_of_two_data_sets_that_do_not_meet(halves):
    reference, query = halves
    with pytest.raises(GenesError, match="share 0 genes"):
        cp.tl.annotate(query[:, ::2].copy(), reference[:, 1::2].copy())


def test_it_says_what_it_learns(halves, caplog):
    reference, query = halves
    with caplog.at_level(logging.INFO, logger="cellplm_tl"):
        cp.tl.annotate(query, reference)
    assert f"learning 4 types from {reference.n_obs} cells" in caplog.text
