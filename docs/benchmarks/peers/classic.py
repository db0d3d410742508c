"""The simple methods: scikit-learn on log-normalised counts, set as the stored figures were."""

import numpy as np
import scanpy as sc
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.svm import LinearSVC

TARGET_SUM = 1e4
N_GENES = 3_000  # highly variable ones of the reference
N_COMPONENTS = 50
CLIP = 10  # standard deviations

CLASSIFIERS = {
    "logreg": lambda: LogisticRegression(C=1.0, max_iter=1_000),
    "logreg_genes": lambda: LogisticRegression(C=0.01, max_iter=1_000),
    "svm": lambda: LinearSVC(C=0.001),
    "knn": lambda: KNeighborsClassifier(15),
}
ON_COMPONENTS = {"logreg", "knn"}


def annotate(method, reference, query, seed):
    known, asked = _standardised(reference, query)
    if method in ON_COMPONENTS:
        pca = PCA(min(N_COMPONENTS, *known.shape), random_state=seed).fit(known)
        known, asked = pca.transform(known), pca.transform(asked)
    classifier = CLASSIFIERS[method]().fit(known, reference.obs["label"].to_numpy(dtype=str))
    arrays = {"predicted": classifier.predict(asked)}
    if method != "svm":  # it has no probabilities
        arrays |= {"proba": classifier.predict_proba(asked), "labels": classifier.classes_}
    return arrays


def _standardised(reference, query):
    """Return both as (cells, genes); genes, means and spreads are of the reference alone."""
    shared = reference.var_names[reference.var_names.isin(query.var_names)]
    reference, query = reference[:, shared].copy(), query[:, shared].copy()
    for cells in (reference, query):
        cells.X = cells.X.astype(np.float32)
        sc.pp.normalize_total(cells, target_sum=TARGET_SUM)
        sc.pp.log1p(cells)
    if len(shared) > N_GENES:
        sc.pp.highly_variable_genes(reference, n_top_genes=N_GENES)
        chosen = reference.var["highly_variable"].to_numpy()
        reference, query = reference[:, chosen], query[:, chosen]
    known, asked = reference.X.toarray(), query.X.toarray()
    mean, spread = known.mean(axis=0), known.std(axis=0)
    spread[spread < 1e-6] = 1  # a gene that the reference does not tell cells apart by
    return tuple(np.clip((cells - mean) / spread, -CLIP, CLIP) for cells in (known, asked))


def denoise(method, input, seed):
    depth = np.asarray(input.X.sum(axis=1))  # (cells, 1)
    fractions = input.X.toarray() / depth
    if method == "nothing":
        return {"denoised": input.X.toarray().astype(np.float32)}
    if method == "gene_mean":
        return _counts(np.broadcast_to(fractions.mean(axis=0), fractions.shape), depth)
    lognorm = np.log1p(TARGET_SUM * fractions)
    if method == "nonzero_gene_mean":
        n_seen = np.maximum((lognorm > 0).sum(axis=0), 1)
        constant = (lognorm.sum(axis=0) / n_seen).astype(np.float32)
        return {"lognorm": np.broadcast_to(constant, lognorm.shape)}
    svd = TruncatedSVD(N_COMPONENTS, random_state=seed)
    points = svd.fit_transform(lognorm)
    if method == "svd":
        rebuilt = np.maximum(points @ svd.components_, 0)
        return _counts(np.expm1(rebuilt) / TARGET_SUM, depth)
    # knn: the mean of 31 others
    neighbors = NearestNeighbors(n_neighbors=31).fit(points).kneighbors(return_distance=False)
    return _counts(np.stack([fractions[rows].mean(axis=0) for rows in neighbors]), depth)


def _counts(fractions, depth):
    """Return expected counts at each cell's own depth."""
    total = fractions.sum(axis=1, keepdims=True)
    return {"denoised": (fractions / total * depth).astype(np.float32)}
