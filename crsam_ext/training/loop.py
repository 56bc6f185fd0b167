"""The training loop: steps, evaluation, log lines, checkpoints."""

import math
import os
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from . import checkpoint
from .data import Batch, Data, load
from .errors import Stopped, TrainingError
from .images import named
from .loader import explained
from .logs import Logs, check_packages
from .measure import Epoch, Parts, correct_in_top, flops_of_pass, mfu_percent, peak_tflops
from .models import create_model
from .options import image_sizes, key_and_value
from .profile import profile
from .progress import Bar, progress, say, warn
from .randomness import reseed, seed_of
from .ranks import ALONE, Ranks
from .schedules import Schedules, warmup_steps
from .state import Run, claim, restore, save, save_best
from .steps import Objective, Step, create_optimizer
from .stop import Requests

# Drawing the figure takes half a second. It is drawn after each epoch longer than this many seconds, and at the end.
SLOW_EPOCH = 10.0


def run(options: Namespace) -> None:
    """Train, evaluate a checkpoint or profile, with the options of :func:`crsam_ext.training.options.parse`.

    Results are written to ``options.output``, but not before the data, the model and the optimizer have been created.

    Raises:
        TrainingError: an option or the data cannot be used, or the training diverged.
        Stopped: a signal asked the run to stop; its checkpoint has been written.
    """
    device = prepare_device(options)
    ranks = Ranks.of_torchrun(device)
    with ranks.failing_together(), _clear_errors():
        _run(options, device, ranks)


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(
            f"batch norm cannot train on a batch of one sample: use a larger --batch-size ({error})"
        ) from error
    except (RuntimeError, MemoryError) as error:
        # PyTorch raises the error of a dead worker wherever the main process happens to be.
        mended = explained(error) if isinstance(error, RuntimeError) else None
        if mended is not None:
            raise mended from error
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "t allocate memory" not in str(error):
            raise
        raise TrainingError("out of memory: use a smaller --batch-size or fewer --workers") from error


def _run(options: Namespace, device: torch.device, ranks: Ranks) -> None:
    data = load(options, device, ranks)
    if options.evaluate is not None:
        _evaluate_checkpoint(options, data, device, ranks)
        return
    check_packages(options)
    warmup_steps(options, data.steps)  # checked before anything is written
    state = start(options, data, device, ranks)
    requests = Requests(ranks, options.save_minutes)
    if options.profile is not None:
        profile(Training(options, data, state, requests, None), options.profile)
        return
    if options.resume:
        restore(state, options)
    else:
        ranks.first(lambda: claim(options))
        save(state, options)
    logs = Logs(options, state.step) if ranks.is_first else None
    if logs is not None:
        logs.write_history(state.history)
    state.optimizer.check_replicas()
    with requests.listening():
        try:
            Training(options, data, state, requests, logs).run()
        except Stopped as stopped:
            warn(str(stopped))
            _finish(state, logs)
            raise
        except BaseException:
            _finish(state, logs, alone=True)
            raise
        _finish(state, logs)
    state.optimizer.check_replicas()
    _report(state, options)
    ranks.leave()


def _finish(state: Run, logs: Logs | None, alone: bool = False) -> None:
    """Draw the figure and close the files. All ranks wait for rank 0, unless one of them failed (``alone``)."""
    if logs is not None:
        if state.history:
            logs.draw(state.history)
        logs.close()
    if not alone:
        state.ranks.leave()


def prepare_device(options: Namespace) -> torch.device:
    """Return the device of ``--device``, configured as the options require.

    Raises:
        TrainingError: the device is not available.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # set by torchrun: number of the process on its machine
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrainingError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if options.amp:
            torch.set_float32_matmul_precision("high")  # TensorFloat-32 for operations that autocast leaves in float32
        torch.backends.cudnn.benchmark = not options.deterministic
        if options.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
    return device


def start(options: Namespace, data: Data, device: torch.device, ranks: Ranks) -> Run:
    """Create the state of a run that has taken no step."""
    # After the data: generating some data sets seeds the global generators.
    checkpoint.seed_everything(options.seed)
    model = _create_model(options, data).to(device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    ema = None if options.ema is None else ModelEmaV3(model, decay=options.ema, use_warmup=True)
    objective = Objective(model, options)
    if options.compile:
        objective.compile(dynamic=False)
    trained = ranks.ddp(objective, device) or objective
    return Run(device, ranks, objective, create_optimizer(trained, options), ema, trained, Epoch(ranks), data.steps)


def _create_model(options: Namespace, data: Data) -> torch.nn.Module:
    sizes = {data.shape[-1]}
    if options.image_size is not None:
        sizes |= {size for _, size in image_sizes(options.image_size)}
    return create_model(
        options.model,
        data.shape,
        data.classes,
        options.drop_path,
        options.head_init_bias,
        other_sizes=len(sizes) > 1,
        kwargs=dict(map(key_and_value, options.model_kwargs or ())),
    )


class Training:
    """Trains a run from its current step to its end.

    Args:
        options: the options of the run.
        data: the data set.
        state: the state of the run, updated in place.
        requests: requests to stop or save.
        logs: the log files; None on all ranks but the first.
    """

    def __init__(self, options: Namespace, data: Data, state: Run, requests: Requests, logs: Logs | None) -> None:
        self.options, self.data, self.state, self.requests, self.logs = options, data, state, requests, logs
        self.schedules = Schedules(state.optimizer, options, data.steps)
        self.schedules.set(max(state.step - 1, 0))  # the values of the last step, which an evaluation logs
        self.parts = Parts(state.device)
        self.step = Step(state.trained, state.optimizer, self.parts, options.cuda_graph)
        self.peak = peak_tflops(state.device, options.peak_tflops, options.amp)
        self.flops: dict[tuple[int, ...], float | None] = {}  # FLOPs of a pass for each sample shape
        self._since = time.perf_counter()  # time of the last log line
        self._images = self._gradients = 0  # samples, and samples times passes, since then
        self._counted = self._counters()
        self._began = time.perf_counter(), state.step

    def run(self) -> None:
        """Train until the end, or until a signal asks the run to stop."""
        state, steps = self.state, self.data.steps
        with progress(self.options.epochs, steps, state.step) as bar:
            while len(state.history) < self.options.epochs:
                began = time.perf_counter()
                images = self._steps_of_epoch(len(state.history), bar)
                self._end_of_epoch(images, began, bar)

    def _steps_of_epoch(self, epoch: int, bar: Bar) -> int:
        """Train for the rest of an epoch. Return the number of samples, over all ranks."""
        state, options, steps = self.state, self.options, self.data.steps
        first = state.step - epoch * steps
        if first == steps:  # the run was stopped between the last step and the evaluation
            return 0
        state.trained.train()
        images = 0
        for batch in self.data.train(epoch, first):
            self.parts.mark("data")
            self.requests.begin_step()
            self.take(batch)
            images += len(batch.x) * state.ranks.size
            self.requests.end_step()
            bar.step(state.step)
            done = state.step - epoch * steps
            if done % options.log_interval == 0 or done == steps:
                self._log(epoch, done, batch.x, bar)
            due = options.save_steps is not None and state.step % options.save_steps == 0
            if due or self.requests.save or done == steps:
                self._save()
                self.requests.raise_if_stopped(state.step)
            self.parts.mark("other")
        return images

    def take(self, batch: Batch) -> None:
        """Take the next step."""
        state, optimizer = self.state, self.state.optimizer
        self.schedules.set(state.step)
        # Dropout depends only on the step and the rank, so no generator state has to be saved. The seeds of images and
        # batches combine three and four numbers; this one combines five.
        epoch, step = divmod(state.step, self.data.steps)
        reseed(seed_of(self.options.seed, epoch, step, state.ranks.rank, 0), state.device)
        self._images += len(batch.x) * state.ranks.size
        self._gradients += optimizer.passes * len(batch.x) * state.ranks.size
        self.parts.mark("other")
        loss, logits = self.step(batch.x, batch.y)
        state.step += 1
        if state.ema is not None:
            state.ema.update(state.model, step=state.step)
        state.epoch.add(loss, logits, batch.y, optimizer.stats.grad_norm)
        state.epoch.bad.update(batch.bad)

    def _fold(self) -> None:
        """Update the sums over all ranks, the counters and the set of bad files."""
        state, epoch = self.state, self.state.epoch
        epoch.fold()
        counted = self._counters()
        for name, value in counted.items():
            epoch.counts[name] += value - self._counted[name]
        self._counted = counted
        epoch.bad = set(state.ranks.union(epoch.bad))
        new = sorted(epoch.bad - state.bad)
        state.bad.update(new)
        if new:
            warn(f"{len(new)} training images cannot be read and were replaced: {named(new)}")
        limit = self.options.max_bad_files
        if limit is not None and len(state.bad) > limit:
            raise TrainingError(
                f"{len(state.bad)} training images cannot be read, more than --max-bad-files {limit}: "
                + named(sorted(state.bad))
            )

    def _counters(self) -> dict[str, int]:
        stats = self.state.optimizer.stats
        return {name: int(getattr(stats, name)) for name in ("skipped", "curvature_dropped")}

    def _save(self) -> None:
        self._fold()
        if self.logs is not None:
            self.logs.sync()
        save(self.state, self.options)
        self.requests.saved()

    def _log(self, epoch: int, done: int, x: Tensor, bar: Bar) -> None:
        state, options = self.state, self.options
        self._fold()
        if state.epoch.counts["skipped"] == done:
            raise TrainingError(
                "the training diverged: all steps of this epoch were skipped because of a NaN or Inf; try a lower --lr"
            )
        parts, now = self.parts.seconds(), time.perf_counter()
        seconds, whole = now - self._since, sum(parts.values())
        group, ranks = state.optimizer.param_groups[0], state.ranks
        means = state.epoch.means((done - 1) // options.log_interval * options.log_interval)
        row: dict[str, Any] = {
            "step": state.step, "epoch": epoch + 1, "loss": means["loss"], "accuracy": means["accuracy"],
            "lr": float(group["lr"]), "rho": float(group["rho"]), "grad_norm": means["grad_norm"],
            "skipped": state.epoch.counts["skipped"], "bad_files": len(state.epoch.bad),
            "images_per_second": self._images / seconds,
            "images_per_second_per_device": self._images / seconds / ranks.size,
            "gradients_per_second": self._gradients / seconds,
            "data_percent": 100 * parts.get("data", 0.0) / whole,
            "optimizer_percent": None if "step" in parts else 100 * parts.get("optimizer", 0.0) / whole,
            "mfu_percent": self._mfu(tuple(x.shape[1:]), self._gradients / seconds / ranks.size),
            "remaining_seconds": self._remaining(),
        }  # fmt: skip
        self._since, self._images, self._gradients = now, 0, 0
        if self.logs is not None:
            self.logs.add_step(row)
        if done % options.log_interval == 0:
            bar.line(_step_line(row, done, self.data.steps, options.epochs))

    def _mfu(self, shape: tuple[int, ...], passes_per_second: float) -> float | None:
        """Return the model FLOPs utilization in percent; None if the peak is unknown."""
        if self.peak is None:
            return None
        if shape not in self.flops:
            self.flops[shape] = flops_of_pass(self.state.model, shape)
        flops = self.flops[shape]
        return None if flops is None else mfu_percent(flops, passes_per_second, self.peak)

    def _remaining(self) -> float:
        began, first = self._began
        taken, left = self.state.step - first, self.options.epochs * self.data.steps - self.state.step
        return (time.perf_counter() - began) / taken * left

    def _end_of_epoch(self, images: int, began: float, bar: Bar) -> None:
        state, options = self.state, self.options
        number = len(state.history) + 1
        self._fold()
        means, group = state.epoch.means(), state.optimizer.param_groups[0]
        row: dict[str, Any] = {"epoch": number, "lr": float(group["lr"])}
        row |= {"train_loss": means["loss"], "train_accuracy": means["accuracy"]}
        row |= {"grad_norm": means["grad_norm"], **state.epoch.counts, "bad_files": len(state.epoch.bad)}
        if images:  # zero if the run was stopped between the last step and the evaluation
            row["images_per_second"] = images / (time.perf_counter() - began)
        if number % options.val_interval == 0 or number == options.epochs:
            state.ranks.unify(state.model, None if state.ema is None else state.ema.module)
            row |= evaluate(state.evaluated, state.objective, self.data.test(), state.ranks)
        row["seconds"] = round(time.perf_counter() - began, 3)
        state.history.append(row)
        state.epoch = Epoch(state.ranks)
        save_best(state, options)
        self._save()
        if self.logs is not None:
            self.logs.add_epoch(state.history, state.step)
            if row["seconds"] > SLOW_EPOCH:
                self.logs.draw(state.history)
        bar.line(_epoch_line(row, options.epochs))
        self.parts.mark("other")
        self.parts.seconds()
        self._since = time.perf_counter()


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, objective: Objective, batches: Iterable[Batch], ranks: Ranks = ALONE
) -> dict[str, float]:
    """Evaluate a model over all ranks: mean loss, top-1 and top-5 accuracy (0 to 1)."""
    model.eval()
    sums: list[Tensor] = []
    for x, y, *_ in batches:
        with objective.autocast(x.device):
            logits = model(x)
            loss = objective.loss_to_test(logits, y).double() * len(y)
        top1, top5 = (correct_in_top(logits, y, k).double() for k in (1, 5))
        sums.append(torch.stack([loss, top1, top5, loss.new_full((), len(y))]))
    columns = torch.stack(sums).T.tolist() if sums else [[]] * 4
    gathered = ranks.gather([math.fsum(column) for column in columns])
    loss_sum, correct, correct5, samples = map(math.fsum, zip(*gathered, strict=True))
    return {"test_loss": loss_sum / samples, "test_accuracy": correct / samples, "test_top5": correct5 / samples}


def _evaluate_checkpoint(options: Namespace, data: Data, device: torch.device, ranks: Ranks) -> None:
    saved = ranks.first(lambda: checkpoint.load(options.evaluate))
    model = _create_model(options, data).to(device)
    try:
        model.load_state_dict(saved.get("ema") or saved["model"])
    except (RuntimeError, KeyError) as error:
        raise TrainingError(f"{options.evaluate} does not fit the model {options.model} on this data") from error
    row = evaluate(model, Objective(model, options), data.test(), ranks)
    say(
        f"test loss {row['test_loss']:.4f}  accuracy {row['test_accuracy']:.2%}  top-5 {row['test_top5']:.2%}  "
        f"of {options.evaluate}"
    )
    ranks.leave()


def _step_line(row: dict[str, Any], done: int, steps: int, epochs: int) -> str:
    parts = [
        f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}  batch {done:{len(str(steps))}}/{steps}",
        f"loss {row['loss']:.4f}  lr {row['lr']:.4g}  rho {row['rho']:.4g}",
        f"{row['images_per_second']:.0f} images/s  {row['gradients_per_second']:.0f} gradients/s",
    ]
    for label, name in (("data", "data_percent"), ("optimizer", "optimizer_percent"), ("MFU", "mfu_percent")):
        if row[name] is not None:
            parts.append(f"{label} {row[name]:.0f} %")
    for label, name in (("skipped", "skipped"), ("bad files", "bad_files")):
        if row[name]:
            parts.append(f"{label} {row[name]}")
    return "  ".join([*parts, f"{_clock(row['remaining_seconds'])} left"])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _epoch_line(row: dict[str, Any], epochs: int) -> str:
    line = (
        f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}  lr {row['lr']:.4g}  "
        f"train loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:.2%}  "
    )
    if "test_loss" in row:
        line += f"test loss {row['test_loss']:.4f}  accuracy {row['test_accuracy']:.2%}  top-5 {row['test_top5']:.2%}  "
    return f"{line}{row['seconds']:.1f} s"


def _report(state: Run, options: Namespace) -> None:
    best = max((row for row in state.history if "test_accuracy" in row), key=lambda row: row["test_accuracy"])
    say(
        f"test accuracy {state.history[-1]['test_accuracy']:.2%} "
        f"(best {best['test_accuracy']:.2%} in epoch {best['epoch']}); curves in {options.output / 'curves.png'}"
        + (f"; {len(state.bad)} training images could not be read" if state.bad else "")
    )
