"""The command line of ``crsam-train``, and the default options of each data set."""

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
SCHEDULED = ("rho", "alpha", "beta")  # in addition to the learning rate
WITH_PATH = ("cifar10", "cifar100", "folder", "tar")
SYNTHETIC = ("synthetic", "synthetic-jpeg")
IMAGENET_LIKE = ("folder", "tar", *SYNTHETIC)
THROUGH_WORKERS = (*WITH_PATH, "synthetic-jpeg")  # data that worker processes prepare

# Options that may change when a run is resumed: where and how it is computed. All others define the run.
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
# A batch of a small data set is too little work for several threads: they would mostly wait for each other.
DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"model": "cnn", "epochs": 20, "batch_size": 64, "lr": 0.05, "weight_decay": 1e-3, "threads": 1},
    "mnist1d": {"model": "mlp", "epochs": 60, "batch_size": 128, "lr": 0.05, "weight_decay": 1e-3, "threads": 1},
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    **dict.fromkeys(IMAGENET_LIKE, _IMAGENET),
}
ADAMW_DEFAULTS = {"lr": 1e-3, "weight_decay": 0.05}

# Options that would have no effect are refused. Each of these is unset (None or False) by default.
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
# Options that select an action; they do not describe a run.
NOT_IN_FILES = ("config", "evaluate", "profile", "resume", "overwrite")
#: The accepted forms of --data.
_FORMS = (
    "digits, mnist1d, cifar10:PATH, cifar100:PATH, folder:PATH, tar:PATH, synthetic:CLASSES or synthetic-jpeg:CLASSES"
)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises its errors as TrainingError, in one line without the usage."""

    def error(self, message: str) -> NoReturn:
        raise TrainingError(message)


def number(minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    """Return a converter for finite numbers in [minimum, maximum], for use as ``type`` in ``argparse``."""

    def convert(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and minimum <= value <= maximum):
            limit = f" and at most {maximum:g}" if maximum < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {minimum:g}{limit}")
        return value

    convert.__name__ = "number"
    return convert


def integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a converter for integers in [minimum, maximum], for use as ``type`` in ``argparse``."""

    def convert(text: str) -> int:
        value = int(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text} is not an integer from {minimum} to {maximum}")
        return value

    convert.__name__ = "integer"
    return convert


def image_sizes(text: str) -> list[tuple[float, int]]:
    """Parse ``SIZE[,SIZE@FRACTION...]`` into pairs: a fraction of the run, and the size used from that point.

    The first fraction is 0. Sizes are in pixels; fractions increase and are less than 1.

    Raises:
        ValueError: the text does not have this form.
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
    """Parse ``KEY=VALUE``. The value is parsed as JSON; text that is not JSON stays a string.

    Raises:
        ValueError: the text does not have this form.
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
    """Build the parser of ``crsam-train``. Unset options are ``None`` here; :func:`parse` fills them in."""
    parser = Parser(
        prog="crsam-train",
        description="Train an image classifier with CR-SAM, SAM or their base optimizer.",
        epilog="The default of an option may depend on the data set; config.json in the output folder records all "
        "options of a run. 'crsam-train prepare SOURCE TARGET' shrinks the images of a data set once, so that training "
        "reads and decodes less: see 'crsam-train prepare --help'.",
        allow_abbrev=False,
    )
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("what to train").add_argument
    add(
        "--config",
        nargs="+",
        default=[],
        metavar="FILE",
        help="read options from YAML files or shipped recipes (by name); later files override earlier ones, and the "
        "command line overrides all files",
    )
    add(
        "--data",
        help=f"the data set: {_FORMS}. folder:PATH contains train/ and val/, each with one folder per class; tar:PATH "
        "contains train.tar and val.tar with the same folders. Images are the files that Pillow can open. An image "
        "with more than 8 bits per channel, or with more pixels than Pillow allows, is an error. Hidden files and "
        "folders, files outside the class folders and files that are not images are ignored, with a warning. A folder "
        "inside a class folder, a class without training images and a class in val that train lacks are errors. A "
        "training image that cannot be read is reported, replaced by another, and counted in log.csv as bad_files. The "
        "synthetic data sets have 100 training and 10 validation images per class: synthetic holds tensors on the "
        "device, synthetic-jpeg holds JPEG files that are decoded like real ones (default: digits)",
    )
    add(
        "--max-bad-files",
        type=integer(0),
        help="stop with an error if more training images cannot be read (default: 100)",
    )
    add(
        "--skip-bad-val",
        action=flag,
        help="ignore validation images that cannot be read, instead of stopping with an error",
    )
    add("--model", help="mlp, cnn, cifar_resnet18, wrn28_10, pyramidnet110 or any timm model")
    add("--drop-path", type=number(0, 1), help="stochastic depth rate, for timm models")
    add(
        "--model-kwargs",
        type=_key_and_value,
        nargs="+",
        metavar="KEY=VALUE",
        help="additional arguments for timm models, such as global_pool=avg class_token=false",
    )
    add("--head-init-bias", type=float, help="initial bias of the classifier layer, such as -10 with --bce-loss")
    add(
        "--image-size",
        type=_image_sizes,
        metavar="SIZE[,SIZE@FRACTION...]",
        help="training image size in pixels; 160,192@0.75 means 192 for the last quarter of the run (default: 224)",
    )
    add(
        "--val-image-size",
        type=integer(1),
        help="size of the validation images in pixels (default: last of --image-size)",
    )
    add(
        "--crop-pct",
        type=number(0.01, 1),
        help="center crop of validation images, relative to the resized short side (default: 0.875)",
    )
    add(
        "--mean",
        type=float,
        nargs=3,
        metavar="M",
        help="mean of each channel, for pixels in [0, 1] (default: ImageNet's)",
    )
    add(
        "--std",
        type=number(1e-6),
        nargs=3,
        metavar="S",
        help="standard deviation of each channel (default: ImageNet's)",
    )
    add(
        "--decoder",
        choices=("auto", "torchcodec", "pillow"),
        help="JPEG decoder (default: auto, torchcodec if it can be imported)",
    )

    add = parser.add_argument_group("augmentation").add_argument
    add(
        "--scale",
        type=number(0.0001, 1),
        nargs=2,
        metavar=("MIN", "MAX"),
        help="relative area of random crops (default: 0.08 1)",
    )
    add("--interpolation", choices=("bilinear", "bicubic"), help="interpolation for resizing (default: bilinear)")
    add("--auto-augment", metavar="POLICY", help="augmentation policy of timm, such as rand-m9-mstd0.5")
    add("--mixup", type=number(0), metavar="ALPHA", help="mixup alpha (default: 0, off)")
    add(
        "--cutmix",
        type=number(0),
        metavar="ALPHA",
        help="cutmix alpha (default: 0, off); with --mixup, each step uses one at random",
    )
    add("--reprob", type=number(0, 1), metavar="PROBABILITY", help="probability of random erasing (default: 0)")

    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", choices=OPTIMIZERS, help="default: crsam")
    add("--base", choices=("sgd", "adamw"), help="base optimizer of sam and crsam (default: sgd)")
    add("--rho", type=number(0), help="radius of the perturbation (default: 0.1)")
    add("--alpha", type=number(0), help="weight of the curvature term (default: 0.1; with --regularizer log: 0.01)")
    add("--beta", type=number(0), help="weight of the gradient-norm term (default: 0.01)")
    add("--regularizer", choices=tuple(REGULARIZERS), help="form of the curvature term (default: linear)")
    add(
        "--estimator", choices=("gradient", "loss"), help="how the log form estimates the curvature (default: gradient)"
    )
    add("--adaptive", action=flag, help="scale the perturbation by the magnitude of the weights (ASAM)")
    add(
        "--sync-perturbation",
        action=flag,
        help="with several processes: perturb with the gradient of the global batch; by default each process uses the "
        "gradient of its own samples",
    )
    add("--interval", type=integer(1), metavar="K", help="perturb in every K-th step only (default: 1)")
    add(
        "--reuse",
        action=flag,
        help="with --interval: add the last sharpness direction in the steps without a perturbation",
    )
    add(
        "--curvature-interval",
        type=integer(1),
        metavar="K",
        help="run the third pass in every K-th perturbed step (default: 1)",
    )
    add("--max-grad-norm", type=number(1e-12), help="clip the norm of the combined gradient")
    add("--lr", type=number(0), help="peak learning rate")
    add("--momentum", type=number(0, 1), help="momentum of SGD (default: 0.9)")
    add("--nesterov", action=flag, help="Nesterov momentum of SGD")
    add("--weight-decay", type=number(0), help="weight decay of the base optimizer")
    add(
        "--decay-of",
        choices=("all", "matrices"),
        help="parameters with weight decay: all, or matrices, those with at least two dimensions, which excludes "
        "biases and norms (default: matrices for folder, tar and synthetic data, otherwise all)",
    )

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=integer(1), help="number of epochs")
    add(
        "--batch-size",
        type=integer(1),
        help="global batch size, summed over all processes. For digits and mnist1d, an incomplete last batch is "
        "dropped if it holds one sample, with mixup or cutmix, or with several processes; for other data, it is "
        "always dropped",
    )
    add(
        "--schedule",
        choices=SCHEDULES,
        help="learning-rate schedule, updated in each step; step divides by 10 after each third of the run (default: "
        "cosine)",
    )
    for option in SCHEDULED:
        choices = (*SCHEDULES, "proportional") if option == "rho" else SCHEDULES
        more = "; proportional follows the learning rate, from --rho to --min-rho" if option == "rho" else ""
        add(
            f"--{option}-schedule",
            choices=choices,
            help=f"schedule of {option}, as for --schedule{more} (default: constant)",
        )
    add("--min-rho", type=number(0), help="rho at the end of its schedule (default: 0)")
    add("--min-lr", type=number(0), help="learning rate at the end of a cosine or linear schedule (default: 0)")
    add(
        "--warmup-epochs", type=number(0), help="linear warm-up of the learning rate, included in --epochs (default: 0)"
    )
    add("--warmup-steps", type=integer(0), help="warm-up in optimizer steps, instead of --warmup-epochs")
    add("--label-smoothing", type=number(0, 1), help="label smoothing (default: 0)")
    add("--bce-loss", action=flag, help="use binary cross-entropy, summed over the classes")
    add(
        "--ema",
        type=number(0, 1),
        metavar="DECAY",
        help="evaluate an exponential moving average of the weights, with a decay such as 0.999",
    )
    add("--amp", action=flag, help="mixed precision: forward passes in bfloat16 (autocast)")
    add("--seed", type=integer(0), help="random seed (default: 0)")
    add("--val-interval", type=integer(1), metavar="N", help="evaluate after every N-th epoch (default: 1)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda, ... (default: auto, cuda if available)")
    add(
        "--threads",
        type=integer(1),
        help="CPU threads (default: 1 for digits and mnist1d, otherwise PyTorch's default)",
    )
    add("--workers", type=integer(0), help="worker processes that prepare images, per device (default: 4)")
    add(
        "--data-timeout",
        type=integer(1),
        metavar="SECONDS",
        help="stop with an error after waiting this long for images (default: 600)",
    )
    add("--compile", action=flag, help="torch.compile the model and the loss")
    add("--cuda-graph", action=flag, help="capture each optimizer step in a CUDA graph, one per batch shape")
    add("--channels-last", action=flag, help="use the channels-last memory format")
    add("--deterministic", action=flag, help="make runs on a GPU bit-for-bit reproducible, at some cost in speed")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, help="output folder (default: runs/DATA-MODEL-OPTIMIZER-seedSEED)")
    add("--log-interval", type=integer(1), metavar="STEPS", help="steps between log lines (default: 50)")
    add("--save-steps", type=integer(1), metavar="N", help="save a checkpoint every N steps, in addition to each epoch")
    add("--save-minutes", type=number(0), metavar="M", help="save a checkpoint every M minutes (default: 30)")
    add("--checkpoint-hist", type=integer(1), metavar="K", help="keep the weights of the best K epochs (default: 1)")
    add("--tensorboard", action=flag, help="also log to TensorBoard")
    add("--wandb", metavar="PROJECT", help="also log to Weights & Biases")
    add(
        "--peak-tflops",
        type=number(1e-6),
        help="peak TFLOPS of one device, to compute the model FLOPs utilization of an unknown device",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in the output folder; give the same options as at its start",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")

    add = parser.add_argument_group("instead of training").add_argument
    add(
        "--evaluate",
        type=Path,
        metavar="CHECKPOINT",
        help="evaluate the weights of a checkpoint, with the options stored in it",
    )
    add(
        "--profile",
        type=number(0.1),
        metavar="SECONDS",
        help="measure the speed of data loading alone, of training steps alone, and of both together",
    )
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, add the options of the --config files, and fill in all defaults.

    Raises:
        TrainingError: an option is unknown, has an invalid value or would have no effect.
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
        configured.warmup_steps = configured.warmup_epochs = None  # the command line may set the other of the two
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
    """Return the options that the command line overrides: from the checkpoint to evaluate or the --config files."""
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
        raise TrainingError(f"--data {data} is not valid: use {_FORMS}")
    return kind


def _refuse_contradictions(options: argparse.Namespace) -> None:
    if options.warmup_epochs and options.warmup_steps:
        raise TrainingError("use --warmup-epochs or --warmup-steps, not both")
    if options.warmup_epochs >= options.epochs:
        raise TrainingError(f"--warmup-epochs {options.warmup_epochs:g} must be less than --epochs {options.epochs}")
    if (options.mixup or options.cutmix) and options.batch_size % 2:
        flag = "--mixup" if options.mixup else "--cutmix"
        raise TrainingError(f"{flag} pairs the samples of a batch: --batch-size {options.batch_size} must be even")
    if options.profile is not None and (options.resume or options.evaluate is not None):
        raise TrainingError("--profile cannot be combined with --resume or --evaluate")
    if options.cuda_graph and options.compile:
        raise TrainingError("use --cuda-graph or --compile, not both")


def run_config(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that determine what a run computes; --resume compares them."""
    return {name: value for name, value in vars(options).items() if name not in MACHINE_OPTIONS}


def full_config(options: argparse.Namespace) -> dict[str, Any]:
    """Return the content of config.json, which --config can read: all options except --output and the actions."""
    return {name: value for name, value in vars(options).items() if name not in ("output", *NOT_IN_FILES)}


def _is_idle(name: str, chosen: dict[str, str]) -> bool:
    """Return whether an option would have no effect."""
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
