"""Epochs: train, evaluate, log, save, resume.

The checkpoint ``last.pt`` is the one truth about a run: it is written before the first epoch and after each, and holds
the history too. ``log.csv`` is written anew from that history each time, and ``best.pt`` before ``last.pt``. So a run
that is killed at any moment goes on after its last complete epoch, with every file as if it had never stopped.
"""

import csv
import io
import json
import math
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from crsam_ext import CRSAM, Scheduled

from . import checkpoint
from .data import Batch, Data, load
from .errors import TrainingError
from .images import named
from .models import create_model
from .options import SCHEDULED, build_parser, run_config
from .plot import draw
from .progress import progress, say, warn
from .ranks import ALONE, Ranks

FILES = ("last.pt", "best.pt", "log.csv", "curves.png", "config.json")
# A picture takes half a second: after an epoch of at least this many seconds it is drawn at once, else at the end.
SLOW_EPOCH = 10.0


@dataclass
class Run:
    """Everything that training changes."""

    device: torch.device
    model: nn.Module
    optimizer: CRSAM
    ema: ModelEmaV3 | None
    ranks: Ranks = ALONE
    ddp: nn.Module | None = None  #: the DistributedDataParallel around the model, in several processes
    history: list[dict[str, Any]] = field(default_factory=list)  #: the rows of log.csv

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module


def run(options: Namespace) -> None:
    """Train as the options say, which :func:`crsam_ext.training.options.parse` returned.

    The results go to ``options.output``; nothing is written before the data, the model and the optimizer are there.

    Raises:
        TrainingError: something that the user gave cannot be used, or the training diverged.
    """
    try:
        _run(options)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(f"batch norm takes no batch of one sample: give a larger --batch-size ({error})") from error
    except (RuntimeError, MemoryError) as error:
        if "DataLoader worker" in str(error) and "pid" in str(error):
            raise TrainingError(
                f"a process that prepares images has died, perhaps for lack of memory: give fewer --workers ({error})"
            ) from error
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "t allocate memory" not in str(error):
            raise
        raise TrainingError("there is not enough memory: give a smaller --batch-size, or fewer --workers") from error


def _run(options: Namespace) -> None:
    device = _prepare_device(options)
    ranks = Ranks.of_torchrun(device)
    data = load(options, device, ranks)
    state = _start(options, data, device, ranks)
    if options.resume:
        _restore(state, options)
    else:
        ranks.first(lambda: _claim(options.output, options.overwrite))
        _save_last(state, options)
    _save_config(state, options)
    _save_log(state, options)
    state.optimizer.check_replicas()
    try:
        _train(state, options, data)
    finally:
        if state.history:
            _draw(state, options)
    state.optimizer.check_replicas()
    _report(state, options)
    ranks.leave()


def _prepare_device(options: Namespace) -> torch.device:
    if options.threads:
        torch.set_num_threads(options.threads)
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # torchrun counts the processes of a machine
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrainingError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
    return device


def _start(options: Namespace, data: Data, device: torch.device, ranks: Ranks) -> Run:
    # After the data: making some of it seeds the global generators.
    checkpoint.seed_everything(options.seed)
    model = create_model(options.model, data.shape, data.classes).to(device)
    ema = None if options.ema is None else ModelEmaV3(model, decay=options.ema, use_warmup=True)
    if options.compile:
        model.compile()
    ddp = ranks.ddp(model, device)
    if not ranks.is_first:  # dropout masks of its own
        checkpoint.seed_everything(options.seed + 1_000_003 * ranks.rank)
    optimizer = create_optimizer(ddp or model, options)
    return Run(device, model, optimizer, ema, ranks, ddp)


def create_optimizer(model: nn.Module, options: Namespace) -> CRSAM:
    """The optimizer of ``--optimizer`` over all parameters of ``model``, which may be a DistributedDataParallel.

    ``sgd`` and ``adamw`` are CRSAM with rho = 0, which runs one pass and is its base: so every optimizer shares one
    loop, the same clipping, the same skipping of bad steps and the same measurements, and only the method differs.
    """
    if options.base == "adamw":
        base: type[torch.optim.Optimizer] = torch.optim.AdamW
        arguments = _pick(options, "lr", "weight_decay")
    else:
        base = torch.optim.SGD
        arguments = _pick(options, "lr", "momentum", "nesterov", "weight_decay")
    if options.optimizer == "crsam":
        arguments |= _pick(options, "rho", "alpha", "beta", "regularizer", "estimator", "adaptive")
        arguments |= _pick(options, "interval", "reuse", "curvature_interval")
    elif options.optimizer == "sam":
        arguments |= _pick(options, "rho", "adaptive", "interval", "reuse") | {"alpha": 0.0, "beta": 0.0}
    else:
        arguments |= {"rho": 0.0, "alpha": 0.0, "beta": 0.0}
    if isinstance(model, nn.parallel.DistributedDataParallel):
        arguments |= _pick(options, "sync_perturbation")
    try:
        return CRSAM(model.parameters(), base, model=model, max_grad_norm=options.max_grad_norm, **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TrainingError(str(error).splitlines()[0]) from error


def _pick(options: Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


def create_schedules(optimizer: CRSAM, options: Namespace) -> list[Scheduler]:
    """timm's schedulers, of the learning rate (``--schedule``) and of what else is not constant.

    Their ``step(epoch)`` sets the option as a function of the epoch alone, so they have no state to save.
    """
    schedules = [_schedule(optimizer, options.schedule, options, warmup_epochs=options.warmup_epochs)]
    for option in SCHEDULED:
        kind = getattr(options, f"{option}_schedule")
        if kind != "constant":
            schedules.append(_schedule(Scheduled(optimizer, option), kind, options, warmup_epochs=0))
    return schedules


def _schedule(optimizer: torch.optim.Optimizer, kind: str, options: Namespace, warmup_epochs: int) -> Scheduler:
    kinds: dict[str, dict[str, Any]] = {
        "cosine": {"sched": "cosine"},
        "linear": {"sched": "poly", "decay_rate": 1.0},
        "step": {"sched": "step", "decay_epochs": max(1, options.epochs // 3), "decay_rate": 0.1},
        "constant": {"sched": "step", "decay_epochs": 1, "decay_rate": 1.0},
    }
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=options.epochs, warmup_epochs=warmup_epochs, **kinds[kind])
    return schedule


def _train(state: Run, options: Namespace, data: Data) -> None:
    schedules = create_schedules(state.optimizer, options)
    done, seen = len(state.history), set[Path]()
    with progress(options.epochs * data.steps, done * data.steps) as (advance, line):
        for epoch in range(done, options.epochs):
            for schedule in schedules:
                schedule.step(epoch)
            start = time.perf_counter()
            row = {"epoch": epoch + 1, "lr": state.optimizer.param_groups[0]["lr"]}
            row |= train_epoch(state, options, data.train(epoch), epoch * data.steps, advance)
            broken = data.broken()
            state.ranks.unify(state.model, None if state.ema is None else state.ema.module)
            row |= evaluate(state.evaluated, data.test(), state.device, options.amp, state.ranks)
            row["bad_files"] = len(broken)
            if not seen.issuperset(broken):
                warn(f"{len(broken)} training images cannot be read, others took their place: {named(broken)}")
            seen.update(broken)
            row["seconds"] = round(time.perf_counter() - start, 3)
            _save(state, options, row)
            line(_line(row, options.epochs))
            if row["seconds"] > SLOW_EPOCH:
                _draw(state, options)


def train_epoch(
    state: Run, options: Namespace, batches: Iterable[Batch], updates: int, advance: Callable[[], None]
) -> dict[str, float]:
    """Train for an epoch.

    Args:
        updates: optimizer steps taken before this epoch.
        advance: is called after each step.

    Returns:
        train_loss and train_accuracy at the weights before each step, the mean grad_norm of the sound steps, and the
        numbers of skipped steps and of steps whose curvature term was dropped.

    Raises:
        TrainingError: every step was skipped.
    """
    model, optimizer, stats = (state.ddp or state.model).train(), state.optimizer, state.optimizer.stats
    before = stats.as_dict()
    losses: list[Tensor] = []
    correct: list[Tensor] = []
    norms: list[Tensor] = []
    samples = 0.0
    for x, y in batches:
        loss, logits = step(model, optimizer, x, y, options.label_smoothing, options.amp)
        updates += 1
        if state.ema is not None:
            state.ema.update(model, step=updates)
        losses.append(loss * len(x))
        correct.append(_correct(logits, y))
        if stats.grad_norm is not None:
            norms.append(stats.grad_norm)
        samples += len(x)
        advance()
    after = stats.as_dict()
    counts = {name: after[name] - before[name] for name in ("skipped", "curvature_dropped")}
    if counts["skipped"] == len(losses):
        raise TrainingError(
            "the training diverged: every step of the epoch gave a NaN or an infinity; try a lower --lr"
        )
    finite = [norm for norm in _numbers(norms) if math.isfinite(norm)]
    sums = [math.fsum(_numbers(losses)), math.fsum(_numbers(correct)), samples, math.fsum(finite), len(finite)]
    loss_sum, correct_sum, samples, norm_sum, num_norms = map(math.fsum, zip(*state.ranks.gather(sums), strict=True))
    return {
        "train_loss": loss_sum / samples,
        "train_accuracy": correct_sum / samples,
        "grad_norm": norm_sum / num_norms if num_norms else math.nan,
        **counts,
    }


def step(
    model: nn.Module, optimizer: CRSAM, x: Tensor, y: Tensor, label_smoothing: float, amp: bool
) -> tuple[Tensor, Tensor]:
    """One step on a batch; returns the loss (0-dim) and the logits (N, classes) at the weights before it."""
    outputs: list[Tensor] = []

    def closure() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits = model(x)
            loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
        loss.backward()
        outputs.append(logits.detach())
        return loss

    loss = optimizer.step(closure)
    return loss.detach(), outputs[0]


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, amp: bool, ranks: Ranks = ALONE
) -> dict[str, float]:
    """The mean cross-entropy and the accuracy (0 to 1) over the batches of all ranks: test_loss and test_accuracy."""
    model.eval()
    losses, correct, samples = [], [], 0
    for x, y in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(x)
            losses.append(F.cross_entropy(logits, y, reduction="sum"))
        correct.append(_correct(logits, y))
        samples += len(x)
    sums = [math.fsum(_numbers(losses)), math.fsum(_numbers(correct)), samples]
    loss_sum, correct_sum, total = map(math.fsum, zip(*ranks.gather(sums), strict=True))
    return {"test_loss": loss_sum / total, "test_accuracy": correct_sum / total}


def _correct(logits: Tensor, y: Tensor) -> Tensor:
    labels = y if y.ndim == 1 else y.argmax(1)
    return (logits.argmax(1) == labels).sum()


def _numbers(values: list[Tensor]) -> list[float]:
    """0-dim tensors as numbers, with one transfer: inside an epoch nothing waits for the device."""
    return torch.stack(values).tolist() if values else []


def _claim(output: Path, overwrite: bool) -> None:
    """Make the output folder; in one that holds files, begin anew only where that was asked for."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        used = any(path.suffix != checkpoint.PARTIAL for path in output.iterdir())
        if used and not overwrite:
            raise TrainingError(f"{output} is not empty: give --resume, --overwrite or another --output")
        for name in FILES:
            (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(f"--output {output}: {error.strerror}") from error


def _restore(state: Run, options: Namespace) -> None:
    path = options.output / "last.pt"
    saved = state.ranks.first(lambda: checkpoint.load(path))
    config, defaults = run_config(options), build_parser()
    for name, value in config.items():
        before = saved["config"].get(name, defaults.get_default(name))  # of an option that came later
        if before != value:
            flag = "--" + name.replace("_", "-")
            raise TrainingError(f"cannot resume with {flag} {value}: {options.output} was started with {flag} {before}")
    try:
        state.model.load_state_dict(saved["model"])
        state.optimizer.load_state_dict(saved["optimizer"])
        if state.ema is not None:
            state.ema.module.load_state_dict(saved["ema"])
        states = saved["random"] if isinstance(saved["random"], list) else [saved["random"]]
        if state.ranks.rank < len(states):
            checkpoint.set_random_state(states[state.ranks.rank], state.device)
        state.history = saved["history"]
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} does not fit this model and optimizer") from error


def _save(state: Run, options: Namespace, row: dict[str, Any]) -> None:
    best = all(row["test_accuracy"] > earlier["test_accuracy"] for earlier in state.history)
    state.history.append(row)
    if best:
        names = ("epoch", "test_accuracy")
        best_state = {"config": run_config(options), "model": state.evaluated.state_dict()} | {
            name: row[name] for name in names
        }
        if state.ranks.is_first:
            checkpoint.save(options.output / "best.pt", best_state)
    _save_last(state, options)
    _save_log(state, options)


def _save_last(state: Run, options: Namespace) -> None:
    random_states = state.ranks.gather(checkpoint.random_state(state.device))
    if not state.ranks.is_first:
        return
    saved = {
        "config": run_config(options),
        "history": state.history,
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "ema": None if state.ema is None else state.ema.module.state_dict(),
        "random": random_states,
    }
    checkpoint.save(options.output / "last.pt", saved)


LOG_COLUMNS = (
    "epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
    "seconds", "grad_norm", "skipped", "curvature_dropped", "bad_files",
)  # fmt: skip


def _save_config(state: Run, options: Namespace) -> None:
    if not state.ranks.is_first:
        return
    text = json.dumps(run_config(options), indent=2) + "\n"
    checkpoint.write(options.output / "config.json", lambda file: file.write(text.encode()))


def _save_log(state: Run, options: Namespace) -> None:
    if not state.ranks.is_first:
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, LOG_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(state.history)
    checkpoint.write(options.output / "log.csv", lambda file: file.write(text.getvalue().encode()))


def _draw(state: Run, options: Namespace) -> None:
    if not state.ranks.is_first:
        return
    kind = options.data.partition(":")[0]
    title = f"{options.model} on {kind}, {options.optimizer}, seed {options.seed}"

    def content(file: IO[bytes]) -> None:
        draw(file, state.history, title)

    checkpoint.write(options.output / "curves.png", content)


def _line(row: dict[str, Any], epochs: int) -> str:
    return (
        f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}  lr {row['lr']:.4g}  "
        f"train loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:.2%}  "
        f"test loss {row['test_loss']:.4f}  accuracy {row['test_accuracy']:.2%}  {row['seconds']:.1f} s"
    )


def _report(state: Run, options: Namespace) -> None:
    best = max(state.history, key=lambda row: row["test_accuracy"])
    say(
        f"test accuracy {state.history[-1]['test_accuracy']:.2%} "
        f"(best {best['test_accuracy']:.2%} in epoch {best['epoch']}); curves in {options.output / 'curves.png'}"
    )
