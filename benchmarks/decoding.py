"""Time per image on one core, from the bytes of a JPEG file to the pixels of a training sample.

Run ``python -m benchmarks.decoding``. The images are crops of scikit-learn's two photographs, 500x375 pixels and
quality 92, and the same images after ``crsam-train prepare`` with a short side of 256 pixels. The pipelines are timm's
transforms on Pillow images, and crsam-train with each decoder. Each decodes the file, takes a random crop of 8 to 100 %
of the area, resizes it to 224x224 and flips it at random. All process the same images in each round. Times are
processor times of one thread, and ratios compare times of the same round.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data.transforms_factory import create_transform

from crsam_ext import bench
from crsam_ext.training.augment import Augmentation, random_resized_crop
from crsam_ext.training.decoding import choose, decode
from crsam_ext.training.errors import TrainingError
from crsam_ext.training.prepare import shrink

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "timm", "pillow", "torchcodec")
SIZE = 224
MEAN = (0.485, 0.456, 0.406)


def photographs(count: int) -> list[bytes]:
    """Return JPEG files of 500x375 pixels, cropped from two photographs."""
    generator = np.random.default_rng(0)
    files = []
    for index in range(count):
        image = Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[index % 2]))
        left, top = (int(generator.integers(side - part)) for side, part in zip(image.size, (500, 375), strict=True))
        file = io.BytesIO()
        image.crop((left, top, left + 500, top + 375)).save(file, "JPEG", quality=92)
        files.append(file.getvalue())
    return files


def shrunk(files: Sequence[bytes], folder: Path, size: int = 256, quality: int = 90) -> list[bytes]:
    """Return the files as ``crsam-train prepare`` writes them."""
    made = []
    for index, data in enumerate(files):
        path = folder / f"{index}.jpg"
        path.write_bytes(data)
        _, content = shrink(path, size, quality)
        assert content is not None
        made.append(content)
    return made


def pipelines() -> dict[str, Callable[[bytes], Any]]:
    """Return the compared functions of a file. Print a line for each decoder that is not available."""

    def of_timm(transform: Any, data: bytes) -> Any:
        with Image.open(io.BytesIO(data)) as image:
            return transform(image.convert("RGB"))

    def ours(decoder: str, data: bytes) -> torch.Tensor:
        pixels = decode(data, "", decoder)
        assert pixels is not None
        return augment(pixels, SIZE)

    crop = partial(random_resized_crop, scale=(0.08, 1.0), interpolation="bilinear")
    augment = Augmentation(crop, None, MEAN, "bilinear")
    plain: dict[str, Any] = {"is_training": True, "interpolation": "bilinear", "use_prefetcher": True}
    found: dict[str, Callable[[bytes], Any]] = {
        "timm": partial(of_timm, create_transform(SIZE, color_jitter=None, **plain)),
        "timm, color jitter 0.4": partial(of_timm, create_transform(SIZE, color_jitter=0.4, **plain)),
    }
    for decoder in ("pillow", "torchcodec"):
        try:
            found[f"crsam-train, {decoder}"] = partial(ours, choose(decoder))
        except TrainingError as error:
            print(f"omitted: {error}")
    return found


def measure(files: dict[str, list[bytes]], rounds: int) -> dict[str, list[float]]:
    """Return images per second of processor time for each pipeline and kind of files, one value per round."""
    torch.set_num_threads(1)
    cells = {f"{name}, {kind}": (run, kind) for name, run in pipelines().items() for kind in files}
    rates: dict[str, list[float]] = {name: [] for name in cells}
    for index in range(-1, rounds):  # the first round warms up
        for name, (run, kind) in cells.items():
            began = time.thread_time()
            for data in files[kind]:
                run(data)
            if index >= 0:
                rates[name].append(len(files[kind]) / (time.thread_time() - began))
    return rates


def table(rates: dict[str, list[float]]) -> str:
    """Return a table: images per second, and p20, p50 and p80 of the ratio to timm with the same files."""
    lines = [f"{'':44}{'images/s':>9}   relative to timm (p20, p50, p80)"]
    for name, values in rates.items():
        base = rates["timm, " + name.rpartition(", ")[2]]
        low, middle, high = bench.quantiles([x / y for x, y in zip(values, base, strict=True)])
        lines.append(f"{name:44}{statistics.median(values):9.0f}   {low:.2f} {middle:.2f} {high:.2f}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=40, help="images per round (default: 40)")
    parser.add_argument("--rounds", type=int, default=25, help="default: 25")
    parser.add_argument("--output", type=Path, default=RESULTS / "decoding.json", help="result file")
    arguments = parser.parse_args()
    files = photographs(arguments.images)
    with TemporaryDirectory() as folder:
        rates = measure({"500x375": files, "prepared": shrunk(files, Path(folder))}, arguments.rounds)
    print(table(rates))
    report = bench.machine(torch.device("cpu"), PACKAGES)
    report |= {"command": " ".join(["python -m benchmarks.decoding", *sys.argv[1:]]), "images_per_second": rates}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
