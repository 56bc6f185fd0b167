"""The command line of ``crsam-train``, and the defaults of each data set."""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..ops import REGULARIZERS
from .errors import TrainingError

OPTIMIZERS = ("sgd", "adamw", "sam", "crsam")
SCHEDULES = ("cosine", "linear", "step", "constant")
SCHEDULED = ("rho", "alpha", "beta")  # besides the learning rate
WITH_PATH = ("cifar10", "cifar100", "folder", "tar")
SYNTHETIC = ("synthetic", "synthetic-jpeg")
IMAGENET_LIKE = ("folder", "tar", *SYNTHETIC)
THROUGH_WORKERS = (*WITH_PATH, "synthetic-jpeg")  # data that other processes prepare

# Where and how a run is computed may change when it is resumed. Everything else is what the run is.
MACHINE_OPTIONS = (
    "output", "resume", "overwrite", "device", "threads", "workers", "compile", "cuda_graph", "channels_last",
    "deterministic", "decoder", "data_timeout", "log_interval", "save_steps", "save_minutes", "tensorboard", "wandb",
    "peak_tflops", "max_bad_files", "config", "evaluate", "profile",
)  # fmt: skip

_CIFAR = {
    "model": "cifar_resnet18",
    "epochs": 200,
    "batch_size": 128,
    "lr": 0.05,
    "weight_decay": 1e-3,
    "image_size": "32",
}
_IMAGENET = {
    "model": "resnet50",
    "epochs": 90,
    "batch_size": 256,
    "lr": 0.1,
    "weight_decay": 1e-4,
    "decay_of": "matrices",
    "image_size": "224",
    "crop_pct": 0.875,
    "scale": [0.08, 1.0],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
# Batches of the small sets are too little work to share: threads would mostly wait for each other.
DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"model": "cnn", "epochs": 20, "batch_size": 64, "lr": 0.05, "weight_decay": 1e-3, "threads": 1},
    "mnist1d": {"model": "mlp", "epochs": 60, "batch_size": 128, "lr": 0.05, "weight_decay": 1e-3, "threads": 1},
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    **dict.fromkeys(IMAGENET_LIKE, _IMAGENET),
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
    "min_rho": ("optimizer", ("sam", "crsam")),
    "momentum": ("base", ("sgd",)),
    "nesterov": ("base", ("sgd",)),
    "auto_augment": ("data", THROUGH_WORKERS),
    "workers": ("data", THROUGH_WORKERS),
    "data_timeout": ("data", THROUGH_WORKERS),
    "image_size": ("data", IMAGENET_LIKE),
    "val_image_size": ("data", IMAGENET_LIKE),
    "crop_pct": ("data", ("folder", "tar", "synthetic-jpeg")),
    "scale": ("data", ("folder", "tar", "synthetic-jpeg")),
    "interpolation": ("data", ("folder", "tar", "synthetic-jpeg")),
    "mean": ("data", IMAGENET_LIKE),
    "std": ("data", IMAGENET_LIKE),
    "decoder": ("data", ("folder", "tar", "synthetic-jpeg")),
    "reprob": ("data", (*WITH_PATH, *SYNTHETIC)),
    "cutmix": ("data", ("digits", *WITH_PATH, *SYNTHETIC)),
    "skip_bad_val": ("data", ("folder", "tar")),
    "max_bad_files": ("data", ("folder", "tar")),
}
FLAGS = (
    "skip_bad_val", "adaptive", "sync_perturbation", "reuse", "nesterov", "bce_loss", "amp", "compile", "cuda_graph",
    "channels_last", "deterministic", "tensorboard",
)  # fmt: skip
# What a command does, and not what a run is.
NOT_IN_FILES = ("config", "evaluate", "profile", "resume", "overwrite")
#: The data, as --data takes them.
_FORMS = (
    "digits, mnist1d, cifar10:PATH, cifar100:PATH, folder:PATH, tar:PATH, synthetic:CLASSES or synthetic-jpeg:CLASSES"
)


class Parser(argparse.ArgumentParser):
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


def image_sizes(text: str) -> list[tuple[float, int]]:
    """What ``SIZE[,SIZE@FRACTION...]`` says: pairs of the part of the run from which a size is used, and the size.

    The first is used from 0 on; sizes are in pixels, fractions grow and are less than 1.

    Raises:
        ValueError: the text has another form.
    """
    sizes = []
    for part in text.split(","):
        size, _, fraction = part.partition("@")
        sizes.append((float(fraction or 0), int(size)))
    starts = [start for start, _ in sizes]
    increasing = all(a < b for a, b in itertools.pairwise(starts))
    if starts[0] != 0 or not increasing or not starts[-1] < 1 or min(size for _, size in sizes) < 1:
        raise ValueError(f"{text} is not of the form 160,192@0.75")
    return sizes


def _image_sizes(text: str) -> str:
    image_sizes(text)
    return text


_image_sizes.__name__ = "list of image sizes, such as 224 or 160,192@0.75"


def key_and_value(text: str) -> tuple[str, Any]:
    """What ``KEY=VALUE`` says; the value is read as JSON, or is the text itself.

    Raises:
        ValueError: the text has another form.
    """
    key, equals, value = text.partition("=")
    if not key.isidentifier() or not equals:
        raise ValueError(f"{text} is not of the form KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _key_and_value(text: str) -> str:
    key_and_value(text)
    return text


_key_and_value.__name__ = "KEY=VALUE"


def build_parser() -> argparse.ArgumentParser:
    """The options of ``crsam-train``. Unset options are ``None`` here; :func:`parse` fills them in."""
    parser = Parser(
        prog="crsam-train",
        description="Train an image classifier with CR-SAM, SAM or their base optimizer.",
        epilog="Unset options take the defaults of the data set; config.json in the output folder holds them all.",
        allow_abbrev=False,
    )
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("what to train").add_argument
    add(
        "--config",
        nargs="+",
        default=[],
        metavar="FILE",
        help="options from YAML files, or from recipes that are shipped, by name; later files and the command line win",
    )
    add(
        "--data",
        help=f"{_FORMS}. A folder holds train/ and val/, and these a folder for each class; tar is train.tar and "
        "val.tar with such folders. Images are the files that Pillow opens, with 8 bits a channel: more bits, or more "
        "pixels than Pillow allows, are an error. Hidden files and folders, files beside the class folders and files "
        "that are no images are left out and named. Folders within a class, classes of train without images and "
        "classes of val that train lacks are an error. Training images that cannot be read are replaced, named, and "
        "counted in log.csv as bad_files. Synthetic images have 100 to train and 10 to test in each class: tensors on "
        "the device, or encoded as JPEG and read like files (default: digits)",
    )
    add("--max-bad-files", type=integer(0), help="end at more training images that cannot be read (default: 100)")
    add("--skip-bad-val", action=flag, help="leave out validation images that cannot be read, which is an error else")
    add("--model", help="mlp, cnn, cifar_resnet18, wrn28_10, pyramidnet110 or any model of timm")
    add("--drop-path", type=number(0, 1), help="rate of stochastic depth of models of timm")
    add(
        "--model-kwargs",
        type=_key_and_value,
        nargs="+",
        metavar="KEY=VALUE",
        help="further arguments of models of timm, such as global_pool=avg class_token=false",
    )
    add("--head-init-bias", type=float, help="initial bias of the classifier, such as -10 with --bce-loss")
    add(
        "--image-size",
        type=_image_sizes,
        metavar="SIZE[,SIZE@FRACTION...]",
        help="side of the training images in pixels; 160,192@0.75: 192 for the last quarter of the run (default: 224)",
    )
    add("--val-image-size", type=integer(1), help="side of the images to test (default: the last of --image-size)")
    add("--crop-pct", type=number(0.01, 1), help="part of the side that the crop for a test takes (default: 0.875)")
    add("--mean", type=float, nargs=3, metavar="M", help="subtracted from pixels in [0, 1] (default: ImageNet's)")
    add("--std", type=number(1e-6), nargs=3, metavar="S", help="what they are divided by then (default: ImageNet's)")
    add("--decoder", choices=("auto", "torchcodec", "pillow"), help="of JPEG (default: torchcodec where it imports)")

    add = parser.add_argument_group("augmentation").add_argument
    add("--scale", type=number(0.0001, 1), nargs=2, metavar=("MIN", "MAX"), help="area of crops (default: 0.08 1)")
    add("--interpolation", choices=("bilinear", "bicubic"), help="to resize by (default: bilinear)")
    add("--auto-augment", metavar="POLICY", help="of timm, such as rand-m9-mstd0.5")
    add("--mixup", type=number(0), metavar="ALPHA", help="timm's mixup (default: 0, none)")
    add("--cutmix", type=number(0), metavar="ALPHA", help="timm's cutmix; with --mixup, each in half of the steps")
    add("--reprob", type=number(0, 1), metavar="PROBABILITY", help="of random erasing (default: 0)")

    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", choices=OPTIMIZERS, help="default: crsam")
    add("--base", choices=("sgd", "adamw"), help="what sam and crsam hand their gradient to (default: sgd)")
    add("--rho", type=number(0), help="radius of the perturbation (default: 0.1)")
    add("--alpha", type=number(0), help="weight of the curvature (default: 0.1, log: 0.01)")
    add("--beta", type=number(0), help="weight of the gradient norm (default: 0.01)")
    add("--regularizer", choices=tuple(REGULARIZERS), help="default: linear")
    add("--estimator", choices=("gradient", "loss"), help="where log takes its curvature from (default: gradient)")
    add("--adaptive", action=flag, help="scale the perturbation with the weights (ASAM)")
    add(
        "--sync-perturbation",
        action=flag,
        help="with several processes: perturb all with that of the whole batch, and not each with its own",
    )
    add("--interval", type=integer(1), metavar="K", help="perturb in every K-th step only (default: 1)")
    add("--reuse", action=flag, help="with --interval: go on with what the last perturbation has added")
    add("--curvature-interval", type=integer(1), metavar="K", help="take the third pass every K-th time (default: 1)")
    add("--max-grad-norm", type=number(1e-12), help="clip the norm of the combined gradient")
    add("--lr", type=number(0), help="peak learning rate")
    add("--momentum", type=number(0, 1), help="of SGD (default: 0.9)")
    add("--nesterov", action=flag)
    add("--weight-decay", type=number(0))
    add(
        "--decay-of",
        choices=("all", "matrices"),
        help="which parameters decay: all, or those of at least two dimensions, that is not biases and norms "
        "(default: matrices for ImageNet's kind of data, else all)",
    )

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
        help="of the learning rate, per step; step divides by 10 after each third of the run (default: cosine)",
    )
    for option in SCHEDULED:
        choices = (*SCHEDULES, "proportional") if option == "rho" else SCHEDULES
        more = "; proportional: as the learning rate, from --rho to --min-rho" if option == "rho" else ""
        add(f"--{option}-schedule", choices=choices, help=f"of {option}, as --schedule{more} (default: constant)")
    add("--min-rho", type=number(0), help="at the end of its schedule (default: 0)")
    add("--min-lr", type=number(0), help="learning rate at the end of a cosine or linear schedule (default: 0)")
    add("--warmup-epochs", type=number(0), help="linear, of the learning rate, part of --epochs (default: 0)")
    add("--warmup-steps", type=integer(0), help="the same in steps of the optimizer")
    add("--label-smoothing", type=number(0, 1), help="default: 0")
    add("--bce-loss", action=flag, help="binary cross-entropy of each class, summed over classes")
    add("--ema", type=number(0, 1), metavar="DECAY", help="evaluate a moving average of the weights, such as 0.999")
    add("--amp", action=flag, help="forward passes in bfloat16 (autocast)")
    add("--seed", type=integer(0), help="default: 0")
    add("--val-interval", type=integer(1), metavar="EPOCHS", help="epochs between tests (default: 1)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda, ... (default: auto, cuda where there is one)")
    add("--threads", type=integer(1), help="CPU threads (default: 1 for digits and mnist1d, else PyTorch's choice)")
    add("--workers", type=integer(0), help="processes that prepare images, for each device (default: 4)")
    add("--data-timeout", type=integer(1), metavar="SECONDS", help="to wait for images before giving up (default: 600)")
    add("--compile", action=flag, help="torch.compile the model and the loss")
    add("--cuda-graph", action=flag, help="capture the whole step in a CUDA graph, one for each image size")
    add("--channels-last", action=flag, help="lay images out with the channels last")
    add("--deterministic", action=flag, help="the same bits in each run on a GPU, at some cost")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, help="default: runs/DATA-MODEL-OPTIMIZER-seedSEED")
    add("--log-interval", type=integer(1), metavar="STEPS", help="steps between log lines (default: 50)")
    add("--save-steps", type=integer(1), metavar="N", help="save a checkpoint every N steps, besides after each epoch")
    add("--save-minutes", type=number(0), metavar="M", help="and every M minutes (default: 30)")
    add("--checkpoint-hist", type=integer(1), metavar="K", help="keep the weights of the best K epochs (default: 1)")
    add("--tensorboard", action=flag, help="write the log for TensorBoard too")
    add("--wandb", metavar="PROJECT", help="send the log to Weights & Biases too")
    add("--peak-tflops", type=number(1e-6), help="of one device, for the model FLOPs utilization of unknown devices")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the output folder; give the options it was started with",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")

    add = parser.add_argument_group("instead of training").add_argument
    add("--evaluate", type=Path, metavar="CHECKPOINT", help="test the weights of a checkpoint, with its options")
    add("--profile", type=number(0.1), metavar="SECONDS", help="measure the data alone, the step alone, and both")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, with the files of --config beneath it, and fill in every default.

    Raises:
        TrainingError: an option is unknown, has an unusable value or would do nothing.
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    configured = _configured(options, parser)
    kind = _kind_of_data(options.data or configured.data or "digits")
    optimizer = options.optimizer or configured.optimizer or "crsam"
    base = optimizer if optimizer in ("sgd", "adamw") else options.base or configured.base or "sgd"
    chosen = {"optimizer": optimizer, "base": base, "data": kind}
    _refuse_idle_options(options, chosen)
    if options.warmup_steps is not None or options.warmup_epochs is not None:
        configured.warmup_steps = configured.warmup_epochs = None  # one stands for the other
    for name, value in vars(configured).items():
        if getattr(options, name) is None and not _is_idle(name, chosen):
            setattr(options, name, value)
    options.base = base
    for name, value in _defaults(options, kind).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    _refuse_contradictions(options)
    return options


def _configured(options: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options beneath the command line: of a checkpoint to evaluate, or of files."""
    if options.evaluate:
        from . import checkpoint

        config, source = checkpoint.load(options.evaluate)["config"], str(options.evaluate)
    elif options.config:
        from . import recipes

        config, source = recipes.read(options.config), f"--config {' '.join(options.config)}"
    else:
        return parser.parse_args([])
    arguments: list[str] = []
    for name, value in config.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            arguments += [f"--{flag}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{flag}={value}")
    try:
        return parser.parse_args(arguments)
    except TrainingError as error:
        raise TrainingError(f"{source}: {error}") from error


def _kind_of_data(data: str) -> str:
    kind, _, rest = data.partition(":")
    fits = {
        **dict.fromkeys(("digits", "mnist1d"), not rest),
        **dict.fromkeys(WITH_PATH, bool(rest)),
        **dict.fromkeys(SYNTHETIC, rest.isdecimal() and int(rest) > 1),
    }
    if not fits.get(kind):
        raise TrainingError(f"--data {data}: give {_FORMS}")
    return kind


def _refuse_contradictions(options: argparse.Namespace) -> None:
    if options.warmup_epochs and options.warmup_steps:
        raise TrainingError("give --warmup-epochs or --warmup-steps, not both")
    if options.warmup_epochs >= options.epochs:
        raise TrainingError(f"--warmup-epochs {options.warmup_epochs:g} must be less than --epochs {options.epochs}")
    if (options.mixup or options.cutmix) and options.batch_size % 2:
        flag = "--mixup" if options.mixup else "--cutmix"
        raise TrainingError(f"{flag} pairs the samples of a batch: --batch-size {options.batch_size} must be even")
    if options.profile is not None and (options.resume or options.evaluate is not None):
        raise TrainingError("--profile goes with neither --resume nor --evaluate")
    if options.cuda_graph and options.compile:
        raise TrainingError("give --cuda-graph or --compile, not both")


def run_config(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what a run computes: what --resume compares."""
    return {name: value for name, value in vars(options).items() if name not in MACHINE_OPTIONS}


def full_config(options: argparse.Namespace) -> dict[str, Any]:
    """What config.json holds, which --config reads: all options but the output folder and what is done there."""
    return {name: value for name, value in vars(options).items() if name not in ("output", *NOT_IN_FILES)}


def _is_idle(name: str, chosen: dict[str, str]) -> bool:
    """Whether an option would do nothing."""
    if name not in OPTION_NEEDS:
        return False
    choice, allowed = OPTION_NEEDS[name]
    return chosen[choice] not in allowed


def _refuse_idle_options(options: argparse.Namespace, chosen: dict[str, str]) -> None:
    for name, (choice, allowed) in OPTION_NEEDS.items():
        if getattr(options, name) not in (None, False) and _is_idle(name, chosen):
            raise TrainingError(f"--{name.replace('_', '-')} is only for --{choice} {' or '.join(allowed)}")


def _defaults(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "data": "digits", "optimizer": "crsam", "schedule": "cosine", "min_lr": 0.0, "warmup_epochs": 0.0,
        "warmup_steps": 0, "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "reprob": 0.0, "seed": 0,
        "val_interval": 1, "decay_of": "all", "device": "auto", "log_interval": 50, "save_minutes": 30.0,
        "checkpoint_hist": 1,
    }  # fmt: skip
    defaults |= dict.fromkeys(FLAGS, False) | DATA_DEFAULTS[kind]
    if kind in THROUGH_WORKERS:
        defaults |= {"workers": 4, "data_timeout": 600}
    if kind in ("folder", "tar", "synthetic-jpeg"):
        defaults |= {"decoder": "auto", "interpolation": "bilinear", "max_bad_files": 100}
    if kind in IMAGENET_LIKE:
        sizes = image_sizes(options.image_size or defaults["image_size"])
        defaults |= {"val_image_size": sizes[-1][1]}
    if options.base == "adamw":
        defaults |= ADAMW_DEFAULTS
    else:
        defaults |= {"momentum": 0.9}
    if options.optimizer in (None, "sam", "crsam"):
        defaults |= {"rho": 0.1, "min_rho": 0.0, "interval": 1}
    defaults |= {f"{option}_schedule": "constant" for option in SCHEDULED}
    if options.optimizer in (None, "crsam"):
        defaults |= {"regularizer": "linear", "estimator": "gradient", "curvature_interval": 1}
    model = options.model or defaults["model"]
    optimizer, seed = options.optimizer or "crsam", options.seed or 0
    return defaults | {"output": Path("runs") / f"{kind}-{model}-{optimizer}-seed{seed}".replace("/", "_")}
