"""One loop for all training: optimiser, schedule, averaging, validation, early stop, resume, log.

A step is a pure function of the weights, the optimiser's state and the step's number: everything
random in it is drawn from the seed and that number. So the state to keep is small, and a run that
was killed goes on to the same weights.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cellplm_tl._errors import OptionError, TrainingError, check_option
from cellplm_tl._settings import logger, settings
from cellplm_tl._weights import read_state, write_state
from cellplm_tl.models import CellPLM

Terms = dict[str, Tensor]  # named scalars of a step; "loss" is what is minimised
STRATEGIES = ("auto", "head", "full")
STATE = "state.safetensors"
LOG = "log.csv"


LEFT_OPEN: Any = None  # in a config, for the tool to fill in
# What pretraining takes for what a config leaves open (learning rate and decay: Table 5).
PRETRAINING: dict[str, Any] = {
    "steps": 1000,
    "learning_rate": 2e-4,
    "weight_decay": 1e-8,
    "warmup": 100,
    "average": 0.999,
    "validate_every": 200,
    "patience": 20,
}


@dataclass(frozen=True)
class TrainConfig:
    """How weights are trained; what is None is left to the tool, whose page says its values.

    Parameters
    ----------
    strategy : {"auto", "head", "full"}
        What a tool trains. `"head"`: the head (or decoder) on top of frozen latents; `"full"`: all
        weights but those of a spectrum; `"auto"`: the tool's choice, which its page tells.
        Pretraining trains all.
    steps : int, optional
        Number of updates; the schedule ends there. 1,000 in pretraining.
    learning_rate, weight_decay : float, optional
        Of AdamW. In pretraining 2e-4 and 1e-8 (Table 5).
    warmup : int, optional
        Steps of linear warm-up, after which a cosine leads to `final_rate` of the learning rate.
    final_rate : float
        Share of the learning rate at the last step.
    gradient_clip : float
        Largest norm of a step's gradient.
    average : float, optional
        Decay of the exponential moving average of the weights, which is what is validated and kept;
        0 for none.
    validate_every, patience : int, optional
        Steps between validations, and validations without a new best after which training stops.
    validation_share : float
        Share of a tool's training material that is held out to choose by.
    save_every : int
        Steps between saved states.
    precision : {"fp32", "bf16"}
        Of the matrix products.
    seed : int
        Of everything random.

    Examples
    --------
    >>> import cellplm_tl as cp
    >>> config = cp.train.TrainConfig(strategy="full", learning_rate=1e-3)
    >>> filled = config.filled(steps=300, learning_rate=2e-4)
    >>> filled.steps, filled.learning_rate
    (300, 0.001)
    """

    strategy: str = "auto"
    steps: int = LEFT_OPEN
    learning_rate: float = LEFT_OPEN
    weight_decay: float = LEFT_OPEN
    warmup: int = LEFT_OPEN
    final_rate: float = 0.05
    gradient_clip: float = 2.0
    average: float = LEFT_OPEN
    validate_every: int = LEFT_OPEN
    patience: int = LEFT_OPEN
    validation_share: float = 0.1
    save_every: int = 200
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        check_option("strategy", self.strategy, STRATEGIES)
        if not 0 < self.validation_share < 1:
            raise OptionError(f"validation_share must lie in (0, 1), not {self.validation_share}.")
        for name in ("steps", "validate_every", "patience", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} must be at least 1, not {value}.")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise OptionError(f"learning_rate must be positive, not {self.learning_rate}.")
        if self.average is not None and not 0 <= self.average < 1:
            raise OptionError(f"average must lie in [0, 1), not {self.average}.")
        if self.precision not in ("fp32", "bf16"):
            raise OptionError(f"precision must be 'fp32' or 'bf16', not {self.precision!r}.")

    @classmethod
    def release(cls, task: str) -> TrainConfig:
        """Return the official release's settings for `"annotation"`, as far as they carry over.

        AdamW at 5e-3 with decay 1e-7, 30 steps of warm-up, gradients clipped at 2, up to 2,000
        steps, stopped after 200 validations without a new best. Different on purpose: one learning
        rate for all that is trained (the spectrum, or there the embedder at 5e-4, is not), a cosine
        instead of a plateau that was stepped on noise (its fault F22), the best by log loss, and no
        step that sees the cells to be annotated (F23).
        """
        check_option("task", task, ("annotation",))
        return cls(
            strategy="full",
            steps=2000,
            learning_rate=5e-3,
            weight_decay=1e-7,
            warmup=30,
            average=0.0,
            validate_every=1,
            patience=200,
        )

    def filled(self, **values: Any) -> TrainConfig:
        """Return the config with values for what was left to the tool."""
        return replace(self, **{n: v for n, v in values.items() if getattr(self, n) is None})

    def rate(self, step: int) -> float:
        """Return the learning rate of a step (from 0); of a config that is filled."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


def fit(
    network: CellPLM,
    objective: Callable[[CellPLM, int], Terms],
    config: TrainConfig,
    *,
    validate: Callable[[CellPLM], float] | None = None,
    folder: Path | None = None,
) -> CellPLM:
    """Train a network in place and leave its best weights in it.

    Parameters
    ----------
    network : CellPLM
        Its parameters that require a gradient are trained.
    objective : callable
        (network, step) → the step's terms. Must draw all that is random from the step's number.
    config : TrainConfig
        How; what it leaves open is as in pretraining.
    validate : callable, optional
        Network → loss on held-out material; without it the last (averaged) weights are kept.
    folder : Path, optional
        Where state and log are kept; a run found there is continued.

    Raises
    ------
    TrainingError
        A loss or gradient became NaN or infinite; the last saved state is intact.
    """
    config = config.filled(**PRETRAINING)
    run = _Run(network, config, folder)
    run.resume()
    bar = tqdm(
        total=config.steps,
        initial=run.step,
        desc="training",
        unit="step",
        disable=not settings.show_progress(),
    )
    with bar:
        while run.step < config.steps and run.stale < config.patience:
            terms = run.update(objective)
            bar.update()
            bar.set_postfix(loss=f"{terms['loss']:.4f}", refresh=False)
            last = run.step == config.steps
            if validate is not None and (run.step % config.validate_every == 0 or last):
                run.validated(validate)
            if run.step % config.save_every == 0 or last or run.stale >= config.patience:
                run.save()
    run.finish(keep_best=validate is not None)
    return network


def _read_rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [
            {
                key: int(value) if key == "step" else float(value)
                for key, value in row.items()
                if value
            }
            for row in csv.DictReader(file)
        ]


class _Run:
    """The state of a run: what it takes to go on."""

    def __init__(self, network: CellPLM, config: TrainConfig, folder: Path | None):
        self.network, self.config, self.folder = network, config, folder
        self.trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.AdamW(
            self.trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}
        self.best = {name: p.clone() for name, p in self.average.items()}
        self.best_loss = math.inf
        self.step = 0
        self.stale = 0  # validations since the best
        self.rows: list[dict[str, float]] = []

    def update(self, objective: Callable[[CellPLM, int], Terms]) -> dict[str, float]:
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.rate(self.step)
        self.network.train()
        bf16 = self.config.precision == "bf16"
        with (
            _seeded(self.config.seed, self.step),
            torch.autocast(
                next(iter(self.trained.values())).device.type, torch.bfloat16, enabled=bf16
            ),
        ):
            terms = objective(self.network, self.step)
        values = {name: float(term.detach()) for name, term in terms.items()}
        self._check_finite("the loss", values["loss"], values)
        self.optimiser.zero_grad(set_to_none=True)
        terms["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.gradient_clip)
        self._check_finite("the gradient", float(norm), values)
        self.optimiser.step()
        self.step += 1
        decay = min(self.config.average, self.step / (self.step + 10))
        with torch.no_grad():
            for name, parameter in self.trained.items():
                self.average[name].lerp_(parameter, 1 - decay)
        self.rows.append({"step": self.step, **values, "gradient": float(norm)})
        return values

    def _check_finite(self, what: str, value: float, terms: dict[str, float]) -> None:
        """Stop before a number that is none reaches the weights or their saved state."""
        if not math.isfinite(value):
            where = f"; the last good state is in {self.folder}" if self.folder else ""
            raise TrainingError(
                f"{what} became {value} at step {self.step} ({terms}){where}. "
                "Lower the learning rate or look at that step's data."
            )

    def validated(self, validate: Callable[[CellPLM], float]) -> None:
        with self._weights(self.average), torch.no_grad(), _seeded(self.config.seed, 0):
            self.network.eval()
            loss = validate(self.network)
        self._check_finite("the validation loss", loss, self.rows[-1])
        self.rows[-1]["validation"] = loss
        logger.info("step %d: validation loss %.5f", self.step, loss)
        if loss < self.best_loss:
            self.best_loss, self.stale = loss, 0
            self.best = {name: p.clone() for name, p in self.average.items()}
        else:
            self.stale += 1

    def finish(self, *, keep_best: bool) -> None:
        """Leave the best (or the last averaged) weights in the network."""
        weights = self.best if keep_best and math.isfinite(self.best_loss) else self.average
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])
        self.network.eval()

    @contextmanager
    def _weights(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Put other weights into the network for a while."""
        own = {name: p.detach().clone() for name, p in self.trained.items()}
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(own[name])

    def save(self) -> None:
        """Write state and log aside and move them into place."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, parameter in self.trained.items():
            tensors[f"weights.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self.average[name]
            tensors[f"best.{name}"] = self.best[name]
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        scalars = {"step": self.step, "stale": self.stale, "best_loss": self.best_loss}
        write_state(self.folder / STATE, tensors, scalars)
        self._write_log()

    def resume(self) -> None:
        """Continue from the folder's state, if there is one."""
        if self.folder is None or not (self.folder / STATE).is_file():
            return
        tensors, scalars = read_state(self.folder / STATE)
        expected = {f"weights.{name}" for name in self.trained}
        found = {name for name in tensors if name.startswith("weights.")}
        if expected != found:
            raise TrainingError(
                f"{self.folder / STATE} belongs to another network "
                f"({len(expected ^ found)} tensors differ); choose another folder."
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"weights.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
                self.best[name].copy_(tensors[f"best.{name}"])
                # A parameter that no loss has reached has no state yet.
                if f"exp_avg.{name}" in tensors:
                    self.optimiser.state[parameter] = {
                        key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                    }
        self.step, self.stale = int(scalars["step"]), int(scalars["stale"])
        self.best_loss = scalars["best_loss"]
        self._read_log()
        logger.info("continuing at step %d from %s", self.step, self.folder)

    def _write_log(self) -> None:
        assert self.folder is not None
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        aside = self.folder / f".{LOG}"
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        aside.replace(self.folder / LOG)

    def _read_log(self) -> None:
        assert self.folder is not None
        if (self.folder / LOG).is_file():
            self.rows = [r for r in _read_rows(self.folder / LOG) if r["step"] <= self.step]


@contextmanager
def _seeded(seed: int, step: int) -> Iterator[None]:
    """Seed PyTorch for one step (dropout, latent noise), and give its generator back after."""
    with torch.random.fork_rng():
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)
        yield
