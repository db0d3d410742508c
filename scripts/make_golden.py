"""Copy the golden data that the tests need from the project's shared folder.

Run it from the root of the repository::

    python scripts/make_golden.py [--source ../shared/golden]

Their description and their licence stand beside them: tests/data/golden/README.md and LICENSE.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

TARGET = Path(__file__).parents[1] / "tests" / "data" / "golden"
SIZE_LIMIT = 3_000_000  # bytes: what is committed once stays in the history for good

FILES = [
    *(
        f"golden_{layout}.{end}"
        for layout in ("gmvae", "vae", "ae")
        for end in ("best.ckpt", "config.json")
    ),
    *(f"forward_{layout}.npz" for layout in ("gmvae", "vae", "ae")),
    *(
        f"loss_{what}.npz"
        for what in ("gmvae_pretrain", "vae_pretrain", "imputation", "annotation", "objectives")
    ),
    "activations.npz",
    "attention.npz",
    "dropout_mask.npz",
    "heads.npz",
    "metrics.npz",
    "pipeline.npz",
    "positional_encoding.npz",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("../shared/golden"))
    source = parser.parse_args().source
    TARGET.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        shutil.copyfile(source / file, TARGET / file)
    size = sum(file.stat().st_size for file in TARGET.iterdir())
    print(f"{len(FILES)} files in {TARGET}, {size:,} bytes")
    if size > SIZE_LIMIT:
        raise SystemExit(f"more than {SIZE_LIMIT:,} bytes: leave something out")


if __name__ == "__main__":
    main()
