"""Scores of a representation, against loops written from their definitions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from cellplm_tl._errors import InputError, OptionError
from cellplm_tl.metrics import clustering
from cellplm_tl.metrics.clustering import predict_from_neighbors


@pytest.fixture
def blobs():
    """Three cell types 30 apart, 50 cells each, shuffled; and batches that mean nothing."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(["B", "NK", "T"], 50))
    centre = {"B": [0, 0, 0, 0], "NK": [30, 0, 0, 0], "T": [0, 30, 0, 0]}
    representation = rng.normal(size=(150, 4)) + [centre[label] for label in labels]
    return representation, labels, rng.choice(["x", "y"], 150)


@pytest.fixture
def overlapping():
    """Types and batches that overlap, of uneven size, with a label of 4 cells."""
    rng = np.random.default_rng(1)
    labels = np.repeat(["B", "NK", "T", "rare"], [40, 25, 31, 4])
    batches = rng.choice(["x", "y", "z"], 100, p=[0.6, 0.3, 0.1])
    representation = rng.normal(size=(100, 3))
    representation[:, 0] += 2.0 * (labels == "T")
    representation[:, 1] += 1.5 * (batches == "y")
    return representation, labels, batches


def distances(points):
    return np.sqrt(((points[:, None] - points[None]) ** 2).sum(axis=2))


def test_types_that_lie_apart_score_one(blobs):
    representation, labels, batches = blobs
    scores = clustering(representation, labels, batches, resolution=0.1)
    assert scores["ari"] == scores["nmi"] == 1
    assert scores["knn_accuracy"] == scores["knn_macro_f1"] == 1
    assert scores["silhouette_label"] > 0.9
    assert scores["batch_mixing"] > 0.9


def test_labels_without_meaning_score_like_chance(blobs):
    representation, labels, _ = blobs
    scores = clustering(representation, np.random.default_rng(2).permutation(labels))
    assert abs(scores["ari"]) < 0.05
    assert scores["knn_accuracy"] < 0.5
    assert scores["silhouette_label"] == pytest.approx(0.5, abs=0.05)


def test_ari_by_pairs_of_cells(blobs):
    # Two types merged under one label: Leiden finds three clusters, and pairs can be counted.
    representation, labels, _ = blobs
    merged = np.where(labels == "NK", "B", labels)
    n_pairs = 150 * 149 / 2
    in_one_cluster = 3 * 50 * 49 / 2  # all of them within one merged label as well
    in_one_label = 100 * 99 / 2 + 50 * 49 / 2
    expected = in_one_cluster * in_one_label / n_pairs
    ari = (in_one_cluster - expected) / ((in_one_cluster + in_one_label) / 2 - expected)
    assert clustering(representation, merged, resolution=0.1)["ari"] == pytest.approx(ari)


def test_nmi_by_entropies(blobs):
    representation, labels, _ = blobs
    merged = np.where(labels == "NK", "B", labels)
    of_clusters = np.log(3)
    of_labels = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))  # what both know, too
    nmi = of_labels / ((of_clusters + of_labels) / 2)
    assert clustering(representation, merged, resolution=0.1)["nmi"] == pytest.approx(nmi)


def test_silhouette_by_loops(overlapping):
    representation, labels, _ = overlapping
    far = distances(representation)
    values = []
    for i, label in enumerate(labels):
        others = [j for j in range(100) if labels[j] == label and j != i]
        a = far[i, others].mean()
        b = min(far[i, labels == other].mean() for other in set(labels) - {label})
        values.append((b - a) / max(a, b))
    score = clustering(representation, labels)["silhouette_label"]
    assert score == pytest.approx((np.mean(values) + 1) / 2)


def test_silhouette_draws_cells_where_there_are_many():
    rng = np.random.default_rng(3)
    labels = rng.choice(["B", "T"], 3_200)
    representation = rng.normal(size=(3_200, 2)) + 3.0 * (labels == "T")[:, None]
    scores = [clustering(representation, labels, random_state=seed) for seed in (0, 0, 1)]
    assert scores[0]["silhouette_label"] == scores[1]["silhouette_label"]
    assert scores[0]["silhouette_label"] != scores[2]["silhouette_label"]
    assert scores[0]["silhouette_label"] == pytest.approx(scores[2]["silhouette_label"], abs=0.01)


def test_batch_mixing_by_loops(overlapping):
    representation, labels, batches = overlapping
    far = distances(representation)
    ratios = []
    for i in range(100):
        nearest = sorted((j for j in range(100) if j != i), key=lambda j: far[i, j])[:30]
        found = sum(batches[j] != batches[i] for j in nearest) / 30
        peers = [j for j in range(100) if j != i and labels[j] == labels[i]]
        chance = sum(batches[j] != batches[i] for j in peers) / len(peers)
        if chance > 0:
            ratios.append(min(found / chance, 1))
    score = clustering(representation, labels, batches)["batch_mixing"]
    assert score == pytest.approx(np.mean(ratios))


def test_batches_that_lie_apart_do_not_mix(blobs):
    representation, labels, batches = blobs
    apart = representation + 100.0 * (batches == "y")[:, None]
    # fewer than 31 cells in a corner: some neighbours must come from the other batch's corner
    assert clustering(apart, labels, batches)["batch_mixing"] < 0.3
    assert np.isnan(clustering(apart, labels, np.full(150, "x"))["batch_mixing"])
    assert "batch_mixing" not in clustering(apart, labels)


def test_neighbors_vote_among_the_other_folds(overlapping):
    from sklearn.model_selection import StratifiedKFold

    representation, labels, _ = overlapping
    predicted, is_scored = predict_from_neighbors(representation, labels, n_neighbors=5)
    assert is_scored.tolist() == (labels != "rare").tolist()
    assert set(predicted[~is_scored]) == {""}

    points, names = representation[is_scored], labels[is_scored]
    far = distances(points)
    expected = np.empty_like(names)
    folds = StratifiedKFold(5, shuffle=True, random_state=0).split(points, names)
    for known, asked in folds:
        for i in asked:
            votes = Counter(names[sorted(known, key=lambda j: far[i, j])[:5]])
            expected[i] = max(sorted(votes), key=votes.__getitem__)  # a draw: the first by name
    assert predicted[is_scored].tolist() == expected.tolist()


def test_accuracy_and_macro_f1_of_the_predictions(overlapping):
    representation, labels, _ = overlapping
    predicted, is_scored = predict_from_neighbors(representation, labels)
    truth, guess = labels[is_scored], predicted[is_scored]
    f1 = []
    for label in ("B", "NK", "T"):
        hits = ((truth == label) & (guess == label)).sum()
        f1.append(2 * hits / ((truth == label).sum() + (guess == label).sum()))
    scores = clustering(representation, labels)
    assert scores["knn_accuracy"] == pytest.approx((truth == guess).mean())
    assert scores["knn_macro_f1"] == pytest.approx(np.mean(f1))
    assert 0.3 < scores["knn_accuracy"] < 0.95  # neither trivial nor hopeless


def test_leiden_seeds_give_mean_and_spread(overlapping):
    representation, labels, _ = overlapping
    single = [clustering(representation, labels, leiden_seeds=[seed]) for seed in range(6)]
    together = clustering(representation, labels, leiden_seeds=range(6))
    for name in ("ari", "nmi"):
        values = [scores[name] for scores in single]
        assert together[name] == pytest.approx(np.mean(values))
        assert together[f"{name}_sd"] == pytest.approx(np.std(values, ddof=1))
        assert f"{name}_sd" not in single[0]
    assert together["ari_sd"] > 0
    assert together["knn_accuracy"] == single[0]["knn_accuracy"]
    assert clustering(representation, labels) == single[0]


def test_same_seed_same_scores_and_no_global_generator(overlapping):
    before = np.random.get_state()[1].tolist()  # noqa: NPY002  (the global one is what is asked)
    first = clustering(*overlapping, random_state=3)
    assert first == clustering(*overlapping, random_state=3)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert all(type(score) is float for score in first.values())


def test_forms_of_the_input_do_not_matter(overlapping):
    representation, labels, batches = overlapping
    frame = pd.DataFrame({"type": pd.Categorical(labels), "batch": batches})
    points = np.asfortranarray(representation)
    points.flags.writeable = False
    assert clustering(points, frame["type"], frame["batch"].tolist()) == clustering(*overlapping)
    numbers = pd.Series(labels).map({"B": 0, "NK": 1, "T": 2, "rare": 3})  # integers as labels
    assert clustering(representation, numbers, batches) == pytest.approx(clustering(*overlapping))


def test_a_single_label_leaves_scores_undefined(blobs):
    representation, _, _ = blobs
    scores = clustering(representation, np.full(150, "B"))
    for name in ("knn_accuracy", "knn_macro_f1", "silhouette_label"):
        assert np.isnan(scores[name])


def test_labels_of_few_cells_have_no_classifier(overlapping):
    representation, labels, _ = overlapping
    rows = [0, 1, 2, 3, 60, 61, 62, 98, 99]
    scores = clustering(representation[rows], labels[rows])
    assert np.isnan(scores["knn_accuracy"])
    assert 0 < scores["silhouette_label"] < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"representation": np.ones(150)},
            "got float64 of shape \\(150,\\)",
        ),
        ({"representation": np.full((150, 2), "a")}, "representation must be numbers"),
        ({"representation": np.ones((2, 2))}, "3 cells or more; got 2"),
        ({"labels": np.ones(149)}, "one entry for each of the 150 cells of representation"),
        ({"labels": np.ones((150, 1))}, "labels must have one entry"),
        ({"labels": [None] * 2 + ["B"] * 148}, "labels must be known of every cell; 2 of 150"),
        ({"batches": ["x"]}, "batches must have one entry"),
    ],
)
def test_inputs_that_do_not_fit(blobs, change, message):
    representation, labels, batches = blobs
    arguments = {"representation": representation, "labels": labels, "batches": batches} | change
    with pytest.raises(InputError, match=message):
        clustering(**arguments)


def test_values_that_are_not_finite_are_named_by_row(blobs):
    representation, labels, _ = blobs
    representation[[7, 20], 1] = np.nan, np.inf
    with pytest.raises(InputError, match="2 of 150 cells are not, the first in row 7"):
        clustering(representation, labels)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"n_neighbors": 1}, "n_neighbors must be 2 or more; got 1"),
        ({"resolution": 0}, "resolution must be above 0; got 0"),
        ({"leiden_seeds": []}, "leiden_seeds must hold one seed or more"),
    ],
)
def test_options_out_of_range(blobs, option, message):
    with pytest.raises(OptionError, match=message):
        clustering(blobs[0], blobs[1], **option)
