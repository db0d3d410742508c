"""Positional encoding on and off, on tissue sections: does it help to predict hidden counts?

    ./dev bench positions

Two networks like `mini` are trained on the two Xenium sections of the pretraining pool, contexts
being fields of view, alike but for the sinusoidal encoding of where a cell lies (appendix B). Both
predict the hidden binomial half of the counts of two sections they have not seen, of other tissues
and, one of them, another technology. Reads ../shared; writes positions.md beside this file.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import cellplm_tl as cp
from cellplm_tl._anndata import read_file
from cellplm_tl.train.contexts import Source
from cellplm_tl.train.pretrain import PretrainConfig, validation_loss

HERE = Path(__file__).parent
TRAINED_ON = ("pretrain_spatial/bone_marrow_xenium", "pretrain_spatial/pancreas_xenium")
MEASURED_ON = ("spatial/lung_cosmx", "spatial/breast_xenium_typed")
EXAMPLES = 30  # fields of view that are drawn of each section


def main() -> None:
    """Train both for some seeds, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    options = parser.parse_args()
    cp.settings.verbosity = 0
    shipped = PretrainConfig.from_toml(HERE / "../../scripts/mini.toml")
    rows = []
    for seed in range(options.seeds):
        for positions in ("none", "sinusoidal"):
            with tempfile.TemporaryDirectory() as folder:
                config = replace(
                    shipped,
                    files=tuple(str(options.shared / f"data/{n}.h5ad") for n in TRAINED_ON),
                    out=f"{folder}/model",
                    batch_key="fov",
                    validation=(),
                    network=shipped.network | {"positions": positions},
                    corruption=replace(shipped.corruption, thin=1.0, panel=0.0, platform=0.0),
                    kl_warmup=100,
                    train=replace(
                        shipped.train, steps=options.steps, seed=seed, warmup=50, average=0.99
                    ),
                )
                model = cp.train.pretrain(config)
            for name in MEASURED_ON:
                cells = read_file(
                    options.shared / f"data/{name}.h5ad", model.genes, batch_key="fov"
                )
                whole = replace(
                    config, agreement=0.0, corruption=replace(config.corruption, depth=0.0)
                )
                gain = -validation_loss(
                    model.network, sources=[Source(name, cells)], config=whole, n_examples=EXAMPLES
                )
                rows.append({"section": name, "seed": seed, positions: gain})
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows).groupby(["section", "seed"]).first().reset_index()
    table["difference"] = table["sinusoidal"] - table["none"]
    spread = table.groupby("section")["difference"].agg(["mean", "std"]).round(4)
    head = "# Positional encoding on and off\n\n"
    head += f"`./dev bench positions` wrote this page: {options.steps} steps each. Likelihood of\n"
    head += "hidden counts, nats per count above the mean of the field of view.\n\n"
    body = table.round(4).to_markdown(index=False) + "\n\n" + spread.to_markdown() + "\n"
    (HERE / "positions.md").write_text(head + body)
    print(np.round(spread, 4))


if __name__ == "__main__":
    main()
