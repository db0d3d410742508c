"""The one `settings` object, and the package's logger that its verbosity governs."""

from __future__ import annotations

import logging
import numbers
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellplm_tl._errors import OptionError, check_option

if TYPE_CHECKING:
    import torch

# Half of what is free leaves room for the user's own objects and for what torch allocates besides.
FREE_MEMORY_SHARE = 0.5

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")},
    **{f"{letter}IB": 1024 ** (i + 1) for i, letter in enumerate("KMGT")},
}
_LEVELS = {0: logging.WARNING, 1: logging.INFO}


class _LastResortHandler(logging.StreamHandler):
    """Show records on standard error as long as the application has set up no logging of its own.

    Python's own last resort does the same, but from warnings upwards; in a notebook nobody
    configures logging, and a line that says what was written where must be seen.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.root.handlers:
            self.stream = sys.stderr  # looked up late: notebooks and tests exchange it
            super().emit(record)


logger = logging.getLogger("cellplm_tl")
logger.addHandler(_LastResortHandler())


class Settings:
    """What holds for all calls: device, precision, memory, directories, verbosity.

    One object of this class exists, ``cp.settings``. Attributes are checked when they are set;
    a value that is not allowed raises an error and changes nothing. Seeds are no setting: they are
    the parameter ``random_state`` of each function.

    Examples
    --------
    >>> import cellplm_tl as cp
    >>> cp.settings.memory_budget = "4GB"
    >>> cp.settings.memory_budget
    4000000000
    >>> cp.settings.memory_budget = None  # back to a share of what is free
    >>> with cp.settings.override(device="cpu", verbosity=0):
    ...     print(cp.settings.device)
    cpu
    """

    __slots__ = (
        "_device",
        "_memory_budget",
        "_precision",
        "_progress",
        "_scratch_dir",
        "_verbosity",
        "_weights_dir",
    )

    def __init__(self) -> None:
        self.device = "auto"
        self.precision = "fp32"
        self.memory_budget = None
        self.weights_dir = None
        self.scratch_dir = None
        self.verbosity = 1
        self.progress = None

    @property
    def device(self) -> str:
        """Where networks run.

        ``"auto"`` (a CUDA device if there is one, else the CPU), ``"cpu"``, ``"cuda"``,
        ``"cuda:0"`` (any number) or ``"mps"``.
        """
        return self._device

    @device.setter
    def device(self, value: str) -> None:
        _check_device("settings.device", value)
        self._device = value

    @property
    def precision(self) -> str:
        """Number format of matrix products: ``"fp32"``, or ``"bf16"`` where the hardware has it."""
        return self._precision

    @precision.setter
    def precision(self, value: str) -> None:
        check_option("settings.precision", value, ("fp32", "bf16"))
        self._precision = value

    @property
    def memory_budget(self) -> int | None:
        """Bytes of main memory that one call may use beside its input.

        Set as a number of bytes or as text (``"4GB"``, ``"512 MiB"``). ``None``, the default, is
        half of what is free when the call begins. The budget changes time, never a result.
        """
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, value: int | float | str | None) -> None:
        self._memory_budget = None if value is None else _parse_bytes(value)

    @property
    def weights_dir(self) -> Path:
        """Directory of models that do not come with the package.

        ``None`` sets the default: the environment variable ``CELLPLM_WEIGHTS_DIR``, else the
        user's cache directory. It is made when a model is first put there.
        """
        if self._weights_dir is not None:
            return self._weights_dir
        if directory := os.environ.get("CELLPLM_WEIGHTS_DIR"):
            return Path(directory).expanduser()
        import pooch  # here: it brings an HTTP client along that most calls do not need

        return Path(pooch.os_cache("cellplm_tl"))

    @weights_dir.setter
    def weights_dir(self, value: str | os.PathLike[str] | None) -> None:
        directory = None if value is None else _to_path("settings.weights_dir", value)
        if directory is not None and directory.exists() and not directory.is_dir():
            raise OptionError(
                f"settings.weights_dir must be a directory; {str(directory)!r} is a file."
            )
        self._weights_dir = directory

    @property
    def scratch_dir(self) -> Path:
        """Existing directory for what does not fit into the memory budget.

        ``None`` sets the default, the system's directory of temporary files. Where that is kept in
        memory, as ``/tmp`` is on some systems, name a directory on a disk.
        """
        return self._scratch_dir or Path(tempfile.gettempdir())

    @scratch_dir.setter
    def scratch_dir(self, value: str | os.PathLike[str] | None) -> None:
        directory = None if value is None else _to_path("settings.scratch_dir", value)
        if directory is not None and not directory.is_dir():
            raise OptionError(
                f"settings.scratch_dir must be an existing directory; {str(directory)!r} is none. "
                "Make it first."
            )
        self._scratch_dir = directory

    @property
    def verbosity(self) -> int:
        """``0``: warnings only. ``1``: also what is done and what was written where."""
        return self._verbosity

    @verbosity.setter
    def verbosity(self, value: int) -> None:
        check_option("settings.verbosity", value, _LEVELS)
        self._verbosity = value
        logger.setLevel(_LEVELS[value])

    @property
    def progress(self) -> bool | None:
        """Whether calls show a bar. ``None``: in a terminal or a notebook. Never at verbosity 0."""
        return self._progress

    @progress.setter
    def progress(self, value: bool | None) -> None:
        check_option("settings.progress", value, (None, True, False))
        self._progress = value

    def budget_bytes(self) -> int:
        """Give the memory budget in bytes, measured now where it is a share of what is free.

        Returns
        -------
        int
            Bytes of main memory that a call may use beside its input.

        Examples
        --------
        >>> import cellplm_tl as cp
        >>> with cp.settings.override(memory_budget="512MiB"):
        ...     cp.settings.budget_bytes()
        536870912
        """
        if self._memory_budget is not None:
            return self._memory_budget
        return int(FREE_MEMORY_SHARE * free_memory())

    def torch_device(self, device: str | None = None) -> torch.device:
        """Give the torch device to run on, after looking whether it is there.

        Parameters
        ----------
        device : str, optional
            A value that :attr:`device` allows; by default that of the settings. ``"auto"`` never
            means ``"mps"``: it has no double precision, which sums over a context use.

        Returns
        -------
        torch.device
            The device.

        Raises
        ------
        OptionError
            The value is not allowed, or torch sees no such device.

        Examples
        --------
        >>> import cellplm_tl as cp
        >>> cp.settings.torch_device("cpu")
        device(type='cpu')
        """
        import torch  # here: reading a setting must not load torch

        name = self.device if device is None else device
        _check_device("device", name)
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        found = torch.device(name)
        if found.type == "cuda":
            n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
            there = (found.index or 0) < n_devices
            seen = f"{n_devices} CUDA devices"
        else:
            there = found.type == "cpu" or torch.backends.mps.is_available()
            seen = "no MPS device"
        if not there:
            raise OptionError(
                f"device={name!r} was asked for, but torch sees {seen} here. "
                "Use device='auto' or device='cpu', or install a torch made for this hardware."
            )
        return found

    def show_progress(self) -> bool:
        """Tell whether a call should show a bar.

        Returns
        -------
        bool
            :attr:`progress`, with ``None`` settled by whether anybody watches standard error;
            always false at verbosity 0.

        Examples
        --------
        >>> import cellplm_tl as cp
        >>> with cp.settings.override(progress=True, verbosity=0):
        ...     cp.settings.show_progress()
        False
        """
        if self._verbosity == 0:
            return False
        if self._progress is not None:
            return self._progress
        return sys.stderr.isatty() or _in_notebook()

    @contextmanager
    def override(self, **values: Any) -> Iterator[Settings]:
        """Change settings inside a ``with`` block, and change them back at its end.

        Parameters
        ----------
        **values : object
            Settings by name.

        Returns
        -------
        context manager
            It gives the settings.

        Raises
        ------
        OptionError
            A name is no setting, or a value is not allowed; then nothing has changed.

        Examples
        --------
        >>> import cellplm_tl as cp
        >>> with cp.settings.override(precision="bf16") as settings:
        ...     settings.precision
        'bf16'
        >>> cp.settings.precision
        'fp32'
        """
        names = [slot.removeprefix("_") for slot in self.__slots__]
        for name in values:
            check_option("a setting", name, names)
        # The stored values, not the read ones: a default that is looked up late must stay one.
        before = {slot: getattr(self, slot) for slot in self.__slots__}
        try:
            for name, value in values.items():
                setattr(self, name, value)
            yield self
        finally:
            for slot, value in before.items():
                setattr(self, slot, value)
            logger.setLevel(_LEVELS[self._verbosity])

    def __repr__(self) -> str:
        names = [slot.removeprefix("_") for slot in self.__slots__]
        return "\n".join(["Settings", *(f"    {name} = {getattr(self, name)!r}" for name in names)])


def _check_device(name: str, value: Any) -> None:
    if not (isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", value)):
        raise OptionError(
            f"{name} must be 'auto', 'cpu', 'cuda', 'cuda:0' (any number) or 'mps'; got {value!r}."
        )


def _parse_bytes(value: Any) -> int:
    """Give the bytes that a number or a text like ``"4GB"`` stands for."""
    n_bytes = 0.0
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        if match and match[2].upper() in _UNITS:
            n_bytes = float(match[1]) * _UNITS[match[2].upper()]
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        n_bytes = float(value)
    if not 1 <= n_bytes < float("inf"):
        raise OptionError(
            "settings.memory_budget must be None, a number of bytes above 0, or a text like "
            f"'4GB' or '512MiB'; got {value!r}."
        )
    return int(n_bytes)


def _to_path(name: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise OptionError(f"{name} must be a path or None; got {value!r}.")
    return Path(value).expanduser()


def free_memory() -> int:
    """Bytes of main memory that this process can still get: of the machine, and of its cgroup."""
    import psutil

    free = psutil.virtual_memory().available
    return max(0, min([free, *_free_in_cgroups()]))


def _free_in_cgroups(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Free bytes under each memory limit that a container or a job scheduler has set (Linux).

    psutil sees the whole machine; a job that is given 32 GB of a node with 1 TB ends when it takes
    half of the terabyte. Files: the kernel's documents cgroup-v2 and cgroup-v1/memory.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / path.strip("/")
        # A limit on a group holds for all below it. In a container the path may not exist here.
        for directory in (group, *group.parents):
            if not directory.is_relative_to(top):
                break
            try:
                limit_bytes = int((directory / limit).read_text())  # "max" where there is none
                used_bytes = int((directory / used).read_text())
                rows = (directory / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):
                continue
            stat = dict(row.split() for row in rows)
            # The page cache of files read earlier counts as used, but is given back on demand.
            # v1 has two rows, of which "total" covers the groups below; v2 has that one only.
            cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            yield limit_bytes - used_bytes + cache


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


settings = Settings()
