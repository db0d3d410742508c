"""`python -m cellplm_tl.train --config run.toml`."""

from __future__ import annotations

import argparse

from cellplm_tl._settings import settings
from cellplm_tl.train.pretrain import PretrainConfig, pretrain


def main() -> None:
    """Run the pretraining that a TOML file describes."""
    parser = argparse.ArgumentParser(prog="python -m cellplm_tl.train", description=main.__doc__)
    parser.add_argument(
        "--config", required=True, help="TOML file with the fields of PretrainConfig"
    )
    settings.verbosity = 1
    model = pretrain(PretrainConfig.from_toml(parser.parse_args().config))
    print(f"{model.name}: sha256 {model.sha256}")


if __name__ == "__main__":
    main()
