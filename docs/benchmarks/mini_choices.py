"""Choices behind `mini`: short runs of its pretraining with one thing changed.

    ./dev bench mini_choices

Each run is scripts/mini.toml for fewer steps at a higher learning rate, with one change, one seed.
Two measures on the sets that this training holds out: the likelihood of hidden counts (binomial
halves, nats per count above the context's mean), and the accuracy of 15 nearest neighbours (5-fold)
on the latent of the labelled ones, beside that on the factors it starts from. Reads the pool of
../shared; writes mini_choices.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

import cellplm_tl as cp
from cellplm_tl._anndata import Cells, read_file
from cellplm_tl._inference import encode
from cellplm_tl.models import CellPLM
from cellplm_tl.train.fit import fit
from cellplm_tl.train.pretrain import (
    PretrainConfig,
    _sources,
    bound,
    build,
    place_components,
    validation_loss,
)

HERE = Path(__file__).parent
LABELLED = (
    "nsclc_immune_zilionis2019",
    "fetal_cortex_camp2015",
    "cell_lines_pollen2014",
    "pancreas_celseq_grun_muraro_panc8",
)
UNTRAINED = "no training: the factors, read back through the spectrum"
PACKAGED = "the model in the package, trained to the end"
CHANGES = {
    UNTRAINED: {},
    PACKAGED: {},
    "as shipped": {},
    "KL terms at weight 1": {"kl_weight": {"latent": 1.0, "components": 1.0}},
    "KL terms at weight 0.1": {"kl_weight": {"latent": 0.1, "components": 0.1}},
    "Gaussian prior": {"network": {"latent": "gaussian"}},
    "MLP encoder": {"network": {"encoder": "mlp"}},
    "paper's masks alone": {"corruption": {"thin": 0.0}},
    "binomial halves alone": {"corruption": {"thin": 1.0}},
}
NEIGHBORS = 15
SHORT_RATE = 5e-4  # learning rate of the short runs


def main() -> None:
    """Train each variant and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--config", type=Path, default=HERE / "../../scripts/mini.toml")
    arguments = parser.parse_args()
    cp.settings.verbosity = 0
    shipped = PretrainConfig.from_toml(arguments.config)
    training, held_out = _sources(shipped, cp.models.load(shipped.start).genes)
    genes = cp.models.load(shipped.start).genes
    labelled = {
        Path(file).stem: (
            read_file(file, genes),  # one context: some batches are cell lines
            ad.read_h5ad(file).obs["cell_type"].astype(str).to_numpy(),
        )
        for file in shipped.files
        if Path(file).stem in LABELLED
    }
    rows = []
    for name, change in CHANGES.items():
        config = changed(shipped, change, arguments.steps)
        network = build(config)
        if config.network["latent"] == "mixture":
            place_components(network, training, config)
        if name == PACKAGED:
            network = cp.models.load("mini").network
        elif name != UNTRAINED:
            fit(network, partial(bound, sources=training, config=config, panels={}), config.train)
        halves = replace(config, corruption=replace(shipped.corruption, thin=1.0))
        gain = -validation_loss(network, sources=held_out, config=halves)
        rows.append({"change": name, "likelihood": round(gain, 3), **accuracies(network, labelled)})
        print(rows[-1], flush=True)
    head = (
        "# Choices behind `mini`\n\n`./dev bench mini_choices` wrote this page: "
        f"{arguments.steps} steps each at a learning rate of {SHORT_RATE}, one seed.\n"
        "Likelihood of hidden counts: nats per count above the context's mean, on held-out\n"
        "sets. kNN accuracy: latent (factors).\n\n"
    )
    (HERE / "mini_choices.md").write_text(head + pd.DataFrame(rows).to_markdown(index=False) + "\n")


def changed(config: PretrainConfig, change: dict, steps: int) -> PretrainConfig:
    """Return the run with a change, for fewer steps."""
    values = dict(change)
    values["network"] = config.network | change.get("network", {})
    values["corruption"] = replace(config.corruption, **change.get("corruption", {}))
    values["train"] = replace(
        config.train, steps=steps, learning_rate=SHORT_RATE, average=0.99, warmup=50
    )
    return replace(config, kl_warmup=50, **values)


def accuracies(network: CellPLM, labelled: dict[str, tuple[Cells, np.ndarray]]) -> dict[str, str]:
    """Return kNN accuracies of latent and factors on each labelled set."""
    result = {}
    for name, (cells, labels) in labelled.items():
        encoding = encode(network, cells)
        # The factors at unit variance, as the latent starts from them.
        units = encoding.factors / network.embedder.eigenvalues.sqrt().numpy()
        result[name] = f"{knn(encoding.latent, labels):.3f} ({knn(units, labels):.3f})"
    return result


def knn(x: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of nearest neighbours, for labels of at least ten cells."""
    names, n_cells = np.unique(labels, return_counts=True)
    often = np.isin(labels, names[n_cells >= 10])
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return float(
        cross_val_score(KNeighborsClassifier(NEIGHBORS), x[often], labels[often], cv=folds).mean()
    )


if __name__ == "__main__":
    main()
