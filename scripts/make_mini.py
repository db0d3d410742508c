"""Make `mini`, the default model: pretrain on the pool, and store the weights in the package.

    python scripts/make_mini.py

Reads the pool in ../shared/data/pretrain and scripts/mini.toml; about an hour on two cores. A run
that was interrupted goes on. The spectrum stays in `linear_transfer`, which `mini` shares.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from pool_table import pool_table

import cellplm_tl as cp
from cellplm_tl._anndata import read_file
from cellplm_tl._inference import encode
from cellplm_tl._weights import PACKAGED, WEIGHTS, Model, write_directory

HERE = Path(__file__).parent
CARD = HERE / "cards" / "mini.md"
SHARED = ("loadings", "eigenvalues", "scale", "pool_profile")


def main() -> None:
    """Pretrain, then write the package's model with its card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "mini.toml")
    parser.add_argument("--pool-readme", type=Path, default=HERE / "../../shared/data/README.md")
    arguments = parser.parse_args()
    cp.settings.verbosity = 1
    config = cp.train.PretrainConfig.from_toml(arguments.config)
    out = Path(config.out)
    model = cp.models.load(out) if out.exists() else cp.train.pretrain(config)
    base = cp.models.load("linear_transfer")
    shared = {
        "model": "linear_transfer",
        "sha256": base.sha256,
        "tensors": [f"embedder.{name}" for name in SHARED],
    }
    log = pd.read_csv(Path(config.out + ".run") / "log.csv")
    best = log.loc[log["validation"].idxmin()]
    sets = [Path(file).stem for file in config.files]
    in_use = components_in_use(model, config)
    card = CARD.read_text().format(
        n_sets=len(sets),
        n_genes=len(model.genes),
        parameters=sum(p.numel() for p in model.network.parameters()),
        step=int(best["step"]),
        gain=-best["validation"],
        in_use=in_use,
        seed=config.train.seed,
        spectrum=base.sha256,
        held_out=", ".join(config.validation),
        table=pool_table(arguments.pool_readme, sets),
    )
    provenance = model.provenance | {
        "source": "this package: pretrained on its pool",
        "licence": "BSD-3-Clause",
        "data": f"{len(sets)} public data sets, listed in card.md",
        "steps": int(best["step"]),
        "components_in_use": round(in_use, 1),
    }
    path = PACKAGED / "mini"
    write_directory(path, model.network, provenance, card, "float16", shared=shared)
    print(f"{path / WEIGHTS}: {(path / WEIGHTS).stat().st_size / 1e6:.1f} MB")


def components_in_use(model: Model, config: cp.train.PretrainConfig) -> float:
    """Return how many components hold the pool's cells: exp of the entropy of their mean q(y|z)."""
    usage = []
    for file in config.files:
        cells = read_file(file, model.genes, batch_key=config.batch_key)
        latent = torch.from_numpy(encode(model.network, cells).latent)
        with torch.no_grad():
            usage.append(model.network.latent.components(latent).mean(0))
    mean = torch.stack(usage).mean(0)
    return float((-(mean * mean.clamp(min=1e-12).log()).sum()).exp())


if __name__ == "__main__":
    main()
