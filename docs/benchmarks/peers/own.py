"""This package, and `linear_transfer`: logistic regression on a linear model of the pool.

In a process of its own like the others, so that seconds and memory are measured alike.
"""

import warnings

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cellplm_tl as cp
from cellplm_tl._anndata import read_cells

KEY = "cellplm_annotation"
RESIDUAL_COMPONENTS = 100
PENALTIES = (0.003, 0.01, 0.03, 0.1)  # C, by 3-fold log loss


def annotate(method, reference, query, seed, **options):
    if method == "cellplm":
        return _annotate(reference, query, seed, **options)
    return _annotate_linearly(reference, query, seed)


def _annotate(reference, query, seed, model, strategy, batch_key=None):
    """Give what `cp.tl.annotate` writes; "Unknown" stands in `called` alone."""
    cp.settings.verbosity = 0
    warnings.filterwarnings("ignore", category=cp.CellPLMWarning)
    cp.tl.annotate(
        query,
        reference,
        labels_key="label",
        model=model,
        batch_key=batch_key,
        train=cp.train.TrainConfig(strategy=strategy),
        random_state=seed,
    )
    proba = query.obsm[f"{KEY}_proba"]
    labels = proba.columns.to_numpy(dtype=str)
    return {
        "predicted": labels[proba.to_numpy().argmax(axis=1)],
        "called": query.obs[KEY].to_numpy(dtype=str),
        "proba": proba.to_numpy(),
        "labels": labels,
        "unknown_score": query.obs[f"{KEY}_unknown_score"].to_numpy(),
    }


def _annotate_linearly(reference, query, seed):
    shared = reference.var_names[reference.var_names.isin(query.var_names)]
    known, rest_known = _factors_and_residual(reference[:, shared].copy())
    asked, rest_asked = _factors_and_residual(query[:, shared].copy())
    pca = PCA(min(RESIDUAL_COMPONENTS, *rest_known.shape), random_state=seed).fit(rest_known)
    known = np.hstack([known, pca.transform(rest_known)])
    asked = np.hstack([asked, pca.transform(rest_asked)])
    search = GridSearchCV(
        make_pipeline(
            StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1_000)
        ),
        {"logisticregression__C": PENALTIES},
        scoring="neg_log_loss",
        cv=3,
    )
    search.fit(known, reference.obs["label"].to_numpy(dtype=str))
    return {
        "predicted": search.predict(asked),
        "proba": search.predict_proba(asked),
        "labels": search.classes_,
    }


def _factors_and_residual(adata):
    """Return the factors of the pool's spectrum, and what they leave: both (cells, …)."""
    model = cp.models.load("linear_transfer")
    embedder, noise = model.network.embedder, model.config.noise
    cells = read_cells(adata, model.genes)
    block = cells.counts(np.arange(cells.n_cells))
    counts = np.zeros((cells.n_cells, len(cells.genes)))
    for i in range(cells.n_cells):
        entries = slice(block.offsets[i], block.offsets[i + 1])
        counts[i, block.columns[entries]] = block.values[entries]
    loadings, scale = (
        tensor.double().numpy()[cells.gene_index] for tensor in (embedder.loadings, embedder.scale)
    )
    y = np.log1p(1e4 * counts / np.maximum(block.library_size, 1)[:, None])
    x = np.clip((y - y.mean(axis=0)) / scale, -5, 10)  # all cells are one context
    precision = loadings.T @ loadings / noise + np.diag(1 / embedder.eigenvalues.double().numpy())
    factors = np.linalg.solve(precision, loadings.T @ x.T / noise).T
    return factors, x - factors @ loadings.T
