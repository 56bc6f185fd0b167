"""Images per second at ImageNet's size: the data alone, the step alone, and training.

Run ``python -m benchmarks.imagenet``; ``make gpu`` includes it. Images are synthetic JPEG files of 500x375 pixels. It
measures the four networks of the paper, each with the base optimizer, SAM, CR-SAM, and CR-SAM with fewer passes; the
data alone with each decoder; and, on a CUDA device, decoding alone with nvJPEG. Measurements that may not end within
--limit seconds are omitted.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crsam_ext import bench
from crsam_ext.training.data import Data, load
from crsam_ext.training.errors import TrainingError
from crsam_ext.training.loop import Training, prepare_device, start
from crsam_ext.training.options import parse
from crsam_ext.training.profile import PACKAGES, ROUNDS, measure, measure_data
from crsam_ext.training.ranks import ALONE
from crsam_ext.training.stop import Requests
from crsam_ext.training.synthetic import picture

ROOT = Path(__file__).parents[1]
DATA = "synthetic-jpeg:1000"
# Networks and the base optimizer of their recipes.
MODELS = {
    "resnet50": "sgd",
    "resnet101": "sgd",
    "vit_small_patch32_224": "adamw",
    "vit_base_patch32_224": "adamw",
}
METHODS = {
    "base": "--optimizer {base}",
    "SAM": "--optimizer sam --base {base}",
    "CR-SAM": "--optimizer crsam --base {base}",
    "CR-SAM cheap": "--optimizer crsam --base {base} --interval 5 --reuse --curvature-interval 10",
}
DECODERS = ("torchcodec", "pillow")
START = 8.0  # estimated seconds to start a cell
LIMIT = 570.0


def options_of(arguments: Namespace, model: str, method: str, decoder: str) -> Namespace:
    """Return the options of the corresponding `crsam-train` run."""
    on_gpu = torch.cuda.is_available()
    line = f"--data {DATA} --decoder {decoder} --model {model} {METHODS[method].format(base=MODELS.get(model, 'sgd'))}"
    line += f" --image-size {arguments.image_size} --batch-size {arguments.batch_size} --workers {arguments.workers}"
    return parse([*line.split(), *(["--amp", "--channels-last"] if on_gpu else [])])


def nvjpeg(device: torch.device, batch_size: int, seconds: float) -> dict[str, Any]:
    """Measure decoding alone, from files in memory to tensors (3, 375, 500) on the device, and return the record."""
    if device.type != "cuda":
        raise TrainingError("nvJPEG needs a CUDA device")
    from torchcodec.decoders import decode_jpeg

    files = [
        torch.frombuffer(bytearray(picture(index % 8, index // 8 % 4)), dtype=torch.uint8)
        for index in range(batch_size)
    ]
    rates: list[float] = []
    for index in range(-1, ROUNDS):  # the first round warms up
        images, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < seconds / ROUNDS:
            decode_jpeg(files, device=device)
            torch.cuda.synchronize(device)
            images += batch_size
        if index >= 0:
            rates.append(images / spent)
    return {
        "model": None, "method": None, "data": DATA, "decoder": "nvjpeg", "part": "decode", "batch_size": batch_size,
        "devices": 1, "images_per_second": rates,
    }  # fmt: skip


def run(arguments: Namespace) -> dict[str, Any]:
    """Measure everything, print progress and a table, and return the content of the result file.

    Args:
        arguments: parsed by :func:`parser`.
    """
    cells = [(model, method) for model in arguments.models for method in METHODS]
    half, of_cell, decoders = arguments.seconds / 2, arguments.seconds + START, len(arguments.decoders) + 1
    print(
        f"{len(cells)} cells of {arguments.seconds:g} s, {decoders} decoders of {half:g} s, {START:g} s to start each: "
        f"about {len(cells) * of_cell + decoders * (half + START):.0f} s; measurements that may exceed "
        f"{arguments.limit:g} s are omitted"
    )
    device = prepare_device(options_of(arguments, arguments.models[0], "base", "auto"))
    began = time.perf_counter()
    records: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    longest = 0.0  # seconds of the longest measurement so far; a slow device may exceed the expected time

    def attempt(name: str, seconds: float, function: Callable[[], list[dict[str, Any]]]) -> None:
        nonlocal longest
        started = time.perf_counter()
        if started - began + max(seconds, longest) > arguments.limit:
            skipped[name] = f"may exceed the limit of {arguments.limit:g} s"
        else:
            try:
                records.extend(function())
            except (TrainingError, RuntimeError, ImportError, OSError) as error:
                skipped[name] = (str(error).splitlines() or [type(error).__name__])[0]
            gc.collect()  # free a model or workers before the next ones start
            if device.type == "cuda":
                torch.cuda.empty_cache()
            longest = max(longest, time.perf_counter() - started)
        omitted = f" omitted: {skipped[name]}" if name in skipped else ""
        print(f"{time.perf_counter() - began:6.0f} s  {name}{omitted}", flush=True)

    loaded: list[tuple[Data, dict[str, Any]]] = []  # data and record of the first available decoder, for all cells

    def data_alone(decoder: str) -> list[dict[str, Any]]:
        options = options_of(arguments, arguments.models[0], "base", decoder)
        data = load(options, device)
        record = measure_data(data, options, device, half)
        loaded.append((data, record))
        del loaded[1:]
        return [record]

    def cell(model: str, method: str) -> list[dict[str, Any]]:
        if not loaded:
            raise TrainingError("no images were loaded")
        data, record = loaded[0]
        options = options_of(arguments, model, method, record["decoder"])
        state = start(options, data, device, ALONE)
        compute, both = measure(Training(options, data, state, Requests(ALONE, math.inf), None), half, data_alone=False)
        return [compute | {"cores_per_device": bench.cores_per_device(compute, record)}, both]

    for decoder in arguments.decoders:
        attempt(f"data, {decoder}", half + START, partial(data_alone, decoder))
    attempt("decoding, nvJPEG", half + START, lambda: [nvjpeg(device, arguments.batch_size, half)])
    for model, method in cells:
        attempt(f"{model}, {method}", of_cell, partial(cell, model, method))
    print("\n" + bench.table({"training": records}))
    options = {name: value for name, value in vars(arguments).items() if name != "output"}
    return {"options": options, "training": records, "skipped": skipped}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    on_gpu, cores = torch.cuda.is_available(), bench.cores()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=20.0, help="per network and method (default: 20)")
    parser.add_argument("--image-size", type=int, default=224, help="side of a training image (default: 224)")
    parser.add_argument("--batch-size", type=int, default=256 if on_gpu else 8, help="default: 256, on a CPU 8")
    parser.add_argument("--workers", type=int, default=cores, help="processes that load images (default: one per core)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names in timm")
    parser.add_argument(
        "--decoders", nargs="+", choices=DECODERS, default=list(DECODERS), help="training uses the first available one"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT, metavar="SECONDS", help="for all measurements (default: 570)"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "imagenet.json")
    return parser


def main() -> None:
    """Measure and write the result file."""
    arguments = parser().parse_args()
    results = run(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = bench.machine(device, PACKAGES) | {"command": " ".join(["python -m benchmarks.imagenet", *sys.argv[1:]])}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report | results, indent=1) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
