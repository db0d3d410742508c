from __future__ import annotations

import logging
import subprocess
import sys
import types
from pathlib import Path

import psutil
import pytest
import torch

from cellplm_tl import _settings
from cellplm_tl._errors import OptionError
from cellplm_tl._settings import Settings, logger


@pytest.fixture
def settings():
    """Give settings of our own: those of the package stay as they are."""
    level = logger.level
    yield Settings()
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "gpu"),
        ("device", "cuda:"),
        ("device", "cuda:0\n"),
        ("device", 0),
        ("precision", "fp16"),
        ("precision", None),
        ("memory_budget", 0),
        ("memory_budget", -1),
        ("memory_budget", 0.5),
        ("memory_budget", True),
        ("memory_budget", float("nan")),
        ("memory_budget", float("inf")),
        ("memory_budget", "4 GB of memory"),
        ("memory_budget", "GB"),
        ("memory_budget", "0 GB"),
        ("memory_budget", "-4GB"),
        ("weights_dir", 3),
        ("weights_dir", ""),
        ("weights_dir", __file__),
        ("scratch_dir", __file__),
        ("scratch_dir", "/no/such/directory"),
        ("verbosity", 2),
        ("verbosity", True),
        ("verbosity", "1"),
        ("progress", 1),
        ("progress", "auto"),
    ],
)
def test_a_bad_value_is_an_error_that_names_it_and_changes_nothing(settings, name, value):
    before = repr(settings)
    with pytest.raises(OptionError, match=f"settings.{name} must be") as error:
        setattr(settings, name, value)
    assert repr(value) in str(error.value)
    assert repr(settings) == before


def test_a_mistyped_name_is_an_error(settings):
    with pytest.raises(AttributeError):
        settings.verbose = 0


@pytest.mark.parametrize(
    ("value", "n_bytes"),
    [
        (1, 1),
        (4e9, 4_000_000_000),
        ("123", 123),
        ("7B", 7),
        ("4GB", 4_000_000_000),
        (" 1.5 kb ", 1500),
        ("512MiB", 536_870_912),
        ("2 TiB", 2_199_023_255_552),
    ],
)
def test_memory_budget_is_understood_as_bytes(settings, value, n_bytes):
    settings.memory_budget = value
    assert settings.memory_budget == settings.budget_bytes() == n_bytes


def test_default_budget_is_half_of_what_is_free_now(settings, monkeypatch):
    monkeypatch.setattr(_settings, "_free_in_cgroups", lambda: iter(()))
    for free in (10_000, 3_000):
        memory = types.SimpleNamespace(available=free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        assert settings.budget_bytes() == free // 2


@pytest.mark.parametrize(("in_cgroup", "free"), [(7_000, 7_000), (20_000, 10_000), (-5, 0)])
def test_the_limit_of_a_container_counts(monkeypatch, in_cgroup, free):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=10_000))
    monkeypatch.setattr(_settings, "_free_in_cgroups", lambda: iter([in_cgroup]))
    assert _settings.free_memory() == free


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)


def test_limits_of_cgroup_2_are_read_from_the_group_and_all_above_it(tmp_path):
    root = tmp_path / "cgroup"
    write(root, cgroup__controllers="memory")  # the top has no limit
    write(root / "job", memory__max="1000\n", memory__current="700\n", memory__stat="anon 400\n")
    step = {"memory__max": "max\n", "memory__current": "600\n", "memory__stat": "anon 1\n"}
    write(root / "job/step", **step)
    task = {"memory__max": "900\n", "memory__current": "600\n"}
    write(root / "job/step/task", **task, memory__stat="anon 400\ninactive_file 150\n")
    write(tmp_path, cgroup_of_self="0::/job/step/task\n")
    free = list(_settings._free_in_cgroups(tmp_path / "cgroup_of_self", root))
    assert free == [900 - 600 + 150, 1000 - 700]


def test_limits_of_cgroup_1_are_read_from_the_memory_controller(tmp_path):
    root = tmp_path / "cgroup"
    stat = "inactive_file 1\ntotal_inactive_file 50\n"
    files = {"memory__limit_in_bytes": "1000\n", "memory__usage_in_bytes": "700\n"}
    write(root / "memory/job", **files, memory__stat=stat)
    write(tmp_path, cgroup_of_self="3:cpu,cpuacct:/job\n2:memory:/job\n0::/\n")
    assert list(_settings._free_in_cgroups(tmp_path / "cgroup_of_self", root)) == [350]


def test_no_cgroups_no_limit(tmp_path):
    assert list(_settings._free_in_cgroups(tmp_path / "none", tmp_path)) == []


def test_weights_dir_comes_from_the_setting_then_the_environment_then_the_cache(
    settings, monkeypatch, tmp_path
):
    monkeypatch.delenv("CELLPLM_WEIGHTS_DIR", raising=False)
    cache = settings.weights_dir
    assert "cellplm_tl" in cache.parts
    monkeypatch.setenv("CELLPLM_WEIGHTS_DIR", str(tmp_path / "by_environment"))
    assert settings.weights_dir == tmp_path / "by_environment"
    settings.weights_dir = str(tmp_path / "not_there_yet")
    assert settings.weights_dir == tmp_path / "not_there_yet"
    settings.weights_dir = "~/weights"
    assert settings.weights_dir == Path.home() / "weights"
    settings.weights_dir = None
    assert settings.weights_dir == tmp_path / "by_environment"


def test_scratch_dir_is_a_directory_that_exists(settings, tmp_path):
    assert settings.scratch_dir.is_dir()
    settings.scratch_dir = tmp_path
    assert settings.scratch_dir == tmp_path


def test_torch_device_follows_the_setting_unless_told_otherwise(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert settings.torch_device() == torch.device("cuda")
    settings.device = "cuda:1"
    assert settings.torch_device() == torch.device("cuda:1")
    assert settings.torch_device("cpu") == torch.device("cpu")
    with pytest.raises(OptionError, match="^device='cuda:2' was asked for, but torch sees 2 CUDA"):
        settings.torch_device("cuda:2")


def test_torch_device_without_a_gpu(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settings.torch_device() == torch.device("cpu")
    with pytest.raises(OptionError, match=r"sees 0 CUDA devices here\. Use device='auto'"):
        settings.torch_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(OptionError, match="sees no MPS device"):
        settings.torch_device("mps")
    with pytest.raises(OptionError, match="^device must be 'auto'"):
        settings.torch_device("tpu")


@pytest.mark.parametrize(
    ("verbosity", "progress", "watched", "shown"),
    [
        (1, None, True, True),
        (1, None, False, False),
        (1, True, False, True),
        (1, False, True, False),
        (0, None, True, False),
        (0, True, True, False),
    ],
)
def test_when_a_bar_is_shown(settings, monkeypatch, verbosity, progress, watched, shown):
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: watched))
    settings.verbosity, settings.progress = verbosity, progress
    assert settings.show_progress() is shown


@pytest.mark.parametrize(
    ("shell", "shown"),
    [(None, False), ({}, False), ({"IPKernelApp": {}}, True)],
    ids=["no shell", "terminal", "notebook"],
)
def test_a_notebook_watches_too(settings, monkeypatch, shell, shown):
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: False))
    running = None if shell is None else types.SimpleNamespace(config=shell)
    ipython = types.SimpleNamespace(get_ipython=lambda: running)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert settings.show_progress() is shown


def test_override_changes_back_after_an_error_too(settings):
    before = repr(settings)
    with pytest.raises(ZeroDivisionError), settings.override(device="cpu", verbosity=0):
        assert (settings.device, logger.level) == ("cpu", logging.WARNING)
        1 / 0  # noqa: B018
    assert repr(settings) == before
    assert logger.level == logging.INFO


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"device": "cpu", "precision": "fp8"}, "settings.precision must be one of"),
        ({"device": "cpu", "dtype": "int8"}, "a setting must be one of 'device', .*; got 'dtype'"),
    ],
)
def test_override_takes_all_or_nothing(settings, values, sentence):
    before = repr(settings)
    with pytest.raises(OptionError, match=sentence), settings.override(**values):
        pass
    assert repr(settings) == before


def test_override_leaves_a_default_a_default(settings, monkeypatch, tmp_path):
    with settings.override(weights_dir=tmp_path, memory_budget=1):
        pass
    monkeypatch.setenv("CELLPLM_WEIGHTS_DIR", str(tmp_path / "later"))
    assert settings.weights_dir == tmp_path / "later"
    assert settings.memory_budget is None


def python(code: str) -> str:
    """Run code as a script would, without pytest's own logging; return its standard error."""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stderr


def test_an_info_line_is_seen_where_nobody_set_up_logging():
    shown = python(
        "from cellplm_tl._settings import logger, settings\n"
        "logger.info('first')\n"
        "settings.verbosity = 0\n"
        "logger.info('second'); logger.warning('third')\n"
    )
    assert shown == "first\nthird\n"


def test_an_application_that_set_up_logging_has_it_its_way():
    shown = python(
        "import logging; from cellplm_tl._settings import logger\n"
        "logging.basicConfig(format='app: %(message)s')\n"
        "logger.info('once')\n"
    )
    assert shown == "app: once\n"
