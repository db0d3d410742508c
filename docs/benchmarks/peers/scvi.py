"""SCVI (Lopez et al., 2018) and SCANVI (Xu et al., 2021). Settings: the shared bench/README.md."""

import numpy as np
import scvi

NETWORK = {"n_layers": 2, "n_latent": 30, "gene_likelihood": "nb"}


def _train(model, max_epochs, **options):
    model.train(max_epochs=max_epochs, accelerator="cpu", enable_progress_bar=False, **options)


def denoise(method, input, seed, max_epochs=100):
    scvi.settings.seed = seed
    input.X = input.X.astype(np.float32)
    scvi.model.SCVI.setup_anndata(input)
    model = scvi.model.SCVI(input, **NETWORK)
    _train(model, max_epochs, early_stopping=True)
    fractions = model.get_normalized_expression(input, library_size=1, return_numpy=True)
    depth = np.asarray(input.X.sum(axis=1))
    return {"denoised": (fractions * depth).astype(np.float32)}


def annotate(method, reference, query, seed, max_epochs=100, label_epochs=20, query_epochs=50):
    """SCANVI after SCVI on the reference, and scArches for the query, as a batch of its own."""
    scvi.settings.seed = seed
    shared = reference.var_names[reference.var_names.isin(query.var_names)]
    reference, query = reference[:, shared].copy(), query[:, shared].copy()
    for name, cells in {"reference": reference, "query": query}.items():
        cells.X = cells.X.astype(np.float32)
        cells.obs["origin"] = name
    query.obs["label"] = "Unknown"
    scvi.model.SCVI.setup_anndata(reference, batch_key="origin")
    unlabelled = scvi.model.SCVI(reference, **NETWORK)
    _train(unlabelled, max_epochs, early_stopping=True)
    model = scvi.model.SCANVI.from_scvi_model(
        unlabelled, labels_key="label", unlabeled_category="Unknown"
    )
    _train(model, label_epochs)
    mapped = scvi.model.SCANVI.load_query_data(query, model)
    _train(mapped, query_epochs, plan_kwargs={"weight_decay": 0.0})
    proba = mapped.predict(query, soft=True)
    return {
        "predicted": proba.columns.to_numpy(dtype=str)[proba.to_numpy().argmax(axis=1)],
        "proba": proba.to_numpy(),
        "labels": proba.columns.to_numpy(dtype=str),
    }
