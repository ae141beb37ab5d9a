"""A run: from a recipe to checkpoints, resumable at any moment.

    RUN/recipe.toml               the recipe; a run has one
    RUN/checkpoints/step-N/       the last checkpoint, and the best one
    RUN/best -> checkpoints/...   the checkpoint to export: the best validation AUC so far
    RUN/metrics.jsonl, tensorboard/
    RUN/result.json               when finished

A killed run goes on from its last checkpoint and ends with the same bits as one that was not killed: the order of
samples follows from seed and epoch alone, nothing else is random, and checkpoints hold all other state.

Main path: `train` -> `_Run.resume` -> `_Run.loop` -> `_Run.finish`.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dlrm_deploy.bundle import Golden
from dlrm_deploy.checkpoint import MODEL_PREFIX, TRAINER, Checkpoint, save_checkpoint
from dlrm_deploy.config import ModelConfig, from_mapping
from dlrm_deploy.data.dataset import Dataset, FloatArray, Splits
from dlrm_deploy.errors import CheckpointError, ConfigError, DlrmDeployError, OutputError
from dlrm_deploy.files import atomic_file, output_errors
from dlrm_deploy.metrics import auc, calibration, log_loss
from dlrm_deploy.model.dlrm import DLRM
from dlrm_deploy.model.keys import dense_shapes, table_key
from dlrm_deploy.train.log import RunLog
from dlrm_deploy.train.recipe import Recipe
from dlrm_deploy.train.row_wise_adagrad import RowWiseAdagrad

RECIPE = "recipe.toml"
CHECKPOINTS = "checkpoints"
BEST = "best"
RESULT = "result.json"
GOLDEN_ROWS = 64

_EVALUATION_ROWS = 4096
_STEP_FOLDER = re.compile(r"step-(\d+)")


class TrainingError(DlrmDeployError):
    """Training cannot go on."""


class Reporter(Protocol):
    """Is told how a run goes."""

    def started(self, step: int, steps: int) -> None:
        """Training goes on from `step`, 0 for a new run, and ends at `steps` at the latest."""

    def stepped(self, step: int, loss: float) -> None: ...

    def evaluated(self, step: int, auc: float, log_loss: float, improved: bool) -> None:
        """The validation split was scored."""


class Silent:
    """A reporter that tells nobody."""

    def started(self, step: int, steps: int) -> None: ...

    def stepped(self, step: int, loss: float) -> None: ...

    def evaluated(self, step: int, auc: float, log_loss: float, improved: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What `result.json` holds."""

    steps: int
    """Steps trained, up to the early stop."""

    best_step: int
    validation_auc: float
    validation_log_loss: float
    test_auc: float
    test_log_loss: float
    test_calibration: float


@dataclass(kw_only=True, slots=True)
class _State:
    """What `trainer.json` says about the run. Building one from values that make no sense raises `ConfigError`."""

    step: int
    best_step: int
    """0 before the first evaluation, and then the next two mean nothing."""

    best_auc: float
    best_log_loss: float
    stale: int
    """Evaluations since the best one."""

    stopped: bool
    threads: int
    """CPU threads. A resumed run takes the same number, on whatever machine."""

    def __post_init__(self) -> None:
        counts = all(type(n) is int and n >= 0 for n in (self.step, self.best_step, self.stale, self.threads))
        if (
            not counts
            or not _are_finite(self.best_auc, self.best_log_loss)
            or type(self.stopped) is not bool
            or self.best_step > self.step
            or self.threads < 1
        ):
            raise ConfigError(f"{TRAINER}: these values make no sense: {asdict(self)}.")

    @classmethod
    def read(cls, checkpoint: Checkpoint, step: int) -> _State:
        """That of the checkpoint of a step.

        Raises:
            CheckpointError: damaged, or of another step.
        """
        try:
            state = from_mapping(cls, checkpoint.trainer_state(), TRAINER)
            if state.step != step:
                raise ConfigError(f"{TRAINER}: it is of step {state.step}, in the folder of step {step}.")
        except ConfigError as err:
            raise CheckpointError(
                f"{checkpoint.path} is damaged: {err} Remove it to go on from an earlier one."
            ) from err
        return state


def _are_finite(*values: object) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)  # type: ignore[arg-type]  # a number


def train(recipe: Recipe, out: Path, reporter: Reporter | None = None) -> TrainingResult:
    """Train until the recipe says stop; go on from the last checkpoint in `out`, if there is one.

    Args:
        recipe: what to train.
        out: the RUN folder; made, or of an earlier call with the same recipe. A finished run is not run again.
        reporter: is told about progress.

    Raises:
        ConfigError: `out` holds a run of another recipe, or model and data do not go together.
        OutputError: `out` cannot be written, holds something else, or another process is training there.
        DataError, CheckpointError: data or the checkpoint to resume from is damaged.
        TrainingError: the loss is not finite any more.
    """
    with _claim(out, recipe):
        if (finished := finished_result(out)) is not None:
            return finished
        run = _Run(recipe, out, reporter or Silent())
        run.resume()
        run.loop()
        return run.finish()


def finished_result(out: Path) -> TrainingResult | None:
    """The result of the finished run in `out`; None where it is not finished.

    Raises:
        TrainingError: `result.json` is damaged.
    """
    path = out / RESULT
    try:
        result = from_mapping(TrainingResult, json.loads(path.read_text(encoding="utf-8")), "values")
        if not _are_finite(*asdict(result).values()):
            raise ValueError("a value is no number.")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:  # a ConfigError is a ValueError
        raise TrainingError(
            f"cannot read {path}: {str(err).rstrip('.')}. Remove it: the same command then scores the best checkpoint "
            "again, without training."
        ) from err
    return result


@contextmanager
def _claim(out: Path, recipe: Recipe) -> Iterator[None]:
    """Make `out`, or see that it is a run of this recipe; hold it against other processes."""
    with output_errors(out):
        if out.is_dir() and any(out.iterdir()) and not (out / RECIPE).exists() and not (out / ".lock").exists():
            raise OutputError(f"{out} holds something that is not a run. Choose an empty folder for --out.")
        (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise OutputError(f"another process is training in {out}. Wait for it, or choose another --out.") from err
        # A run that failed before its first checkpoint, over a typo in the recipe say, binds nobody.
        begun = (out / RESULT).exists() or any((out / CHECKPOINTS).iterdir())
        if not begun or not (out / RECIPE).exists():
            with atomic_file(out / RECIPE) as partial:
                partial.write_text(recipe.to_toml(), encoding="utf-8")
        elif (earlier := Recipe.read(out / RECIPE)) != recipe:
            raise ConfigError(
                f"{out} is a run of another recipe ({_difference(earlier, recipe)}). Choose another --out, go on with "
                f"{out / RECIPE}, or remove {out} to start again."
            )
        yield


def _difference(earlier: Recipe, now: Recipe) -> str:
    """The first value that differs."""
    old, new = asdict(earlier), asdict(now)
    for section, values in new.items():
        for key in {**old[section], **values}:
            if old[section].get(key) != values.get(key):
                return f"[{section}] {key} was {old[section].get(key)}, now it is {values.get(key)}"
    raise AssertionError("the recipes are equal")


class _Run:
    def __init__(self, recipe: Recipe, out: Path, reporter: Reporter) -> None:
        self._recipe = recipe.train
        self._out = out
        self._reporter = reporter
        threads = self._recipe.threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)
        self._config: ModelConfig
        self._splits: Splits
        self._config, self._splits = recipe.load()
        self._model = DLRM(self._config, seed=self._recipe.seed)
        options = recipe.optimizer
        dense = [p for name, p in self._model.named_parameters() if not name.startswith("group_weights")]
        self._dense_optimizer: torch.optim.Optimizer
        if options.mlp == "adagrad":
            self._dense_optimizer = torch.optim.Adagrad(
                dense, lr=options.mlp_lr, weight_decay=options.mlp_weight_decay, eps=options.eps
            )
        else:
            self._dense_optimizer = torch.optim.SGD(dense, lr=options.mlp_lr, weight_decay=options.mlp_weight_decay)
        self._table_optimizer = RowWiseAdagrad(
            self._model.group_weights, lr=options.table_lr, eps=options.eps, weight_decay=options.table_weight_decay
        )
        self._steps_per_epoch = math.ceil(len(self._splits.train) / self._recipe.batch_size)
        self._steps = self._recipe.steps or (self._recipe.epochs or 0) * self._steps_per_epoch
        self._state = _State(
            step=0, best_step=0, best_auc=0.0, best_log_loss=0.0, stale=0, stopped=False, threads=threads
        )

    def resume(self) -> None:
        """Go back to the last checkpoint, if there is one, and forget what came after it."""
        with output_errors(self._out):
            for left in (self._out / CHECKPOINTS).glob(".*"):  # of a killed run
                shutil.rmtree(left)
        steps = [
            int(match[1])
            for path in (self._out / CHECKPOINTS).iterdir()
            if (match := _STEP_FOLDER.fullmatch(path.name))
        ]
        if steps:
            checkpoint = Checkpoint.open(self._folder(max(steps)))
            self._state = _State.read(checkpoint, max(steps))
            if checkpoint.config != self._config:
                raise ConfigError(
                    f"{self._out} was trained with other data or another model file: {checkpoint.path / 'model.toml'} "
                    "differs from the model that the recipe gives now. Choose another --out."
                )
            checkpoint.load_into({MODEL_PREFIX + name: tensor for name, tensor in self._model.named_tensors().items()})
            checkpoint.load_into(self._optimizer_tensors())
            torch.set_num_threads(self._state.threads)
            self._keep_best_and_last()
        self._log = RunLog(self._out, self._state.step, self._recipe.tensorboard)

    def loop(self) -> None:
        """Train to the last step or the early stop."""
        recipe, state = self._recipe, self._state
        self._reporter.started(state.step, self._steps)
        order: np.ndarray[Any, np.dtype[np.int64]] | None = None
        losses: list[float] = []
        samples, since = 0, time.perf_counter()
        while state.step < self._steps and not state.stopped:
            epoch, number = divmod(state.step, self._steps_per_epoch)
            if number == 0 or order is None:
                order = np.random.default_rng([recipe.seed, epoch]).permutation(len(self._splits.train))
            rows = order[number * recipe.batch_size : (number + 1) * recipe.batch_size]
            losses.append(self._step(rows))
            samples += len(rows)
            state.step += 1
            self._reporter.stepped(state.step, losses[-1])
            if state.step % recipe.log_steps == 0:
                rate = samples / (time.perf_counter() - since)
                record = {"event": "train", "step": state.step, "epoch": epoch, "loss": float(np.mean(losses))}
                self._log.write({**record, "samples_per_second": round(rate, 1)})
                losses.clear()
                samples, since = 0, time.perf_counter()
            evaluate = state.step % (recipe.evaluate_steps or self._steps_per_epoch) == 0 or state.step == self._steps
            if evaluate:
                paused = time.perf_counter()
                self._evaluate(epoch)
                since += time.perf_counter() - paused
            if evaluate or (recipe.checkpoint_steps and state.step % recipe.checkpoint_steps == 0):
                paused = time.perf_counter()
                self._save()
                since += time.perf_counter() - paused

    def finish(self) -> TrainingResult:
        """Score the test split with the best weights and write the result."""
        state = self._state
        checkpoint = Checkpoint.open(self._folder(state.best_step))
        checkpoint.load_into({MODEL_PREFIX + name: tensor for name, tensor in self._model.named_tensors().items()})
        probabilities, labels = self._score(self._splits.test)
        result = TrainingResult(
            steps=state.step,
            best_step=state.best_step,
            validation_auc=state.best_auc,
            validation_log_loss=state.best_log_loss,
            test_auc=auc(labels, probabilities),
            test_log_loss=log_loss(labels, probabilities),
            test_calibration=calibration(labels, probabilities),
        )
        self._log.close()
        with atomic_file(self._out / RESULT) as partial:
            partial.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
        return result

    def _step(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> float:
        batch, labels = self._splits.train.batch(rows)
        # Copied, because torch aligns its own memory, and matrix products on memory that is aligned otherwise may
        # round otherwise.
        dense = torch.from_numpy(batch.dense).clone()
        weights = None if batch.weights is None else torch.from_numpy(batch.weights)
        logits = self._model(dense, torch.from_numpy(batch.indices), torch.from_numpy(batch.offsets), weights)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels))
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {self._state.step + 1}: training diverged. Lower mlp_lr and table_lr."
            )
        self._dense_optimizer.zero_grad()
        self._table_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._dense_optimizer.step()
        self._table_optimizer.step()
        return value

    def _evaluate(self, epoch: int) -> None:
        state = self._state
        probabilities, labels = self._score(self._splits.validation)
        area, loss = auc(labels, probabilities), log_loss(labels, probabilities)
        improved = not state.best_step or area > state.best_auc
        if improved:
            state.best_step, state.best_auc, state.best_log_loss, state.stale = state.step, area, loss, 0
        else:
            state.stale += 1
        state.stopped = self._recipe.patience is not None and state.stale >= self._recipe.patience
        self._log.write({"event": "validation", "step": state.step, "epoch": epoch, "auc": area, "log_loss": loss})
        self._reporter.evaluated(state.step, area, loss, improved)

    def _score(self, data: Dataset) -> tuple[FloatArray, FloatArray]:
        """Probabilities and labels of a whole split."""
        parts = []
        for start in range(0, len(data), _EVALUATION_ROWS):
            batch, labels = data.batch(np.arange(start, min(start + _EVALUATION_ROWS, len(data))))
            parts.append((self._model.predict(batch), labels))
        return np.concatenate([p for p, _ in parts]), np.concatenate([y for _, y in parts])

    def _save(self) -> None:
        rows = np.linspace(0, len(self._splits.test) - 1, min(GOLDEN_ROWS, len(self._splits.test))).astype(np.int64)
        batch, _ = self._splits.test.batch(rows)
        save_checkpoint(
            self._folder(self._state.step),
            config=self._config,
            tensors=self._model.named_tensors(),
            optimizer=self._optimizer_tensors(),
            trainer_state=asdict(self._state),
            golden=Golden(batch, self._model.predict(batch)),
        )
        self._keep_best_and_last()

    def _keep_best_and_last(self) -> None:
        """Point RUN/best at the best checkpoint, in one step, and remove those that nobody needs."""
        state = self._state
        with output_errors(self._out):
            if state.best_step:
                link = self._out / f".{BEST}.partial"
                link.unlink(missing_ok=True)
                link.symlink_to(Path(CHECKPOINTS) / f"step-{state.best_step}")
                link.replace(self._out / BEST)
            keep = {self._folder(step).name for step in (state.best_step, state.step)}
            for path in (self._out / CHECKPOINTS).iterdir():
                if _STEP_FOLDER.fullmatch(path.name) and path.name not in keep:
                    hidden = path.with_name(f".{path.name}.old")  # half removed, it must not look whole
                    path.rename(hidden)
                    shutil.rmtree(hidden)

    def _folder(self, step: int) -> Path:
        return self._out / CHECKPOINTS / f"step-{step}"

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """Optimizer state under its checkpoint keys, as views."""
        tensors = {}
        for group, state in zip(self._config.groups, self._table_optimizer.state, strict=True):
            for part in group.parts:
                tensors[f"fused.state.{table_key(part.name)}.{part.name}.momentum1"] = state[group.rows_of(part.name)]
        parameters = self._dense_optimizer.param_groups[0]["params"]
        for key, parameter in zip(dense_shapes(self._config), parameters, strict=True):
            for name, value in self._dense_optimizer.state[parameter].items():
                if isinstance(value, Tensor):  # SGD keeps a None where it could keep a momentum
                    tensors[f"dense_optimizer.{key}.{name}"] = value
        return tensors
