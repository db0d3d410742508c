from __future__ import annotations

import functools
import hashlib
import http.server
import json
import logging
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import cellplm_tl as cp
from cellplm_tl import _weights
from cellplm_tl._errors import ModelNotFoundError, OptionError, WeightsError
from cellplm_tl.models import CellPLM, CellPLMConfig
from cellplm_tl.models.network import count_parameters

GOLDEN = Path(__file__).parent / "data" / "golden"
LAYOUTS = ["gmvae", "vae", "ae"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def weights_dir(tmp_path):
    """Give an empty directory that `settings.weights_dir` names."""
    folder = tmp_path / "weights"
    folder.mkdir()
    with cp.settings.override(weights_dir=folder):
        yield folder


@pytest.fixture
def released(tmp_path):
    """Copy a golden checkpoint and change it: `edit` its pickle, `config` keys (None removes)."""

    def make(layout: str = "vae", edit=None, **config) -> Path:
        checkpoint = tmp_path / f"golden_{layout}.best.ckpt"
        content = torch.load(GOLDEN / checkpoint.name, weights_only=True)
        if edit is not None:
            edit(content)
        torch.save(content, checkpoint)
        values = json.loads((GOLDEN / f"golden_{layout}.config.json").read_text()) | config
        values = {key: value for key, value in values.items() if value is not ...}
        (tmp_path / f"golden_{layout}.config.json").write_text(json.dumps(values))
        return checkpoint

    return make


@pytest.fixture
def network():
    torch.manual_seed(0)
    config = CellPLMConfig(
        genes=tuple(f"ENSG{i:011d}" for i in range(30)),
        hidden=16,
        heads=2,
        encoder_layers=1,
        latent_size=4,
        components=3,
        decoder_hidden=8,
        covariates=(("batch", 3),),
    )
    return CellPLM(config).eval()


def assert_same(a: CellPLM, b: CellPLM, **tolerance) -> None:
    assert a.config == b.config
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(
            b.state_dict()[name], tensor, **{"rtol": 0, "atol": 0, **tolerance}
        )


# --- the release: where it is ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_by_path_prefix_and_name(layout, weights_dir):
    path = GOLDEN / f"golden_{layout}.best.ckpt"
    prefix = GOLDEN / f"golden_{layout}"
    for file in GOLDEN.glob(f"golden_{layout}.*"):
        shutil.copy(file, weights_dir)
    for given in (path, str(path), prefix, str(prefix), prefix.name):
        model = _weights.load(given)
        assert model.name == f"golden_{layout}"
        assert model.sha256 == sha256(path)
        assert model.genes == model.config.genes
        assert not model.network.training
        assert {t.dtype for t in model.network.state_dict().values()} == {torch.float32}
    assert model.provenance["licence"] == "BSD-2-Clause"


def test_released_configs_become_ours():
    configs = {layout: _weights.load(GOLDEN / f"golden_{layout}").config for layout in LAYOUTS}
    gmvae, vae, ae = (configs[layout] for layout in LAYOUTS)
    assert (gmvae.latent, vae.latent, ae.latent) == ("mixture_release", "gaussian", "linear")
    assert gmvae.covariates == (("batch", 5), ("dataset", 3))
    assert vae.covariates == (("batch", 4), ("dataset", 2), ("platform", 2))
    assert (ae.head, ae.head_outputs, ae.decoder) == ("annotation", 4, "none")
    assert {c.positions for c in configs.values()} == {"none"}
    assert (gmvae.hidden, vae.hidden, vae.decoder_layers) == (32, 48, 3)
    assert len(gmvae.genes) == 150
    assert gmvae.genes[0] == "ENSG00000000003"


def test_without_its_config(released):
    checkpoint = released()
    config = checkpoint.with_name("golden_vae.config.json")
    config.unlink()
    with pytest.raises(ModelNotFoundError, match=re.escape(f"{config} does not exist")):
        _weights.load(checkpoint)


# --- the release: every tensor --------------------------------------------------------------------

UNUSED = {"norm0.weight", "norm0.bias", "pe_enc.missing_pe", "pe_enc.weight"}  # ends of their names


@pytest.mark.parametrize(("layout", "n_unused"), [("gmvae", 4), ("vae", 2), ("ae", 2)])
def test_every_tensor_has_its_place(layout, n_unused, released):
    """Each tensor is filled with a number of its own, which must turn up in one place of ours."""
    numbers = {}

    def number(content):
        for i, (name, tensor) in enumerate(content["model_state_dict"].items()):
            tensor.fill_(i + 1)
            numbers[i + 1] = (name, tensor.shape)

    network = _weights.load(released(layout, number)).network
    found = {}
    for name, tensor in network.state_dict().items():
        [value] = tensor.unique().tolist()
        assert value not in found, name
        assert numbers[value][1] == tensor.shape
        found[value] = name
    unused = {name for value, (name, _) in numbers.items() if value not in found}
    assert len(unused) == n_unused
    assert {".".join(name.split(".")[-2:]) for name in unused} <= UNUSED


def test_names_of_the_published_layout():
    """The 105 entries of 20230926_85M; the names of a layer are those of the golden layers."""
    stored = torch.load(GOLDEN / "golden_gmvae.best.ckpt", weights_only=True)["model_state_dict"]
    for name in list(stored):
        if name.startswith("encoder.layers.1."):
            for layer in (2, 3):
                stored[name.replace("layers.1", f"layers.{layer}")] = stored[name]
    assert len(stored) == 105
    renamed = _weights.rename_release(stored)
    config = _weights.load(GOLDEN / "golden_gmvae").config
    with torch.device("meta"):
        network = CellPLM(replace(config, encoder_layers=4))
    assert renamed.keys() == network.state_dict().keys()


def drop(name):
    return lambda content: content["model_state_dict"].pop(name)


def put(name, shape):
    return lambda content: content["model_state_dict"].update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (drop("embedder.feat_enc.emb"), "missing: embedder.table."),
        (
            drop("latent.layers.1.hid_2sigma.bias"),
            "missing: latent.log_variance.bias.",
        ),
        (put("encoder.layers.2.norm1.weight", 48), "unexpected: encoder.2.norm1.weight."),
        (
            put("module.pre_latent_norm.norm.bias", 48),
            "unexpected: module.pre_latent_norm.norm.bias.",
        ),
        (
            put("embedder.feat_enc.emb", (149, 48)),
            "wrong shape: embedder.table is (149, 48), not (150, 48).",
        ),
        (put("pre_latent_norm.norm.bias", (48, 1)), "pre_latent_norm.bias is (48, 1), not (48,)."),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(edit, sentence, released):
    checkpoint = released("vae", edit)
    with pytest.raises(WeightsError) as error:
        _weights.load(checkpoint)
    assert str(error.value).startswith(f"{checkpoint} does not fit its config. ")
    assert sentence in str(error.value)


def test_all_tensors_that_do_not_fit_are_in_one_message(released):
    def edit(content):
        for change in (
            drop("pre_latent_norm.norm.weight"),
            drop("embedder.extra_linear.0.bias"),
            put("surplus.b", 1),
            put("surplus.a", 1),
            put("decoder.out_layer.dec_disp", 3),
        ):
            change(content)

    with pytest.raises(WeightsError) as error:
        _weights.load(released("vae", edit))
    assert str(error.value).endswith(
        "missing: embedder.mixing.linear.bias, pre_latent_norm.weight; "
        "unexpected: surplus.a, surplus.b; "
        "wrong shape: decoder.log_theta is (3,), not (150,)."
    )


def test_further_entries_are_left_alone(released):
    def edit(content):
        content["epoch"] = 7
        content["optimizer_state_dict"] = {"state": {0: {"step": torch.tensor(3.0)}}}
        content["history"] = [("loss", 0.3), None, "text"]
        content["best"] = {"loss": np.float64(0.3), "epoch": np.int64(4), "done": np.bool_(True)}

    plain = _weights.load(GOLDEN / "golden_vae")
    assert_same(plain.network, _weights.load(released("vae", edit)).network)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"state_dict": {}}, "has no entry 'model_state_dict'"),
        ({"model_state_dict": torch.zeros(3)}, "has no entry 'model_state_dict'"),
        (torch.zeros(3), "has no entry 'model_state_dict'"),
        ({"model_state_dict": {"epoch": 3, 5: 4}}, "no tensors are epoch, 5."),
    ],
)
def test_a_checkpoint_of_another_kind(content, sentence, released):
    checkpoint = released()
    torch.save(content, checkpoint)
    with pytest.raises(WeightsError, match=re.escape(f"{checkpoint}") + f".*{sentence}"):
        _weights.load(checkpoint)


def test_half_precision_is_read_as_float32(released):
    def edit(content):
        state = content["model_state_dict"]
        state.update({name: tensor.half() for name, tensor in state.items()})

    plain = _weights.load(GOLDEN / "golden_vae").network
    assert_same(plain, _weights.load(released("vae", edit)).network, rtol=1e-3, atol=1e-6)


# --- the release: its pickle ----------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_saved_on_a_gpu(zipped, released, monkeypatch):
    """Storages that name a GPU load on a machine that has none."""
    checkpoint = released()
    content = torch.load(checkpoint, weights_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(content, checkpoint, _use_new_zipfile_serialization=zipped)
    assert b"cuda:0" in checkpoint.read_bytes()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="Attempting to deserialize object on a CUDA device"):
            torch.load(checkpoint, weights_only=True)
    model = _weights.load(checkpoint)
    assert {t.device.type for t in model.network.state_dict().values()} == {"cpu"}
    assert_same(_weights.load(GOLDEN / "golden_vae").network, model.network)


class Malice:
    """What a pickle can do to whoever opens it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_runs_from_a_checkpoint(zipped, released, tmp_path):
    checkpoint, trace = released(), tmp_path / "trace"
    content = torch.load(checkpoint, weights_only=True) | {"extra": Malice(trace)}
    torch.save(content, checkpoint, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="cannot be read as plain tensors"):
        _weights.load(checkpoint)
    assert not trace.exists()
    torch.load(checkpoint, weights_only=False)
    assert trace.exists()  # the pickle does what it is meant to


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_damaged_checkpoint(content, released):
    checkpoint = released()
    checkpoint.write_bytes(checkpoint.read_bytes()[:50_000] if content is None else content)
    with pytest.raises(WeightsError, match="cannot be read as plain tensors"):
        _weights.load(checkpoint)


# --- the release: its config ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"enc_mod": "performer"}, "enc_mod='performer' is not supported; known are 'flowformer'"),
        ({"latent_mod": "vqvae"}, "latent_mod='vqvae' is not supported"),
        ({"latent_mod": ["vae"]}, "latent_mod=['vae'] is not supported"),
        ({"dec_mod": "mlp"}, "dec_mod='mlp' is not supported"),
        ({"dec_mod": ...}, "dec_mod=None is not supported"),
        ({"norm": "batchnorm"}, "norm='batchnorm' is not supported"),
        ({"cat_pe": True}, "cat_pe=True is not supported; known are False"),
        ({"input_covariate": True}, "input_covariate=True is not supported"),
        ({"dsbn": True}, "dsbn=True is not supported"),
        ({"head_type": "embedder"}, "head='embedder' is not one of"),
        ({"gene_list": ...}, "does not describe a CellPLM network: no 'gene_list'"),
        ({"enc_hid": ...}, "does not describe a CellPLM network: no 'enc_hid'"),
        ({"enc_hid": "wide"}, "does not describe a CellPLM network"),
        ({"enc_hid": 50}, "hidden=50 is not a multiple of heads=8"),
        ({"gene_list": ["A", "A"]}, "genes must be a non-empty tuple of distinct ids"),
    ],
)
def test_a_config_that_is_not_built_here(config, sentence, released):
    with pytest.raises(WeightsError) as error:
        _weights.load(released("vae", **config))
    assert sentence in str(error.value)
    assert "golden_vae.config.json" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\xff"])
def test_a_damaged_config(text, released):
    config = released().with_name("golden_vae.config.json")
    config.write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match="golden_vae.config.json"):
        _weights.load(config.with_name("golden_vae"))


def test_another_size_of_the_gene_list(released):
    """The published config with a checkpoint of another size is no half-random network."""
    with pytest.raises(WeightsError, match="wrong shape: .*embedder.table is"):
        _weights.load(released("vae", gene_list=["ENSG00000000003"], out_dim=1))


# --- our own directory ----------------------------------------------------------------------------


def test_save_and_load(network, tmp_path):
    path = _weights.save(network, tmp_path / "mine", provenance={"seed": 3}, card="# Mine\n")
    assert path == tmp_path / "mine"
    assert sorted(file.name for file in path.iterdir()) == [
        "card.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert (path / "card.md").read_text() == "# Mine\n"
    model = _weights.load(path)
    assert_same(network, model.network)
    assert (model.name, model.provenance) == ("mine", {"seed": 3})
    assert model.sha256 == sha256(path / "model.safetensors")
    assert not model.network.training
    config = json.loads((path / "config.json").read_text())
    assert config["sha256"] == model.sha256
    assert config["parameters"] == count_parameters(network)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_released_model_becomes_ours(layout, tmp_path):
    released = _weights.load(GOLDEN / f"golden_{layout}")
    again = _weights.load(_weights.save(released, tmp_path / "ours"))
    assert_same(released.network, again.network)
    assert again.provenance == released.provenance


def test_matrices_as_float16(network, tmp_path):
    """Stored in half the size and read as float32; vectors keep their precision."""
    sizes = {}
    for dtype in ("float32", "float16"):
        path = _weights.save(network, tmp_path / dtype, dtype=dtype)
        sizes[dtype] = (path / "model.safetensors").stat().st_size
    assert sizes["float16"] < 0.7 * sizes["float32"]
    for name, tensor in safetensors.torch.load_file(path / "model.safetensors").items():
        assert tensor.dtype == (torch.float16 if tensor.ndim > 1 else torch.float32), name
    model = _weights.load(path)
    assert {t.dtype for t in model.network.state_dict().values()} == {torch.float32}
    assert_same(network, model.network, rtol=1e-3, atol=1e-6)
    assert torch.equal(model.network.decoder.genes.bias, network.decoder.genes.bias)


def test_weights_in_another_memory_order(network, tmp_path):
    table = torch.randn(16, 30).T
    network.embedder.table.data = table
    assert not network.embedder.table.is_contiguous()
    model = _weights.load(_weights.save(network, tmp_path / "mine"))
    assert torch.equal(model.network.embedder.table, table)


def test_values_beyond_float16_are_not_lost(network, tmp_path):
    with torch.no_grad():
        network.embedder.table[3, 2] = 1e6
    with pytest.raises(WeightsError, match="embedder.table: values too large for float16"):
        _weights.save(network, tmp_path / "mine", dtype="float16")
    assert list(tmp_path.iterdir()) == []
    assert_same(network, _weights.load(_weights.save(network, tmp_path / "mine")).network)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "half", torch.float16])
def test_other_types_are_no_option(dtype, network, tmp_path):
    with pytest.raises(OptionError, match="dtype must be one of 'float32', 'float16'"):
        _weights.save(network, tmp_path / "mine", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_path_is_left_alone(network, tmp_path):
    path = _weights.save(network, tmp_path / "mine", provenance={"seed": 3}, card="old")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(FileExistsError, match=re.escape(f"{path} exists")):
        _weights.save(network, path, provenance={"seed": 4})
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_overwrite_replaces_the_files_and_no_others(network, tmp_path):
    path = _weights.save(network, tmp_path / "mine", card="old")
    (path / "notes.txt").write_text("of the user")
    with torch.no_grad():
        network.pre_latent_norm.bias.fill_(3.0)
    _weights.save(network, path, overwrite=True, card="new")
    assert_same(network, _weights.load(path).network)
    assert (path / "card.md").read_text() == "new"
    assert (path / "notes.txt").read_text() == "of the user"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("step", ["save_file", "_sha256", "count_parameters", "_flush"])
def test_a_failure_in_the_middle_leaves_nothing(step, overwrite, network, tmp_path, monkeypatch):
    path, before = tmp_path / "mine", {}
    if overwrite:
        _weights.save(network, path, card="old")
        before = {file.name: file.read_bytes() for file in path.iterdir()}

    def no_space_left(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(_weights, step, no_space_left)
    with pytest.raises(OSError, match="No space left"):
        _weights.save(network, path, overwrite=overwrite, card="new")
    assert list(tmp_path.iterdir()) == ([path] if overwrite else [])
    if overwrite:
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_provenance_that_json_cannot_hold(network, tmp_path):
    with pytest.raises(TypeError):
        _weights.save(network, tmp_path / "mine", provenance={"data": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_overwrite_is_noticed(network, tmp_path, monkeypatch):
    """New weights beside the old config: the hash tells."""
    path = _weights.save(network, tmp_path / "mine")
    with torch.no_grad():
        network.pre_latent_norm.bias.fill_(3.0)
    replaced = []

    def twice(source, target):
        if len(replaced) == 2:  # weights and card
            raise OSError("power cut")
        replaced.append(target)
        shutil.move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(_weights.os, "replace", twice)
        with pytest.raises(OSError, match="power cut"):
            _weights.save(network, path, overwrite=True)
    with pytest.raises(WeightsError, match="the file is damaged or belongs to another config"):
        _weights.load(path)


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))


def test_a_model_keeps_its_card(network, tmp_path):
    path = _weights.save(network, tmp_path / "mine", card="# mine")
    again = _weights.save(_weights.load(path), tmp_path / "again")
    assert _weights.load(again).card == "# mine"
    _weights.save(network, again, overwrite=True)  # another network: the old card is not its own
    assert "No card was written" in _weights.load(again).card


def test_damaged_weights(network, tmp_path):
    path = _weights.save(network, tmp_path / "mine")
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit
    weights.write_bytes(content)
    found = sha256(weights)[:12]
    with pytest.raises(WeightsError, match=f"{re.escape(str(weights))} has sha256 {found}…"):
        _weights.load(path)
    for damage in (b"", content[:200], b"\xff" * 300):
        weights.write_bytes(damage)
        edit_config(path, sha256=sha256(weights))
        with pytest.raises(WeightsError, match="is not a readable safetensors file"):
            _weights.load(path)
    weights.unlink()
    with pytest.raises(ModelNotFoundError, match="has a config.json but no model.safetensors"):
        _weights.load(path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 2}, "has format 2; this version reads 1"),
        ({"format": ...}, "has format None; this version reads 1"),
        ({"sha256": ..., "shared": ...}, "is not whole: it lacks sha256, shared"),
        ({"architecture": {}}, "is not whole: it lacks architecture.genes"),
        (
            {"architecture": {"genes": ["a"], "depth": 3}},
            "unknown fields in a CellPLM config: depth",
        ),
        ({"architecture": {"genes": ["a"], "latent": "vae"}}, "latent='vae' is not one of"),
        ({"architecture": {"genes": ["a"]}}, "does not fit its config. missing:"),
    ],
)
def test_another_config_of_ours(changes, sentence, network, tmp_path):
    path = _weights.save(network, tmp_path / "mine")
    edit_config(path, **changes)
    with pytest.raises(WeightsError) as error:
        _weights.load(path)
    assert sentence in str(error.value)
    assert str(path) in str(error.value)


def test_a_config_that_is_no_json(network, tmp_path):
    path = _weights.save(network, tmp_path / "mine")
    (path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="is not a readable JSON file"):
        _weights.load(path)


# --- a context that is kept -----------------------------------------------------------------------


@pytest.fixture
def with_context(network) -> _weights.Model:
    """Give a model with tensors of every shape that a context has; values that float16 rounds."""
    generator = torch.Generator().manual_seed(1)
    context = {
        "embedder.0": torch.tensor(1.0),
        "embedder.1": torch.rand(30, generator=generator),
        "layers.0.0": torch.tensor(70_001.0),
        "layers.0.1": 100 * torch.rand(2, 8, generator=generator),
        "layers.0.6": torch.randn(2, 8, 8, generator=generator),
        "frame.genes": torch.arange(30) + 60_001,  # float16 knows neither these
        "frame.directions": torch.randn(30, 5, generator=generator),
        "frame.scales": torch.tensor([1.2345678, 1e5]),
    }
    return _weights.Model(network, "mine", card="# mine", context=context)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_model_keeps_its_context(dtype, with_context, tmp_path):
    path = _weights.save(with_context, tmp_path / "mine", dtype=dtype)
    model = _weights.load(path)
    assert model.context.keys() == with_context.context.keys()
    for name, tensor in with_context.context.items():
        stored = model.context[name]
        assert stored.dtype == torch.float32
        assert stored.shape == tensor.shape
        is_rounded = dtype == "float16" and tensor.ndim > 1
        torch.testing.assert_close(stored, tensor.float(), rtol=1e-3 * is_rounded, atol=0)
        assert torch.equal(stored, tensor.float()) != is_rounded
    config = json.loads((path / "config.json").read_text())
    assert config["context_sha256"] == sha256(path / "context.safetensors")
    assert model.sha256 == config["sha256"] == sha256(path / "model.safetensors")
    # It is not part of the network, nor of the network's identity.
    plain = _weights.save(with_context.network, tmp_path / "plain", dtype=dtype)
    assert _weights.load(plain).sha256 == model.sha256
    again = _weights.load(_weights.save(model, tmp_path / "again"))
    assert all(torch.equal(again.context[name], t) for name, t in model.context.items())


def test_a_model_without_a_context(network, tmp_path):
    path = _weights.save(network, tmp_path / "mine")
    assert _weights.load(path).context == {}
    assert _weights.Model(network, "mine").context == {}
    assert _weights.load(GOLDEN / "golden_vae").context == {}
    files = {file.name for file in path.iterdir()}
    assert files == {"model.safetensors", "config.json", "card.md"}
    assert "context_sha256" not in json.loads((path / "config.json").read_text())


def test_a_damaged_context(with_context, tmp_path):
    path = _weights.save(with_context, tmp_path / "mine")
    stored = path / "context.safetensors"
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1  # one bit
    stored.write_bytes(content)
    found = sha256(stored)[:12]
    with pytest.raises(WeightsError, match=f"{re.escape(str(stored))} has sha256 {found}…"):
        _weights.load(path)
    stored.write_bytes(content[:100])
    edit_config(path, context_sha256=sha256(stored))
    with pytest.raises(WeightsError, match="is not a readable safetensors file"):
        _weights.load(path)
    stored.unlink()
    with pytest.raises(ModelNotFoundError, match="has a config.json but no context.safetensors"):
        _weights.load(path)


def test_a_context_of_before_is_not_in_use(with_context, tmp_path):
    path = _weights.save(with_context, tmp_path / "mine")
    _weights.save(with_context.network, path, overwrite=True)
    assert _weights.load(path).context == {}
    other = {name: tensor + 1 for name, tensor in with_context.context.items()}
    _weights.save(replace(with_context, context=other), path, overwrite=True)
    assert torch.equal(_weights.load(path).context["embedder.1"], other["embedder.1"])
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_overwrite_of_a_context_is_noticed(with_context, tmp_path, monkeypatch):
    """A new context beside the old config: its hash tells, the weights being the same."""
    path = _weights.save(with_context, tmp_path / "mine")
    other = {name: tensor + 1 for name, tensor in with_context.context.items()}
    move = os.replace

    def until_the_config(source, target):
        if target.name == "config.json":
            raise OSError("power cut")
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(_weights.os, "replace", until_the_config)
        with pytest.raises(OSError, match="power cut"):
            _weights.save(replace(with_context, context=other), path, overwrite=True)
    with pytest.raises(WeightsError, match="context.safetensors has sha256"):
        _weights.load(path)


def test_a_context_too_large_for_float16_is_refused(with_context, tmp_path):
    """Sums over 100,000 cells are no float16: as with weights, nothing is to be lost in silence."""
    sums = {**with_context.context, "layers.0.1": torch.full((2, 8), 70_000.0)}
    model = replace(with_context, context=sums)
    with pytest.raises(WeightsError, match="layers.0.1: values too large for float16"):
        _weights.save(model, tmp_path / "mine", dtype="float16")


# --- tensors in another model of the package ------------------------------------------------------


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """Give an empty folder that stands for the models inside the package."""
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.setattr(_weights, "PACKAGED", folder)
    return folder


def test_shared_tensors(network, packaged, tmp_path):
    base = _weights.write_directory(packaged / "base", network, {}, "", "float32", None)
    with torch.no_grad():
        network.pre_latent_norm.bias.fill_(3.0)
    shared = {
        "model": "base",
        "sha256": sha256(base / "model.safetensors"),
        "tensors": ["embedder.table"],
    }
    path = _weights.write_directory(packaged / "two", network, {}, "", "float32", shared)
    with safetensors.safe_open(path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == network.state_dict().keys() - {"embedder.table"}
    model = _weights.load("two")
    assert_same(network, model.network)

    whole = _weights.save(model, tmp_path / "elsewhere")  # without the package's base
    shutil.rmtree(base)
    assert_same(network, _weights.load(whole).network)
    with pytest.raises(
        WeightsError, match="shares tensors with the model 'base' of another version"
    ):
        _weights.load("two")
    with torch.no_grad():
        network.embedder.table.fill_(1.0)
    _weights.write_directory(base, network, {}, "", "float32", None)
    with pytest.raises(
        WeightsError, match="Install that version, load the model there and save it"
    ):
        _weights.load("two")


# --- names ----------------------------------------------------------------------------------------


def test_the_order_of_places(network, packaged, weights_dir, tmp_path, monkeypatch):
    def put_model(folder, value):
        with torch.no_grad():
            network.pre_latent_norm.bias.fill_(value)
        _weights.save(network, folder / "mine")

    def found() -> float:
        return _weights.load("mine").network.pre_latent_norm.bias[0].item()

    monkeypatch.chdir(tmp_path)
    put_model(weights_dir, 1.0)
    assert found() == 1.0
    put_model(packaged, 2.0)
    assert found() == 2.0
    put_model(tmp_path, 3.0)
    assert found() == 3.0


def test_a_path_is_no_name(network, weights_dir):
    _weights.save(network, weights_dir / "mine")
    assert _weights.load("mine").name == "mine"
    for path in (Path("mine"), "./mine", "folder/mine"):
        with pytest.raises(ModelNotFoundError):
            _weights.load(path)


@pytest.mark.parametrize("name", ["", ".", "..", "/", "no such model", "a/b", "*"])
def test_a_model_that_does_not_exist(name, weights_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError) as error:
        _weights.load(name)
    message = str(error.value)
    assert repr(name) in message
    assert str(weights_dir) in message
    assert "'20230926_85M', '20231027_85M'" in message


@pytest.mark.parametrize("name", ["20230926_85M", "20231027_85M"])
def test_a_known_model_that_is_not_here(name, weights_dir):
    with pytest.raises(ModelNotFoundError) as error:
        _weights.load(name)
    assert f"{name}.best.ckpt and {name}.config.json" in str(error.value)
    assert str(weights_dir) in str(error.value)
    assert "OmicsML/CellPLM" in str(error.value)
    assert isinstance(error.value, FileNotFoundError)


def test_available(network, packaged, weights_dir):
    ours = {"source": "a pool", "licence": "CC0-1.0"}
    _weights.save(network, packaged / "inside", provenance=ours)
    _weights.save(network, weights_dir / "outside")
    (weights_dir / "broken").mkdir()
    (weights_dir / "broken" / "config.json").write_text("{")
    (weights_dir / "foreign").mkdir()
    (weights_dir / "foreign" / "config.json").write_text('{"model_type": "bert"}')
    shutil.copy(GOLDEN / "golden_vae.best.ckpt", weights_dir / "20231027_85M.best.ckpt")

    table = _weights.available()
    assert table.index.tolist() == ["inside", "outside", "20230926_85M", "20231027_85M"]
    assert table.index.name == "name"
    columns = ["parameters", "genes", "source", "licence", "sha256", "where"]
    assert table.columns.tolist() == columns
    inside = [count_parameters(network), 30, "a pool", "CC0-1.0"]
    assert table.loc["inside"].tolist()[:4] == inside
    assert table.loc["inside", "where"] == "package"
    assert table.loc["outside", "where"] == str(weights_dir / "outside")
    assert table.loc["outside", "sha256"] == _weights.load("outside").sha256
    assert table.loc["20230926_85M"].tolist() == [
        82_402_543,
        19_374,
        "OmicsML/CellPLM, the folder of checkpoints that its README links",
        "BSD-2-Clause",
        "",
        f"place it under {weights_dir}",
    ]
    here = weights_dir / "20231027_85M.best.ckpt"
    assert table.loc["20231027_85M", ["sha256", "where"]].tolist() == [sha256(here), str(here)]


def test_available_without_anything(packaged, tmp_path):
    with cp.settings.override(weights_dir=tmp_path / "not made yet"):
        assert _weights.available().index.tolist() == list(_weights.KNOWN)


# --- download -------------------------------------------------------------------------------------


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """Serve a folder on the loopback interface; gives the folder and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.fixture
def downloadable(server, weights_dir, monkeypatch):
    """Make "golden_vae" a known model with an address and hashes."""
    folder, url = server
    files = ("golden_vae.best.ckpt", "golden_vae.config.json")
    for file in files:
        shutil.copy(GOLDEN / file, folder)
    known = _weights.Known(
        source="a test",
        licence="BSD-2-Clause",
        parameters=1,
        n_genes=150,
        files=files,
        urls=tuple(f"{url}/{file}" for file in files),
        sha256=tuple(sha256(GOLDEN / file) for file in files),
    )
    monkeypatch.setitem(_weights.KNOWN, "golden_vae", known)
    return folder


def test_download(downloadable, weights_dir, caplog):
    with caplog.at_level(logging.INFO, "cellplm_tl"):
        model = _weights.load("golden_vae")
    assert_same(_weights.load(GOLDEN / "golden_vae").network, model.network)
    assert sorted(file.name for file in weights_dir.iterdir()) == [
        "golden_vae.best.ckpt", "golden_vae.config.json",
    ]  # fmt: skip
    assert f"golden_vae.best.ckpt to {weights_dir}" in caplog.text
    shutil.rmtree(downloadable)  # from now on there is nothing to fetch
    assert _weights.load("golden_vae").sha256 == model.sha256


def test_a_download_of_something_else(downloadable, weights_dir):
    (downloadable / "golden_vae.best.ckpt").write_bytes(b"something else")
    with pytest.raises(
        WeightsError, match="golden_vae.best.ckpt is not the file that was published"
    ):
        _weights.load("golden_vae")
    assert list(weights_dir.iterdir()) == []


def test_an_address_that_does_not_answer(downloadable, weights_dir, monkeypatch):
    known = _weights.KNOWN["golden_vae"]
    nowhere = tuple(re.sub(r":\d+/", ":9/", url) for url in known.urls)
    monkeypatch.setitem(_weights.KNOWN, "golden_vae", replace(known, urls=nowhere))
    with pytest.raises(ModelNotFoundError) as error:
        _weights.load("golden_vae")
    assert "http://127.0.0.1:9/golden_vae.best.ckpt cannot be reached" in str(error.value)
    assert f"Place the file as golden_vae.best.ckpt under {weights_dir}" in str(error.value)


def test_an_address_without_the_file(downloadable, weights_dir):
    (downloadable / "golden_vae.config.json").unlink()
    with pytest.raises(ModelNotFoundError, match="golden_vae.config.json cannot be reached .*404"):
        _weights.load("golden_vae")


# --- what the outputs of a head mean --------------------------------------------------------------


def test_a_model_keeps_what_its_outputs_mean(network, tmp_path):
    config = replace(network.config, head="types", head_outputs=2, covariates=())
    headed = CellPLM(config).eval()
    outputs = {"kind": "annotation", "labels": ["CD4+/T", "B"], "set_thresholds": [0.25, 0.5]}
    path = _weights.save(_weights.Model(headed, "types", outputs=outputs), tmp_path / "types")
    model = _weights.load(path)
    assert model.outputs == outputs
    assert_same(model.network, headed)
    again = _weights.load(_weights.save(model, tmp_path / "again"))
    assert again.outputs == outputs


def test_models_without_a_head_say_nothing_of_outputs(network, tmp_path):
    """Their config is what it was before there were outputs; stored models load as they are."""
    path = _weights.save(network, tmp_path / "plain")
    assert "outputs" not in json.loads((path / "config.json").read_text())
    assert _weights.load(path).outputs == {}
    assert _weights.load("mini").outputs == {}


# --- the state of a run ---------------------------------------------------------------------------


def test_state_of_a_run(tmp_path):
    tensors = {"a.weight": torch.randn(3, 4).T, "step": torch.tensor(3.0)}
    path = tmp_path / "state.safetensors"
    _weights.write_state(path, tensors, {"step": 3, "best_loss": 0.25})
    _weights.write_state(path, tensors, {"step": 4, "best_loss": float("inf")})
    again, scalars = _weights.read_state(path)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert scalars == {"step": 4, "best_loss": float("inf")}
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    _weights.write_state(path, {"a": torch.ones(2)}, {"step": 3})

    def no_space_left(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(_weights, "_flush", no_space_left)
    with pytest.raises(OSError, match="No space left"):
        _weights.write_state(path, {"a": torch.zeros(2)}, {"step": 4})
    tensors, scalars = _weights.read_state(path)
    assert (tensors["a"].tolist(), scalars) == ([1.0, 1.0], {"step": 3})
