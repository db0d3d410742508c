"""`cp.train.pretrain` on real cells: it learns, resumes, and says what is wrong."""

from __future__ import annotations

import dataclasses
import json
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


# --- two halves of a cell -------------------------------------------------------------------------

SPECTRUM = {"embedder": "spectrum", "factors": 6, "latent_size": 6, "latent": "gaussian"}
WHOLE = {"thin": 1.0, "panel": 0.0, "depth": 0.0, "n_cells": (40, 40)}
HALVES = {
    "whole": WHOLE,
    "panel": WHOLE | {"panel": 1.0, "panel_genes": (80, 80), "depth": 1.0, "platform": 0.5},
}


@pytest.fixture
def with_spectrum(files):
    """Give a network on the genes of both files, and the first of them as its source."""
    module = sys.modules["cellplm_tl.train.pretrain"]
    genes = sorted({gene for file in files for gene in module.read_gene_ids(file)})

    def make(**fields):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            values = {**SMALL, **SPECTRUM, "decoder": "profile", **fields}
            network = cp.models.CellPLM(cp.models.CellPLMConfig(genes=tuple(genes), **values))
            network.embedder.loadings.normal_(std=0.05)
            network.embedder.eigenvalues.copy_(torch.linspace(9, 1, 6))
            network.embedder.scale.uniform_(0.5, 2)
            network.embedder.pool_profile.uniform_().div_(network.embedder.pool_profile.sum())
            network.latent.mean.weight.normal_(std=0.1)
        source = module.Source("half0", module.read_file(files[0], network.config.genes))
        return network.eval(), source

    return make


def unit_factors(network, counts, genes) -> np.ndarray:
    """Unit factors of cells that are one context, in float64."""
    config, embedder = network.config, network.embedder
    v, scale, pool = (
        tensor.double().numpy()[genes]
        for tensor in (embedder.loadings, embedder.scale, embedder.pool_profile)
    )
    eigenvalues = embedder.eigenvalues.double().numpy()
    y = np.zeros((counts.n_cells, len(genes)))
    y[counts.rows().numpy(), counts.columns.numpy()] = counts.values.numpy()
    target = 1e4 * (pool.sum() if config.target_sum == "panel" else 1)
    library = counts.library_size.double().numpy()[:, None]
    y = np.log1p(target * y / np.maximum(library, 1))
    x = np.clip((y - y[library[:, 0] > 0].mean(0)) / scale, -5, 10) * (library > 0)
    precision = v.T @ v / config.noise + np.diag(1 / eigenvalues)
    return np.linalg.solve(precision, v.T @ x.T / config.noise).T / np.sqrt(eigenvalues)


@pytest.mark.parametrize("how", HALVES)
@pytest.mark.parametrize("fields", [{}, {"unit_length": True, "target_sum": "panel"}])
def test_disagreement_is_one_minus_the_mean_cosine(how, fields, with_spectrum):
    """Of the latent means with the unit factors of the other half, over all that the set has."""
    module = sys.modules["cellplm_tl.train.pretrain"]
    network, source = with_spectrum(**fields)
    example = module.draw_example([source], cp.train.Corruption(**HALVES[how]), 0, 0)
    assert len(example.genes) == (80 if how == "panel" else len(source.cells.genes))
    assert len(example.other_genes) == len(source.cells.genes)
    with torch.no_grad():
        z = network(example.counts, example.genes).posterior.mean
    other = unit_factors(network, example.other, example.other_genes.numpy())
    z_long = z.double().numpy()
    lengths = np.linalg.norm(z_long, axis=1) * np.linalg.norm(other, axis=1)
    cosines = (z_long * other).sum(1) / lengths
    expected = 1 - cosines.mean()
    assert 0.02 < expected < 0.98
    panel = network.embedder.panel(example.other_genes)
    for given in (None, panel):
        actual = module.disagreement(network, z, example, given)
        assert float(actual) == pytest.approx(expected, abs=1e-4)
    assert float(module.disagreement(network, 3 * z, example)) == pytest.approx(expected, abs=1e-4)


def test_cells_of_which_a_half_has_no_counts_take_no_part(with_spectrum):
    module = sys.modules["cellplm_tl.train.pretrain"]
    network, source = with_spectrum()
    example = module.draw_example([source], cp.train.Corruption(**WHOLE), 0, 0)
    z = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    other = unit_factors(network, example.other, example.other_genes.numpy())
    unread = example.counts.library_size.clone()
    unread[:5] = 0
    part = example._replace(counts=example.counts._replace(library_size=unread))
    z_long = z.detach().double().numpy()[5:]
    lengths = np.linalg.norm(z_long, axis=1) * np.linalg.norm(other[5:], axis=1)
    expected = 1 - ((z_long * other[5:]).sum(1) / lengths).mean()
    actual = module.disagreement(network, z, part)
    assert float(actual.detach()) == pytest.approx(expected, abs=1e-4)
    actual.backward()
    assert (z.grad[:5] == 0).all()
    assert (z.grad[5:].abs().sum(1) > 0).all()

    nothing = example._replace(counts=example.counts._replace(library_size=0 * unread))
    of_nothing = module.disagreement(network, z, nothing)
    assert float(of_nothing.detach()) == 0
    of_nothing.backward()  # there is a gradient, and it is 0
    hidden = example.other._replace(
        values=torch.zeros(0),
        columns=torch.zeros(0, dtype=torch.int32),
        offsets=torch.zeros(41, dtype=torch.int64),
        library_size=torch.zeros(40),
    )
    assert float(module.disagreement(network, z, example._replace(other=hidden)).detach()) == 0


@pytest.mark.parametrize("how", HALVES)
def test_the_loss_contains_the_disagreement(how, files, with_spectrum, tmp_path):
    module = sys.modules["cellplm_tl.train.pretrain"]
    network, source = with_spectrum()
    corruption = cp.train.Corruption(**HALVES[how])
    example = module.draw_example([source], corruption, 0, 0)

    def terms(agreement, example=example, **options):
        run = config(files, tmp_path / "model", agreement=agreement)
        with torch.no_grad():
            return module._terms(network, example, run, warm=1.0, sample=False, **options)

    without, once, thrice = terms(0.0), terms(1.0), terms(3.0)
    assert "disagreement" not in without
    with torch.no_grad():
        z = network(example.counts, example.genes).posterior.mean
        expected = float(module.disagreement(network, z, example))
    assert float(once["disagreement"]) == float(thrice["disagreement"]) == pytest.approx(expected)
    assert expected > 0.02
    assert float(once["loss"] - without["loss"]) == pytest.approx(expected, rel=1e-4)
    assert float(thrice["loss"] - without["loss"]) == pytest.approx(3 * expected, rel=1e-4)
    for name in without.keys() - {"loss"}:
        assert torch.equal(once[name], without[name])
    # With the embedder's view of all genes, as training keeps it.
    whole = network.embedder.panel(example.other_genes)
    again = terms(1.0, whole=whole)
    assert again.keys() == once.keys()
    for name, value in again.items():
        torch.testing.assert_close(value, once[name])

    masked = module.draw_example([source], cp.train.Corruption(thin=0.0), 0, 0)
    assert "disagreement" not in terms(1.0, masked)
    assert torch.equal(terms(1.0, masked)["loss"], terms(0.0, masked)["loss"])


@pytest.mark.parametrize("agreement", [0.0, 2.0])
def test_what_is_validated(agreement, files, with_spectrum, tmp_path):
    """The weighted disagreement minus the gain, over examples that training never draws."""
    module = sys.modules["cellplm_tl.train.pretrain"]
    network, source = with_spectrum()
    corruption = cp.train.Corruption(n_cells=(20, 20))
    run = config(files, tmp_path / "model", agreement=agreement, corruption=corruption)
    losses, n_masked = [], 0
    with torch.no_grad():
        for number in range(6):
            example = module.draw_example([source], corruption, 1_000_000, number)
            terms = module._terms(network, example, run, 1.0, sample=False)
            losses.append(-float(terms["gain"]))
            n_masked += example.other is None
            if agreement and example.other is not None:
                z = network(example.counts, example.genes).posterior.mean
                losses[-1] += 2.0 * float(module.disagreement(network, z, example))
        actual = module.validation_loss(network, sources=[source], config=run, n_examples=6)
    assert 0 < n_masked < 6
    assert actual == pytest.approx(np.mean(losses), rel=1e-5)


def test_halves_that_agree_are_trained_for(files, with_spectrum, tmp_path):
    """The bound of a step takes the same example, and panels are kept per set."""
    module = sys.modules["cellplm_tl.train.pretrain"]
    network, source = with_spectrum()
    run = config(
        files, tmp_path / "model", agreement=1.0, corruption=cp.train.Corruption(**HALVES["panel"])
    )
    kept = {}
    torch.manual_seed(0)
    one = module.bound(network, 2, sources=[source], config=run, panels=kept)
    assert list(kept) == [0]
    assert len(kept[0].scale) == len(source.cells.genes)
    torch.manual_seed(0)
    other = module.bound(network, 2, sources=[source], config=run)
    assert float(one["loss"].detach()) == pytest.approx(float(other["loss"].detach()), rel=1e-5)
    network.zero_grad()
    one["disagreement"].backward()
    assert network.latent.mean.weight.grad.abs().sum() > 0
    assert network.embedder.reader.linear.weight.grad.abs().sum() > 0
    assert network.decoder.correction.weight.grad is None


def test_a_run_with_agreement(files, tmp_path):
    """Steps that thin log it, those that mask do not, and it survives the file of the run."""
    network = {k: v for k, v in SMALL.items() if k != "latent_size"}
    network |= {"decoder": "profile", "unit_length": True, "target_sum": "panel"}
    path = tmp_path / "run.toml"
    fields = "\n".join(f"{name} = {json.dumps(value)}" for name, value in network.items())
    path.write_text(
        f'files = ["{files[0]}"]\nout = "model"\nstart = "linear_transfer"\nagreement = 2.0\n'
        f"[network]\n{fields}\n[corruption]\nthin = 0.5\nplatform = 0.3\nn_cells = [16, 32]\n"
        "[train]\nsteps = 6\n"
    )
    run = cp.train.PretrainConfig.from_toml(path)
    assert (run.agreement, run.corruption.platform) == (2.0, 0.3)
    model = cp.train.pretrain(run)
    assert (model.config.unit_length, model.config.target_sum) == (True, "panel")
    assert model.provenance["run"]["agreement"] == 2.0
    assert model.provenance["run"]["corruption"]["platform"] == 0.3
    rows = np.genfromtxt(tmp_path / "model.run/log.csv", delimiter=",", names=True)
    is_there = np.isfinite(rows["disagreement"])
    assert 0 < is_there.sum() < 6
    assert ((rows["disagreement"] > 0) & (rows["disagreement"] < 2))[is_there].all()


def test_agreement_needs_a_spectrum(files, tmp_path):
    with pytest.raises(OptionError, match="agreement"):
        cp.train.pretrain(
            config(
                files[:1],
                tmp_path / "model",
                agreement=1.0,
                corruption=cp.train.Corruption(thin=1.0),
                train=cp.train.TrainConfig(steps=1),
            )
        )


# --- runs -----------------------------------------------------------------------------------------


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


# --- frozen parts, and a start from another model ------------------------------------------------


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory) -> str:
    """Pretrain a small model with a spectrum, for others to start from."""
    out = tmp_path_factory.mktemp("start") / "model"
    network = {**SMALL, "factors": FLOOR_FACTORS, "latent_size": FLOOR_FACTORS}
    network |= {"embedder": "spectrum", "latent": "gaussian", "decoder": "profile"}
    few = cp.train.TrainConfig(steps=1, learning_rate=1e-2, warmup=1)
    run = config(files, out, start="linear_transfer", network=network, train=few)
    cp.train.pretrain(run)
    return str(out)


FLOOR_FACTORS = cp.models.load("linear_transfer").config.factors


def started(files, trained, out, **changes) -> cp.train.PretrainConfig:
    start = cp.models.load(trained).config
    fields = {name: getattr(start, name) for name in SMALL}
    fields |= {"factors": start.factors, "embedder": "spectrum", "latent": start.latent}
    fields |= {"decoder": "profile", "decoder_features": 4}
    few = cp.train.TrainConfig(steps=1, learning_rate=1e-2, warmup=1, average=0.0)
    return config(files, out, **{"start": trained, "network": fields, "train": few} | changes)


def tensors(network) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_a_start_gives_all_that_has_the_same_shape(files, trained, tmp_path):
    module = sys.modules["cellplm_tl.train.pretrain"]
    start = tensors(cp.models.load(trained).network)
    built = tensors(module.build(started(files, trained, tmp_path / "model")))
    assert set(start) < set(built)
    assert {name.rsplit(".", 1)[0] for name in set(built) - set(start)} == {
        "decoder.features",
        "decoder",
    }
    assert all(torch.equal(built[name], tensor) for name, tensor in start.items())
    run = started(files, trained, tmp_path / "model")
    wider = dataclasses.replace(run, network=run.network | {"decoder_hidden": 64})
    built = tensors(module.build(wider))
    same = {name for name in start if built[name].shape == start[name].shape}
    assert same < set(start)
    assert all(torch.equal(built[name], start[name]) for name in same)


def test_frozen_parts_stay_and_the_others_are_trained(files, trained, tmp_path):
    frozen = ("embedder", "encoder", "latent")
    model = cp.train.pretrain(started(files, trained, tmp_path / "model", frozen=frozen))
    start, after = tensors(cp.models.load(trained).network), tensors(model.network)
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], after[name])}
    assert moved == {"decoder"}
    assert after["decoder.gene_features"].abs().sum() > 0
    header = (tmp_path / "model.run/log.csv").read_text().splitlines()[0]
    assert "latent" not in header.split(",")  # the bound of what does not move has no such term


def test_without_frozen_parts_all_are_trained(files, trained, tmp_path):
    model = cp.train.pretrain(started(files, trained, tmp_path / "model"))
    start, after = tensors(cp.models.load(trained).network), tensors(model.network)
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], after[name])}
    assert {"encoder", "latent", "decoder"} <= moved


def test_frozen_parts_have_no_dropout(files, trained, tmp_path):
    module = sys.modules["cellplm_tl.train.pretrain"]
    run = started(files, trained, tmp_path / "model", frozen=("encoder",))
    network = module.build(run).train()
    source = module.Source("half0", module.read_file(files[0], network.config.genes))
    module.bound(network, 0, sources=[source], config=run)
    assert not network.encoder.training
    assert network.decoder.training
    assert not any(p.requires_grad for p in network.encoder.parameters())
    assert all(p.requires_grad for p in network.decoder.parameters())


def test_frozen_needs_a_start_and_a_part(files, tmp_path):
    with pytest.raises(OptionError, match=r"frozen parts keep the weights of a model: name it in"):
        cp.train.pretrain(config(files, tmp_path / "m", frozen=("latent",)))
    with pytest.raises(OptionError, match=r"frozen has \['head'\], which is none of"):
        cp.train.pretrain(config(files, tmp_path / "m", start="mini", frozen=("head",)))
    assert not (tmp_path / "m").exists()


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
