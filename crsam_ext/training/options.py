"""The command line of ``crsam-train``, and the defaults of each data set."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..ops import REGULARIZERS
from .errors import TrainingError

OPTIMIZERS = ("sgd", "adamw", "sam", "crsam")
SCHEDULES = ("cosine", "linear", "step", "constant")
SCHEDULED = ("rho", "alpha", "beta")  # besides the learning rate
DATA_KINDS = ("digits", "mnist1d", "cifar10", "cifar100", "folder")

# Where and how a run is computed may change when it is resumed. Everything else is what the run is.
MACHINE_OPTIONS = ("output", "resume", "overwrite", "device", "threads", "workers", "compile")

_CIFAR = {
    "model": "cifar_resnet18",
    "epochs": 200,
    "batch_size": 128,
    "lr": 0.05,
    "weight_decay": 1e-3,
    "image_size": 32,
}
# Batches of the small sets are too little work to share: threads would mostly wait for each other.
DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"model": "cnn", "epochs": 20, "batch_size": 64, "lr": 0.05, "weight_decay": 1e-3, "threads": 1},
    "mnist1d": {"model": "mlp", "epochs": 60, "batch_size": 128, "lr": 0.05, "weight_decay": 1e-3, "threads": 1},
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "folder": {
        "model": "resnet50",
        "epochs": 90,
        "batch_size": 256,
        "lr": 0.1,
        "weight_decay": 1e-4,
        "image_size": 224,
    },
}
ADAMW_DEFAULTS = {"lr": 1e-3, "weight_decay": 0.05}

# Options that would silently do nothing are refused; each of these is unset (None or False) by default.
OPTION_NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rho": ("optimizer", ("sam", "crsam")),
    "adaptive": ("optimizer", ("sam", "crsam")),
    "sync_perturbation": ("optimizer", ("sam", "crsam")),
    "base": ("optimizer", ("sam", "crsam")),
    "alpha": ("optimizer", ("crsam",)),
    "beta": ("optimizer", ("crsam",)),
    "interval": ("optimizer", ("sam", "crsam")),
    "reuse": ("optimizer", ("sam", "crsam")),
    "curvature_interval": ("optimizer", ("crsam",)),
    "rho_schedule": ("optimizer", ("sam", "crsam")),
    "alpha_schedule": ("optimizer", ("crsam",)),
    "beta_schedule": ("optimizer", ("crsam",)),
    "regularizer": ("optimizer", ("crsam",)),
    "estimator": ("optimizer", ("crsam",)),
    "momentum": ("base", ("sgd",)),
    "nesterov": ("base", ("sgd",)),
    "auto_augment": ("data", ("cifar10", "cifar100", "folder")),
    "workers": ("data", ("cifar10", "cifar100", "folder")),
    "image_size": ("data", ("folder",)),
    "skip_bad_val": ("data", ("folder",)),
}


class _Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        raise TrainingError(message)


def number(minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    """A converter for finite numbers in [minimum, maximum], to be given to ``argparse`` as ``type``."""

    def convert(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and minimum <= value <= maximum):
            limit = f" and at most {maximum:g}" if maximum < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {minimum:g}{limit}")
        return value

    convert.__name__ = "number"
    return convert


def integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """A converter for integers in [minimum, maximum], to be given to ``argparse`` as ``type``."""

    def convert(text: str) -> int:
        value = int(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text} is not an integer from {minimum} to {maximum}")
        return value

    convert.__name__ = "integer"
    return convert


def build_parser() -> argparse.ArgumentParser:
    """The options of ``crsam-train``. Unset options are ``None`` here; :func:`parse` fills them in."""
    parser = _Parser(
        prog="crsam-train",
        description="Train an image classifier with CR-SAM, SAM or their base optimizer.",
        epilog="Unset options take the defaults of the data set; config.json in the output folder holds them all.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what to train").add_argument
    add(
        "--data",
        default="digits",
        help="digits, mnist1d, cifar10:PATH, cifar100:PATH or folder:PATH, a folder with "
        "train/ and val/ and a folder per class in each. Images are the files that Pillow opens, with 8 bits a "
        "channel: more bits, or more pixels than Pillow allows, are an error. Hidden files and folders, files beside "
        "the class folders and files that are no images are left out and named. Folders within a class, classes of "
        "train/ without images and classes of val/ that train/ lacks are an error. Training images that cannot be "
        "read are replaced by the next one, named, and counted in log.csv as bad_files (default: digits)",
    )
    add(
        "--skip-bad-val",
        action="store_true",
        help="leave out validation images of folder:PATH that cannot be read, which is an error otherwise",
    )
    add("--model", help="mlp, cnn, cifar_resnet18, wrn28_10, pyramidnet110 or any model of timm")
    add("--image-size", type=integer(1), help="side of the images of folder:PATH in pixels (default: 224)")

    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", choices=OPTIMIZERS, default="crsam", help="default: crsam")
    add("--base", choices=("sgd", "adamw"), help="what sam and crsam hand their gradient to (default: sgd)")
    add("--rho", type=number(0), help="radius of the perturbation (default: 0.1)")
    add("--alpha", type=number(0), help="weight of the curvature (default: 0.1, log: 0.01)")
    add("--beta", type=number(0), help="weight of the gradient norm (default: 0.01)")
    add("--regularizer", choices=tuple(REGULARIZERS), help="default: linear")
    add("--estimator", choices=("gradient", "loss"), help="where log takes its curvature from (default: gradient)")
    add("--adaptive", action="store_true", help="scale the perturbation with the weights (ASAM)")
    add(
        "--sync-perturbation",
        action="store_true",
        help="with several processes: perturb all with that of the whole batch, and not each with its own",
    )
    add("--interval", type=integer(1), metavar="K", help="perturb in every K-th step only (default: 1)")
    add("--reuse", action="store_true", help="with --interval: go on with what the last perturbation has added")
    add("--curvature-interval", type=integer(1), metavar="K", help="take the third pass every K-th time (default: 1)")
    add("--max-grad-norm", type=number(1e-12), help="clip the norm of the combined gradient")
    add("--lr", type=number(0), help="peak learning rate")
    add("--momentum", type=number(0, 1), help="of SGD (default: 0.9)")
    add("--nesterov", action="store_true")
    add("--weight-decay", type=number(0), help="of all parameters")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=integer(1))
    add(
        "--batch-size",
        type=integer(1),
        help="of all processes together; of the last batch, a single sample is left out, with several processes all",
    )
    add(
        "--schedule",
        choices=SCHEDULES,
        default="cosine",
        help="of the learning rate, per epoch; step divides by 10 after each third of the run (default: cosine)",
    )
    for option in SCHEDULED:
        add(f"--{option}-schedule", choices=SCHEDULES, help=f"of {option}, as --schedule (default: constant)")
    add(
        "--warmup-epochs",
        type=integer(0),
        default=0,
        help="linear, of the learning rate, part of --epochs (default: 0)",
    )
    add("--label-smoothing", type=number(0, 1), default=0.0, help="default: 0")
    add("--mixup", type=number(0), default=0.0, metavar="ALPHA", help="timm's mixup (default: 0, none)")
    add("--auto-augment", metavar="POLICY", help="of timm, such as rand-m9-mstd0.5, for CIFAR and folder:PATH")
    add("--ema", type=number(0, 1), metavar="DECAY", help="evaluate a moving average of the weights, such as 0.999")
    add("--amp", action="store_true", help="forward passes in bfloat16 (autocast)")
    add("--seed", type=integer(0), default=0, help="default: 0")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="cpu, cuda, ... (default: auto, cuda where there is one)")
    add("--threads", type=integer(1), help="CPU threads (default: 1 for digits and mnist1d, else PyTorch's choice)")
    add("--workers", type=integer(0), help="processes that prepare the images of CIFAR and folder:PATH (default: 4)")
    add("--compile", action="store_true", help="torch.compile the model")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, help="default: runs/DATA-MODEL-OPTIMIZER-seedSEED")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the output folder; give the options it was started with",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fill in every default.

    Raises:
        TrainingError: an option is unknown, has an unusable value or would do nothing.
    """
    options = build_parser().parse_args(argv)
    kind, _, path = options.data.partition(":")
    if kind not in DATA_KINDS or bool(path) != (kind in ("cifar10", "cifar100", "folder")):
        raise TrainingError(f"--data {options.data}: give digits, mnist1d, cifar10:PATH, cifar100:PATH or folder:PATH")
    base = options.optimizer if options.optimizer in ("sgd", "adamw") else options.base or "sgd"
    _refuse_idle_options(options, {"optimizer": options.optimizer, "base": base, "data": kind})
    options.base = base
    for name, value in _defaults(options, kind).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.warmup_epochs >= options.epochs:
        raise TrainingError(f"--warmup-epochs {options.warmup_epochs} must be less than --epochs {options.epochs}")
    if options.mixup and options.batch_size % 2:
        raise TrainingError(f"--mixup pairs the samples of a batch: --batch-size {options.batch_size} must be even")
    return options


def run_config(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what a run computes: what config.json holds, and what --resume compares."""
    return {name: value for name, value in vars(options).items() if name not in MACHINE_OPTIONS}


def _refuse_idle_options(options: argparse.Namespace, chosen: dict[str, str]) -> None:
    for name, (choice, allowed) in OPTION_NEEDS.items():
        given = getattr(options, name) not in (None, False)
        if given and chosen[choice] not in allowed:
            raise TrainingError(f"--{name.replace('_', '-')} is only for --{choice} {' or '.join(allowed)}")


def _defaults(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    defaults = DATA_DEFAULTS[kind] | {"workers": 4}
    if options.base == "adamw":
        defaults |= ADAMW_DEFAULTS
    else:
        defaults |= {"momentum": 0.9}
    if options.optimizer in ("sam", "crsam"):
        defaults |= {"rho": 0.1, "interval": 1}
    defaults |= {f"{option}_schedule": "constant" for option in SCHEDULED}
    if options.optimizer == "crsam":
        defaults |= {"regularizer": "linear", "estimator": "gradient", "curvature_interval": 1}
    model = options.model or defaults["model"]
    folder = f"{kind}-{model}-{options.optimizer}-seed{options.seed}".replace("/", "_")
    return defaults | {"output": Path("runs") / folder}
