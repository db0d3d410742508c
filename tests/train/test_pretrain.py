"""`cp.train.pretrain` on real cells: it learns, resumes, and says what is wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import scanpy as sc
import torch

import cellplm_tl as cp
from cellplm_tl._errors import OptionError, TrainingError

SMALL = {
    "hidden": 32,
    "heads": 4,
    "encoder_layers": 1,
    "latent_size": 16,
    "decoder_hidden": 32,
    "positions": "none",
    "dropout": 0.0,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, ...]:
    """Two files of real cells, with different genes."""
    folder = tmp_path_factory.mktemp("pool")
    adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    halves = adata[::2, :700].copy(), adata[1::2, 60:].copy()
    for number, half in enumerate(halves):
        half.write_h5ad(folder / f"half{number}.h5ad")
    return tuple(str(folder / f"half{number}.h5ad") for number in range(2))


def config(files, out, **changes) -> cp.train.PretrainConfig:
    values = {
        "files": files,
        "out": str(out),
        "network": SMALL,
        "train": cp.train.TrainConfig(steps=40, learning_rate=3e-3, warmup=5, average=0.9),
        "corruption": cp.train.Corruption(n_cells=(32, 64)),
    }
    return cp.train.PretrainConfig(**(values | changes))


def test_it_learns_to_predict_hidden_counts(files, tmp_path):
    run = config(files, tmp_path / "model", validation=("half1",))
    model = cp.train.pretrain(run)
    rows = np.genfromtxt(tmp_path / "model.run/log.csv", delimiter=",", names=True)
    assert rows["gain"][-10:].mean() > rows["gain"][:5].mean() + 0.5
    assert {"latent", "components", "components_in_use", "gain"} <= set(rows.dtype.names)
    assert rows["components_in_use"][-1] > 1
    assert model.provenance["run"]["files"] == ["half0.h5ad", "half1.h5ad"]
    assert cp.models.load(tmp_path / "model").sha256 == model.sha256


def test_the_loss_is_the_weighted_bound(files, tmp_path):
    """Mean over cells of (reconstruction + weighted KL terms) / (hidden counts + 200)."""
    module = sys.modules["cellplm_tl.train.pretrain"]
    run = config(files[:1], tmp_path / "model", kl_weight={"latent": 0.3, "components": 0.6})
    network = module.build(run).eval()
    source = module.Source("half0", module.read_file(files[0], network.config.genes))
    example = module.draw_example([source], cp.train.Corruption(thin=0.0), 0, 1)
    with torch.no_grad():
        terms = module._terms(network, example, run, warm=0.5, sample=False)
        posterior = network(example.counts, example.genes).posterior
        decoded = network.decode(posterior.mean, example.target_genes)
        nll = module.reconstruction(decoded, example.target, example.weights)
        kl = network.latent.terms(posterior, posterior.mean)
    hidden = (example.target * example.weights).sum(1)
    assert (hidden == 0).any()  # cells that were not masked take no part
    per_cell = nll + 0.5 * (0.3 * kl["latent"] + 0.6 * kl["components"])
    expected = torch.where(hidden > 0, per_cell / (hidden + 200), 0).mean()
    assert float(terms["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_the_paper_s_variants_train(files, tmp_path):
    for number, change in enumerate(
        ({"latent": "gaussian"}, {"latent": "linear"}, {"encoder": "mlp"}, {"decoder": "gaussian"})
    ):
        run = config(files[:1], tmp_path / str(number), network=SMALL | change)
        run = dataclasses.replace(run, train=cp.train.TrainConfig(steps=2))
        assert cp.train.pretrain(run).network.embedder.table.isfinite().all()


def test_from_the_spectrum(files, tmp_path):
    network = {k: v for k, v in SMALL.items() if k != "latent_size"} | {"decoder": "profile"}
    run = config(files[:1], tmp_path / "model", start="linear_transfer", network=network)
    model = cp.train.pretrain(dataclasses.replace(run, train=cp.train.TrainConfig(steps=3)))
    floor = cp.models.load("linear_transfer").network.embedder
    assert torch.equal(model.network.embedder.loadings, floor.loadings)
    assert not any(p.isnan().any() for p in model.network.parameters())


def test_same_seed_same_weights_and_a_cut_run_goes_on(files, tmp_path, monkeypatch):
    train = cp.train.TrainConfig(steps=6, save_every=2)
    one, two, cut = (config(files, tmp_path / n, train=train) for n in ("one", "two", "cut"))
    assert cp.train.pretrain(one).sha256 == cp.train.pretrain(two).sha256
    module = sys.modules["cellplm_tl.train.pretrain"]
    draw = module.draw_example

    def draw_until(sources, corruption, seed, step):
        if step == 5:
            raise KeyboardInterrupt
        return draw(sources, corruption, seed, step)

    monkeypatch.setattr(module, "draw_example", draw_until)
    with pytest.raises(KeyboardInterrupt):
        cp.train.pretrain(cut)
    monkeypatch.undo()
    assert cp.train.pretrain(cut).sha256 == cp.models.load(tmp_path / "one").sha256


def test_command_line_and_toml(files, tmp_path):
    run = tmp_path / "run.toml"
    network = "\n".join(f"{name} = {value!r}" for name, value in SMALL.items())
    run.write_text(
        f'files = ["{files[0]}"]\nout = "model"\n[network]\n{network}\n'
        "[corruption]\nn_cells = [16, 32]\n[train]\nsteps = 2\n"
    )
    command = [sys.executable, "-m", "cellplm_tl.train", "--config", str(run)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"model: sha256 {cp.models.load(tmp_path / 'model').sha256}" in output


def test_what_is_wrong_is_said_first(files, tmp_path):
    with pytest.raises(OptionError, match="files is empty"):
        cp.train.pretrain(config((), tmp_path / "model"))
    with pytest.raises(OptionError, match=r"1 of 2 files do not exist: \['nowhere.h5ad'\]"):
        cp.train.pretrain(config((files[0], "nowhere.h5ad"), tmp_path / "model"))
    with pytest.raises(OptionError, match=r"not in the pool: \['half9'\]"):
        cp.train.pretrain(config(files, tmp_path / "model", validation=("half9",)))
    with pytest.raises(OptionError, match="names every file"):
        cp.train.pretrain(config(files, tmp_path / "model", validation=("half0", "half1")))
    for name, value in (("network", "hiden"), ("kl_weight", "latnt"), ("weights", "half9")):
        with pytest.raises(OptionError, match=rf"{name} has \['{value}'\]"):
            cp.train.pretrain(config(files, tmp_path / "model", **{name: {value: 1}}))
    (tmp_path / "there").mkdir()
    with pytest.raises(TrainingError, match="exists; choose another"):
        cp.train.pretrain(config(files, tmp_path / "there"))
    for text in ('files = []\nout = "x"\nstepz = 3\n', 'out = "x"\n', "files ="):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(OptionError, match="is no pretraining run"):
            cp.train.PretrainConfig.from_toml(tmp_path / "bad.toml")
