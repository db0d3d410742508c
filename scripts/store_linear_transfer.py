"""Store the pool's spectrum in the package, as the model `linear_transfer`.

    python scripts/build_spectrum.py --pool ../shared/data/pretrain --out build/spectrum
    python scripts/store_linear_transfer.py --spectrum build/spectrum

The spectrum is stored once (matrices as float16); `mini` shares it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from pool_table import pool_table

from cellplm_tl._weights import PACKAGED, write_directory
from cellplm_tl.models import CellPLM, CellPLMConfig

CARD = Path(__file__).parent / "cards" / "linear_transfer.md"


def main() -> None:
    """Read the spectrum's files and write the model's directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spectrum", type=Path, required=True)
    parser.add_argument("--pool-readme", type=Path, default=Path("../shared/data/README.md"))
    arguments = parser.parse_args()
    spectrum = np.load(arguments.spectrum / "spectrum.npz")
    facts = json.loads((arguments.spectrum / "spectrum.json").read_text())
    network = floor_network(spectrum)
    card = CARD.read_text().format(
        factors=network.config.factors,
        n_cells=facts["n_cells"],
        n_genes=facts["n_genes"],
        n_sets=facts["n_sets"],
        seed=facts["seed"],
        table=pool_table(arguments.pool_readme, sorted(facts["sets"])),
    )
    provenance = {
        "source": "this package: spectrum of its pretraining pool",
        "licence": "BSD-3-Clause",
        "data": "45 public data sets, listed in card.md",
        "seed": facts["seed"],
        "n_cells": facts["n_cells"],
    }
    path = PACKAGED / "linear_transfer"
    write_directory(path, network, provenance, card, "float16", shared=None)
    print(f"{path}: {sum(file.stat().st_size for file in path.iterdir()) / 1e6:.1f} MB")


def floor_network(spectrum: Mapping[str, np.ndarray]) -> CellPLM:
    """Make the floor, a factor model without a network, of what build_spectrum.py wrote."""
    n_factors = spectrum["V"].shape[1]
    network = CellPLM(
        CellPLMConfig(
            genes=tuple(map(str, spectrum["genes"])),
            embedder="spectrum",
            factors=n_factors,
            positions="none",
            encoder="none",
            encoder_layers=0,
            hidden=n_factors,
            latent="none",
            latent_size=n_factors,
            decoder="none",
        )
    )
    mean = np.expm1(spectrum["mean"])
    for name, values in {
        "loadings": spectrum["V"],
        "eigenvalues": spectrum["eigenvalues"],
        "scale": spectrum["scale"],
        "pool_profile": mean / mean.sum(),
    }.items():
        getattr(network.embedder, name).copy_(torch.from_numpy(values))
    return network


if __name__ == "__main__":
    main()
