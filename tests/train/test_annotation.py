"""Heads for cell types, against formulas written out and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.naive_bayes import MultinomialNB

from cellplm_tl.models import CellPLMConfig, Counts
from cellplm_tl.models.decoder import TypeHead
from cellplm_tl.train import annotation as train_annotation
from cellplm_tl.train.annotation import (
    HeldOut,
    View,
    compare,
    conformal_quantile,
    fit_head,
    fit_linear,
    fit_profiles,
    make_folds,
    set_sizes,
    set_thresholds,
    validation_record,
)

N_LATENT = 4


@pytest.fixture
def blobs():
    """Give two views of cells of three types: 6 features, counts of 12 genes."""
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], [60, 50, 40])
    centres = rng.normal(0, 1.2, (3, 6))
    profiles = rng.dirichlet(np.full(12, 2.0), 3)
    views = []
    for depth in (60, 12):
        features = centres[codes] + rng.normal(0, 1, (150, 6))
        counts = np.stack([rng.multinomial(depth, profiles[code]) for code in codes])
        views.append(View(features.astype(np.float32), sp.csr_matrix(counts.astype(np.float32))))
    return views, codes


def test_the_linear_map_is_scikit_learns(blobs):
    views, codes = blobs
    features = views[0].features
    linear = fit_linear(features, codes, 3, 0.5)
    standard = (features - features.mean(0)) / (features.std(0) + 1e-6)
    model = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(standard, codes)
    proba = np.exp(log_softmax(linear(features), axis=1))
    np.testing.assert_allclose(proba, model.predict_proba(standard), atol=0.01)


@pytest.mark.parametrize("present", [[0], [0, 2]])
def test_types_that_no_cell_has_get_no_probability(blobs, present):
    views, codes = blobs
    rows = np.isin(codes, present)
    linear = fit_linear(views[0].features[rows], codes[rows], 3, 0.1)
    proba = np.exp(log_softmax(linear(views[0].features[rows]), axis=1))
    assert proba[:, [c for c in range(3) if c not in present]].max() < 1e-6
    if len(present) == 2:
        assert (proba.argmax(1) == codes[rows]).mean() > 0.8


def test_profiles_are_those_of_naive_bayes(blobs):
    views, codes = blobs
    counts = views[0].counts  # every cell has 60 counts, so that all smooth alike
    log_profiles = fit_profiles(counts, codes, 3)
    dense = counts.toarray()
    summed = np.stack([dense[codes == code].sum(0) for code in range(3)])
    smoothing = 0.1 * summed.sum(1).mean() * (dense / 60).mean(0)
    bayes = MultinomialNB(alpha=smoothing, fit_prior=False).fit(dense, codes)
    np.testing.assert_allclose(log_profiles.T, bayes.feature_log_prob_, rtol=1e-6)
    np.testing.assert_allclose(np.exp(log_profiles).sum(0), 1, rtol=1e-9)


def test_folds_hold_out_batches_where_types_are_shared():
    codes = np.tile([0, 1, 2], 20)
    batches = np.repeat(["a", "b", "c"], 20)
    folds, unit = make_folds(codes, batches, np.random.default_rng(0))
    assert unit == "batch"
    assert len(folds) == 3
    for train, test in folds:
        assert not set(batches[train]) & set(batches[test])


@pytest.mark.parametrize("batches", [None, np.array(["a", "b", "c"])[np.tile([0, 1, 2], 20)]])
def test_folds_hold_out_cells_elsewhere(batches):
    """Without batches, or where each batch is a sorted fraction: its type is in no other."""
    codes = np.tile([0, 1, 2], 20)
    folds, unit = make_folds(codes, batches, np.random.default_rng(0))
    assert unit == "cell"
    np.testing.assert_array_equal(np.sort(np.concatenate([t for _, t in folds])), np.arange(60))
    assert all(not set(train) & set(test) for train, test in folds)


def test_folds_of_types_with_one_or_two_cells():
    codes = np.array([0, 1, 1, 2])
    folds, _ = make_folds(codes, None, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(np.concatenate([t for _, t in folds])), np.arange(4))


def test_the_gradient_of_the_weights(blobs):
    rng = np.random.default_rng(1)
    read, counted = rng.normal(size=(2, 2, 30, 3))
    depth, codes = rng.normal(size=(2, 30)), rng.integers(3, size=30)
    fitted = train_annotation._fit_weights(read, counted, depth, codes)

    def loss(weights):
        log_p = train_annotation._combine(weights, read, counted, depth)
        slopes = 1e-3 * (weights[1] ** 2 + weights[3] ** 2)
        return -log_p[:, np.arange(30), codes].mean() + slopes

    for number in range(4):
        for step in (-0.05, 0.05):
            moved = fitted + step * np.eye(4)[number]
            if moved[2] > -12 and moved[0] > -5:
                assert loss(moved) >= loss(fitted) - 1e-6


def test_a_head_and_its_calibration(blobs):
    """The network's head says what the fit says, and its probabilities are right as often."""
    views, codes = blobs
    folds, _ = make_folds(codes, None, np.random.default_rng(0))
    fitted = fit_head(views, codes, N_LATENT, folds)
    np.testing.assert_array_equal(np.sort(fitted.held_out.rows), np.arange(150))
    proba = np.exp(fitted.held_out.log_p)
    truth = codes[fitted.held_out.rows]
    np.testing.assert_allclose(proba.sum(2), 1, rtol=1e-6)
    assert abs(proba.max(2).mean() - (proba.argmax(2) == truth).mean()) < 0.05
    assert abs(fitted.held_out.unknown.mean()) < 1e-6

    config = CellPLMConfig(
        genes=tuple(f"ENSG{i:011d}" for i in range(12)),
        hidden=N_LATENT, heads=1, encoder="none", latent="none", latent_size=N_LATENT,
        embedder="spectrum", factors=N_LATENT, positions="none", decoder="none",
        norm="layernorm", head="types", head_outputs=3, residual_inputs=2,
    )  # fmt: skip
    head = TypeHead(config)
    tensors = {name: torch.from_numpy(np.asarray(a)).float() for name, a in fitted.arrays.items()}
    head.load_state_dict(head.state_dict() | tensors)
    a = {name: np.asarray(array, float) for name, array in fitted.arrays.items()}
    dense, features = views[1].counts.toarray().astype(float), views[1].features.astype(float)
    read = log_softmax(features @ a["linear.weight"].T + a["linear.bias"], axis=1)
    counted = log_softmax(dense @ a["log_profiles"], axis=1)
    d = np.clip(np.log(12), a["depth"][1], a["depth"][2]) - a["depth"][0]
    w = a["weights"]
    expected = log_softmax(
        np.exp(w[0] + w[1] * d) * read + np.exp(w[2] + w[3] * d) * counted, axis=1
    )
    block = views[1].counts
    counts = Counts(*map(torch.from_numpy, (block.data, block.indices, block.indptr)),
                    torch.full((150,), 12.0))  # fmt: skip
    x = torch.from_numpy(views[1].features)
    with torch.no_grad():
        log_p = head(x, head.likelihood(counts, torch.arange(12)), counts.library_size)
        score = head.unknown_score(x, log_p)
    np.testing.assert_allclose(log_p.numpy(), expected, atol=1e-3)
    assert (log_p.argmax(1).numpy() == codes).mean() > 0.8
    far = torch.full((1, 6), 30.0)
    with torch.no_grad():
        of_far = head.unknown_score(far, head(far, torch.zeros(1, 3), torch.tensor([12.0])))
    assert of_far > np.quantile(score.numpy(), 0.9)


def test_likelihood_is_over_the_measured_genes(blobs):
    """Profiles of a part of the genes sum to one again."""
    config = CellPLMConfig(
        genes=tuple(f"ENSG{i:011d}" for i in range(12)), latent_size=2, head="types", head_outputs=2
    )
    head = TypeHead(config)
    profiles = np.random.default_rng(0).dirichlet(np.ones(12), 2)
    head.log_profiles.copy_(torch.from_numpy(np.log(profiles.T)))
    counts = Counts(torch.tensor([2.0, 1.0]), torch.tensor([0, 2]), torch.tensor([0, 2, 2]),
                    torch.tensor([3.0, 0.0]))  # fmt: skip
    measured = [1, 5, 7]
    part = np.log(profiles[:, measured] / profiles[:, measured].sum(1, keepdims=True))
    expected = [2 * part[:, 0] + part[:, 2], [0, 0]]
    found = head.likelihood(counts, torch.tensor(measured))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    log_p = head(torch.ones(2, 2), found, counts.library_size)
    np.testing.assert_allclose(log_p[1].exp().detach().numpy(), [0.5, 0.5])  # the prior


def test_conformal_quantiles_keep_their_promise():
    scores = np.arange(1.0, 10.0)
    assert conformal_quantile(scores, 0.9) == 9.0  # ceil(10 * 0.9) = 9th of 9
    assert conformal_quantile(scores[:8], 0.9) == np.inf
    rng = np.random.default_rng(0)
    covered = [rng.normal() <= conformal_quantile(rng.normal(size=60), 0.8) for _ in range(3000)]
    assert 0.79 < np.mean(covered) < 0.84  # 49 / 61 = 0.803


def test_prediction_sets_by_type():
    """Types with cells enough have a threshold of their own; the likeliest is always in the set."""
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], [200, 5])
    p = np.clip(rng.normal(0.8, 0.1, 205), 0.05, 0.95)
    log_p = np.log(np.where(codes[:, None] == [0, 1], p[:, None], 1 - p[:, None]))[None]
    held_out = HeldOut(np.arange(205), log_p, np.zeros((1, 205)))
    thresholds = set_thresholds(held_out, codes, 0.9)
    assert (p[codes == 0] >= thresholds[0]).mean() >= 0.9
    assert thresholds[1] == pytest.approx(1 - np.sort(1 - p)[int(np.ceil(206 * 0.9)) - 1])
    sizes = set_sizes(np.array([[0.5, 0.5], [0.9, 0.1], [0.3, 0.2]]), np.array([0.45, 0.45]))
    np.testing.assert_array_equal(sizes, [2, 1, 1])


def test_the_record_of_the_validation():
    codes = np.array([0, 0, 1, 1, 2])
    proba = np.array([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1], [0.2, 0.7, 0.1]])
    held_out = HeldOut(np.array([0, 1, 2, 3]), np.log(proba)[None], np.array([[0, 1, 2, 3.0]]))
    record = validation_record(
        held_out, codes, ["a/b", "c", "d"], set_threshold=np.full(3, 0.5), unknown_threshold=2.5
    )
    assert record["accuracy"] == 0.75
    assert record["macro_f1"] == pytest.approx(
        f1_score([0, 0, 1, 1], [0, 1, 1, 1], average="macro")
    )
    assert record["false_alarms"] == 0.25
    assert record["set_coverage"] == 0.75
    np.testing.assert_array_equal(record["confusion"].loc["a/b"], [1, 1, 0])
    assert list(record["reliability"].columns) == ["confidence", "accuracy", "n_cells"]
    assert list(record["types"]["n_cells"]) == [2, 2, 0]


def test_comparing_with_a_baseline():
    truth = np.tile([0, 1], 100)
    f1, ahead = compare(truth, np.zeros(200, int), truth, np.random.default_rng(0))
    assert (f1, ahead) == (1.0, 1.0)
    f1, ahead = compare(truth, truth, 1 - truth, np.random.default_rng(0))
    assert (f1, ahead) == (0.0, 0.0)
    guess = np.random.default_rng(1).integers(2, size=200)
    f1, _ = compare(truth, truth, guess, np.random.default_rng(0))
    assert f1 == pytest.approx(f1_score(truth, guess, average="macro"))
