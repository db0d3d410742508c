"""Scores of annotations: against scikit-learn, numpy by hand, and the official code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from cellplm_tl._errors import InputError, OptionError
from cellplm_tl.metrics import annotation
from cellplm_tl.metrics.annotation import expected_error, reliability

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "metrics.npz"
CLASSES = ["B", "Mono", "NK", "T"]  # no cell is a Mono; the type "rare" is no class


@pytest.fixture
def cells():
    """Give labels, predictions and probabilities of 200 cells; neither trivial nor hopeless."""
    rng = np.random.default_rng(0)
    labels = rng.choice(["B", "NK", "T", "rare"], 200, p=[0.5, 0.2, 0.25, 0.05])
    logits = rng.normal(size=(200, 4)) + 1.5 * (labels[:, None] == CLASSES)
    proba = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predicted = np.array(CLASSES, dtype=object)[proba.argmax(axis=1)]
    predicted[proba.max(axis=1) < 0.4] = "Unknown"
    return labels, predicted, pd.DataFrame(proba, columns=CLASSES)


def test_against_scikit_learn(cells):
    labels, predicted, _ = cells
    predicted[predicted == "Mono"] = "B"  # labels of the truth alone, or Unknown
    scores = annotation(labels, predicted)
    assert (predicted == "Unknown").sum() > 10
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    kinds = np.unique(labels)
    for name, function in {
        "macro_precision": sk.precision_score,
        "macro_recall": sk.recall_score,
        "macro_f1": sk.f1_score,
    }.items():
        expected = function(labels, predicted, labels=kinds, average="macro", zero_division=0)
        assert scores[name] == pytest.approx(expected)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert scores["balanced_accuracy"] == pytest.approx(
            sk.balanced_accuracy_score(labels, predicted)
        )


@pytest.mark.parametrize(
    ("over", "labels_counted"),
    [("truth", ["B", "NK", "T", "rare"]), ("either", ["B", "Mono", "NK", "T", "rare"])],
)
def test_macro_scores_by_counting(cells, over, labels_counted):
    labels, predicted, _ = cells
    assert {"Mono", "Unknown"} <= set(predicted)
    precision, recall, f1 = [], [], []
    for kind in labels_counted:
        hits = sum(a == b == kind for a, b in zip(labels, predicted, strict=True))
        called, there = list(predicted).count(kind), list(labels).count(kind)
        precision.append(hits / called if called else 0)
        recall.append(hits / there if there else 0)
        f1.append(2 * hits / (called + there))
    scores = annotation(labels, predicted, over=over)
    assert scores["macro_precision"] == pytest.approx(np.mean(precision))
    assert scores["macro_recall"] == pytest.approx(np.mean(recall))
    assert scores["macro_f1"] == pytest.approx(np.mean(f1))
    of_truth = [r for r, kind in zip(recall, labels_counted, strict=True) if kind != "Mono"]
    assert scores["balanced_accuracy"] == pytest.approx(np.mean(of_truth))


def test_the_official_code_gives_the_same():
    golden = np.load(GOLDEN)
    scores = annotation(golden["ann_true"], golden["ann_pred"], over="either")
    assert scores["macro_precision"] == pytest.approx(float(golden["ann_precision"]))
    assert scores["macro_recall"] == pytest.approx(float(golden["ann_recall"]))
    assert scores["macro_f1"] == pytest.approx(float(golden["ann_f1_score"]))
    assert scores["macro_recall"] == pytest.approx(float(golden["ann_acc"]))  # not an accuracy
    assert scores["accuracy"] == (golden["ann_true"] == golden["ann_pred"]).mean()
    assert scores["accuracy"] - float(golden["ann_acc"]) > 0.05
    # one label is predicted and never true: it counts there, and not in our default
    assert scores["balanced_accuracy"] == pytest.approx(float(golden["ann_recall"]) * 6 / 5)


def test_unknown_cells_are_wrong_and_told():
    labels = ["B", "B", "T", "T"]
    scores = annotation(labels, ["B", "Unknown", "Unknown", "B"])
    assert scores["accuracy"] == 0.25
    assert scores["unknown_share"] == 0.5
    assert scores["accuracy_called"] == 0.5
    assert scores["macro_precision"] == 0.25  # B: 1 of 2, T: never called; Unknown is no label
    other = annotation(labels, ["B", "?", "?", "B"], unknown="?", over="either")
    assert other == scores
    assert annotation(labels, ["B", "?", "?", "B"], over="either")["macro_f1"] < scores["macro_f1"]
    nobody = annotation(labels, ["Unknown"] * 4)
    assert np.isnan(nobody["accuracy_called"])
    assert nobody["macro_f1"] == 0
    open_set = annotation(["B", "Unknown"], ["B", "Unknown"])  # meant to be unknown: right
    assert open_set["accuracy"] == open_set["macro_f1"] == 1


def test_ece_by_loops(cells):
    labels, predicted, proba = cells
    values = proba.to_numpy()
    gaps = 0.0
    for b in range(15):
        rows = [i for i in range(200) if b / 15 < values[i].max() <= (b + 1) / 15]
        if rows:
            right = np.mean([CLASSES[values[i].argmax()] == labels[i] for i in rows])
            gaps += len(rows) / 200 * abs(right - np.mean([values[i].max() for i in rows]))
    assert 0.02 < gaps < 0.4
    assert annotation(labels, predicted, proba)["ece"] == pytest.approx(gaps)
    assert expected_error(reliability(labels, proba)) == pytest.approx(gaps)
    assert annotation(labels, ["Unknown"] * 200, proba)["ece"] == pytest.approx(gaps)


def test_an_edge_belongs_to_the_bin_below():
    low, high = np.nextafter(1 / 3, 0), np.nextafter(1 / 3, 1)  # 1/3 is the edge of 5 bins
    proba = np.array([[low], [1 / 3], [high], [0.0], [1.0]])
    table = reliability(["B"] * 5, proba, classes=["B"])
    assert table["n_cells"].tolist() == [1, 2, 1, 1]
    assert table["confidence"].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1])


def test_reliability_by_hand():
    proba = pd.DataFrame({"B": [0.91, 0.93, 0.30], "T": [0.09, 0.07, 0.70]})
    table = reliability(["B", "T", "T"], proba)
    assert table.columns.tolist() == ["confidence", "accuracy", "n_cells"]
    assert table.to_numpy() == pytest.approx(np.array([[0.70, 1, 1], [0.92, 0.5, 2]]))
    assert expected_error(table) == pytest.approx((0.3 + 2 * 0.42) / 3)


def test_brier_and_log_loss_against_scikit_learn(cells):
    labels, predicted, proba = cells
    known = labels != "rare"
    scores = annotation(labels[known], predicted[known], proba[known])
    expected = sk.log_loss(labels[known], proba[known], labels=CLASSES)
    assert scores["log_loss"] == pytest.approx(expected)
    expected = sk.brier_score_loss(labels[known], proba[known], labels=CLASSES)
    assert scores["brier"] == pytest.approx(expected)


def test_a_label_that_no_probability_was_given_to():
    scores = annotation(["rare"], ["B"], pd.DataFrame({"B": [0.5], "T": [0.5]}))
    assert scores["brier"] == 0.25 + 0.25 + 1
    assert scores["log_loss"] == pytest.approx(-np.log(2**-52))
    assert scores["ece"] == 0.5


def test_forms_of_the_input_do_not_matter(cells):
    labels, predicted, proba = cells
    expected = annotation(labels, predicted, proba)
    obs = pd.DataFrame(
        {"type": pd.Categorical(labels), "found": pd.Categorical(predicted)},
        index=np.random.default_rng(1).permutation(200).astype(str),
    )
    assert annotation(obs["type"], obs["found"], proba) == expected
    assert annotation(list(labels), list(predicted), proba.to_numpy(), classes=CLASSES) == expected
    reordered = proba[CLASSES[::-1]]
    assert annotation(labels, predicted, reordered) == pytest.approx(expected)
    single = annotation(labels, predicted, proba.astype(np.float32))
    assert single == pytest.approx(expected, rel=1e-5)
    assert all(type(score) is float for score in expected.values())


def test_without_probabilities_nothing_is_said_of_them(cells):
    scores = annotation(*cells[:2])
    assert not {"ece", "brier", "log_loss"} & set(scores)


def test_a_softmax_may_pass_one_by_rounding():
    proba = np.array([[1 + 2**-23, 0]], dtype=np.float32)
    assert annotation(["B"], ["B"], proba, classes=["B", "T"])["ece"] == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": []}, InputError, "labels must have one entry for each of one or more cells"),
        ({"labels": [["B", "T"]]}, InputError, "got shape \\(1, 2\\)"),
        ({"labels": ["B", None]}, InputError, "labels must be known of every cell; 1 of 2"),
        ({"labels": ["B", np.nan]}, InputError, "labels must be known of every cell; 1 of 2"),
        ({"predicted": ["B"]}, InputError, "predicted must have one entry for each of the 2 cells"),
        ({"predicted": [None, "B"]}, InputError, "predicted must be known of every cell"),
        ({"proba": np.ones((3, 2))}, InputError, r"here \(2, 2\); got float64 of shape \(3, 2\)"),
        ({"proba": np.full((2, 2), "a")}, InputError, "proba must be numbers"),
        ({"proba": [[0, 1], [0, 1.1]]}, InputError, "1 of 2 cells do not, the first in row 1"),
        ({"proba": [[0, np.nan], [0, 1]]}, InputError, "the first in row 0"),
        ({"classes": ["B", "B"]}, InputError, "classes must be different; got B, B"),
        ({"classes": None}, OptionError, "classes must name the columns of proba"),
        ({"proba": None}, OptionError, "classes name the columns of proba, which was not given"),
        ({"over": "both"}, OptionError, "over must be one of 'truth', 'either'; got 'both'"),
    ],
)
def test_inputs_that_do_not_fit(change, error, message):
    arguments = {
        "labels": ["B", "T"],
        "predicted": ["B", "T"],
        "proba": [[0.9, 0.1], [0.2, 0.8]],
        "classes": ["B", "T"],
    }
    with pytest.raises(error, match=message):
        annotation(**(arguments | change))
