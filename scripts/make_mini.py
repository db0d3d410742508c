"""Make `mini`, the default model: pretrain on the pool, and store the weights in the package.

    python scripts/make_mini.py                     # the model of the package
    python scripts/make_mini.py --seed 1 --out build/mini_seed1

Reads the pool in ../shared/data/pretrain. Two runs: scripts/mini.toml trains the whole network
(five minutes on one core), scripts/mini_decoder.toml then the decoder alone (ten). A run that was
interrupted goes on. The spectrum stays in `linear_transfer`, which `mini` shares.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from pool_table import pool_table

import cellplm_tl as cp
from cellplm_tl._anndata import Cells, read_cells, read_file
from cellplm_tl._inference import encode
from cellplm_tl._stored import context_of_pool, context_to_tensors
from cellplm_tl._weights import PACKAGED, Model, write_directory
from cellplm_tl.models.network import count_parameters

HERE = Path(__file__).parent
CARD = HERE / "cards" / "mini.md"
SHARED = ("loadings", "eigenvalues", "scale", "pool_profile")
CONTEXT_CELLS = 64  # of each set, in the context that is stored
CONTEXT_COMPONENTS = 50  # of its frame


def main() -> None:
    """Pretrain, then write the model with its card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "mini.toml")
    parser.add_argument("--decoder-config", type=Path, default=HERE / "mini_decoder.toml")
    parser.add_argument("--pool-readme", type=Path, default=HERE / "../../shared/data/README.md")
    parser.add_argument("--seed", type=int, help="instead of that of the config")
    parser.add_argument("--out", type=Path, default=PACKAGED / "mini")
    arguments = parser.parse_args()
    cp.settings.verbosity = 1
    config = run_of(arguments.config, arguments.seed)
    first = pretrained(config)
    decoder = run_of(arguments.decoder_config, arguments.seed)
    network = config.network | decoder.network
    model = pretrained(replace(decoder, start=config.out, network=network))
    base = cp.models.load("linear_transfer")
    shared = {
        "model": "linear_transfer",
        "sha256": base.sha256,
        "tensors": [f"embedder.{name}" for name in SHARED],
    }
    names = [Path(file).stem for file in config.files]
    sets = [read_file(file, model.genes, batch_key=config.batch_key) for file in config.files]
    in_use = components_in_use(model, sets)
    context = stored_context(model, config, np.random.default_rng(config.train.seed))
    card = CARD.read_text().format(
        n_sets=len(sets),
        n_genes=len(model.genes),
        parameters=count_parameters(model.network, trainable=True),
        step=config.train.steps,
        decoder_step=decoder.train.steps,
        features=model.config.decoder_features,
        in_use=in_use,
        components=model.config.components,
        seed=config.train.seed,
        spectrum=base.sha256,
        table=pool_table(arguments.pool_readme, names),
    )
    provenance = first.provenance | {
        "decoder_run": model.provenance["run"],
        "source": "this package: pretrained on its pool",
        "licence": "BSD-3-Clause",
        "data": f"{len(sets)} public data sets, listed in card.md",
        "steps": config.train.steps + decoder.train.steps,
        "components_in_use": round(in_use, 1),
    }
    path = arguments.out
    write_directory(
        path, model.network, provenance, card, "float16", shared=shared, context=context
    )
    print(f"{path}: {sum(f.stat().st_size for f in path.iterdir()) / 1e6:.1f} MB")
    print(f"{in_use:.1f} of {model.config.components} components in use")


def run_of(path: Path, seed: int | None) -> cp.train.PretrainConfig:
    """Read a run; another seed than that of the file goes to a folder of its own."""
    config = cp.train.PretrainConfig.from_toml(path)
    if seed is None:
        return config
    seeded = replace(config.train, seed=seed)
    return replace(config, train=seeded, out=f"{config.out}_{seed}")


def pretrained(config: cp.train.PretrainConfig) -> Model:
    """Run it, or load what a run before has made."""
    out = Path(config.out)
    return cp.models.load(out) if out.exists() else cp.train.pretrain(config)


def components_in_use(model: Model, sets: Sequence[Cells]) -> float:
    """Return how many components hold the pool's cells: exp of the entropy of their mean q(y|z)."""
    usage = []
    for cells in sets:
        latent = torch.from_numpy(encode(model.network, cells).latent)
        with torch.no_grad():
            usage.append(model.network.latent.components(latent).mean(0))
    mean = torch.stack(usage).mean(0)
    return float((-(mean * mean.clamp(min=1e-12).log()).sum()).exp())


def stored_context(
    model: Model, config: cp.train.PretrainConfig, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Take some cells of every set as the context that the model keeps."""
    sets = []
    for file in config.files:
        adata = ad.read_h5ad(file)
        n_cells = min(CONTEXT_CELLS, adata.n_obs)
        rows = np.sort(rng.choice(adata.n_obs, n_cells, replace=False))
        sets.append(read_cells(adata[rows].copy(), model.genes))
    return context_to_tensors(*context_of_pool(model.network, sets, CONTEXT_COMPONENTS, rng))


if __name__ == "__main__":
    main()
