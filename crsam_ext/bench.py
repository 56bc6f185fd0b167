"""``crsam-bench``: show benchmark results as a table or as figures, and compare two result files.

A result file is JSON. "results" is a list of records, one for each peer and case; their "seconds", "copy" and "loop"
have one value per round. "host" and "shares" are further lists. "training" is a list of records whose
"images_per_second" has one value per round. Each list may be absent. The file also holds device, versions and command.
benchmarks/README.md describes all values.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["compare", "cores", "cores_per_device", "draw", "machine", "main", "rate_of_core", "table"]

Results = dict[str, Any]
_KEY = ("model", "method", "base", "dtype", "peer")
_HOST_KEY = ("backend", "model", "base", "form")
_TRAINING_KEY = ("model", "method", "data", "decoder", "part")
#: A smaller relative difference is ignored, however narrow the spread.
TOLERANCE = 0.05


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentiles."""
    if len(values) < 2:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def ratios(record: dict[str, Any], of: str) -> list[float]:
    """Return the time divided by that of "copy" or "loop" of the same round, since both drift with the machine."""
    return [x / y for x, y in zip(record["seconds"], record[of], strict=True)]


def machine(device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """Return the description of the machine for a result file: device, cores available to this process, versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"device": name, "cores": cores(), "versions": versions}


def cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rate_of_core(data: dict[str, Any]) -> float:
    """Return the images per second of one process: rate of the data alone / (devices x max(workers, 1))."""
    rate = statistics.median(data["images_per_second"])
    return rate / (data["devices"] * max(data["workers"], 1))


def cores_per_device(compute: dict[str, Any], data: dict[str, Any]) -> int:
    """Return the cores (one process each) that keep up with a device: ceil(rate of compute alone / rate per core)."""
    return math.ceil(statistics.median(compute["images_per_second"]) / compute["devices"] / rate_of_core(data))


def table(results: Results) -> str:
    """Return all results as text, with one line per record."""
    sections = [_steps_table(results), _host_table(results), _shares_table(results), _training_table(results)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _steps_table(results: Results) -> list[str]:
    if not results.get("results"):
        return []
    lines = [
        f"{'':44}{'ms p20':>9}{'p50':>9}{'p80':>9}{'/loop':>7}{'/copy':>7}{'GB/s':>7}{'of copy':>8}{'MB moved':>9}"
        f"{'ops':>7}{'peak MB':>8}{'held MB':>8}{'allocs':>7}{'syncs':>6}   phases, ms"
    ]
    case = None
    for r in results["results"]:
        if case != [r[k] for k in _KEY[:4]]:
            case = [r[k] for k in _KEY[:4]]
            lines.append(" ".join(case) + f", {r['elements']:,} elements")
        p20, p50, p80 = (1e3 * q for q in quantiles(r["seconds"]))
        speed = r["bytes"] / p50 / 1e6
        # Relative to the speed of the copy of `floor_bytes` in the same rounds.
        share = statistics.median(
            r["bytes"] / s / (r["floor_bytes"] / c) for s, c in zip(r["seconds"], r["copy"], strict=True)
        )
        phases = " ".join(f"{1e3 * statistics.median(x):.1f}" for x in zip(*r["phases"], strict=True))
        lines.append(
            f"  {r['peer']:42}{p20:9.2f}{p50:9.2f}{p80:9.2f}{statistics.median(ratios(r, 'loop')):7.2f}"
            f"{statistics.median(ratios(r, 'copy')):7.2f}{speed:7.1f}{share:8.0%}{r['bytes'] / 1e6:9.0f}"
            f"{r['operations']:>7}{r['peak_bytes'] / 1e6:8.0f}{r['held_bytes'] / 1e6:8.0f}{r['allocations']:7}"
            f"{r['synchronisations']:>6}   {phases}"
        )
    return lines


def _host_table(results: Results) -> list[str]:
    if not results.get("host"):
        return []
    lines = [f"{'host time of a step, us':44}{'p20':>9}{'p50':>9}{'p80':>9}{'floor':>9}{'/floor':>8}"]
    for h in results["host"]:
        p20, p50, p80 = (1e6 * q for q in quantiles(h["seconds"]))
        floor = 1e6 * statistics.median(h["floor"])
        ratio = statistics.median(x / y for x, y in zip(h["seconds"], h["floor"], strict=True))
        name = " ".join(h[k] for k in _HOST_KEY)
        lines.append(f"  {name:42}{p20:9.0f}{p50:9.0f}{p80:9.0f}{floor:9.0f}{ratio:8.2f}")
    return lines


def _shares_table(results: Results) -> list[str]:
    if not results.get("shares"):
        return []
    lines = ["share of the optimizer in a training step"]
    for s in results["shares"]:
        p20, p50, p80 = quantiles(s["shares"])
        lines.append(
            f"  {s['peer']}, {s['model']}, batch {s['batch']}, {s['dtype']}: {p50:.1%} ({p20:.1%} to {p80:.1%}) of"
            f" {1e3 * statistics.median(s['seconds']):.0f} ms"
        )
    return lines


def _training_table(results: Results) -> list[str]:
    if not results.get("training"):
        return []
    width = 2 + max(len(_training_name(r)) for r in results["training"])
    lines = [f"{'training, images/s':{width}}{'p20':>9}{'p50':>9}{'p80':>9}{'passes':>8}{'MFU':>6}   "]
    for r in results["training"]:
        p20, p50, p80 = quantiles(r["images_per_second"])
        passes = f"{r['passes']:.2f}" if r.get("passes") else "–"
        mfu = f"{statistics.median(r['mfu_percent']):.0f} %" if r.get("mfu_percent") else "–"
        lines.append(
            f"{'  ' + _training_name(r):{width}}{p20:9.1f}{p50:9.1f}{p80:9.1f}{passes:>8}{mfu:>6}   {_details(r)}"
        )
    if any("cores_per_device" in r for r in results["training"]):
        lines.append(
            "  images/s per core: data alone / (devices x processes); cores per device: ceil(compute / devices / "
            "images/s per core)"
        )
    return lines


def _training_name(record: dict[str, Any]) -> str:
    return "  ".join(str(record[k]) for k in _TRAINING_KEY if record[k] is not None)


def _details(record: dict[str, Any]) -> str:
    details = []
    if "images_per_second_per_core" in record:
        details.append(
            f"images/s per core: {record['images_per_second_per_core']:.1f}; devices: {record['devices']}, "
            f"processes: {max(record['workers'], 1)}"
        )
    if "cores_per_device" in record:
        details.append(f"cores per device: {record['cores_per_device']}")
    if record["part"] == "both":
        rounds = record["parts_percent"]
        means = {part: statistics.fmean(of_round[part] for of_round in rounds) for part in sorted(rounds[0])}
        details.append(", ".join(f"{part} {share:.1f} %" for part, share in means.items()))
    return "; ".join(details)


_SHOWN = 6.0  # greatest value that determines an axis; bars of greater ones are cut off


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw two figures: time of a step by model and peer, and bytes moved relative to the floor. Needs matplotlib."""
    from .figures import COLORS, panels, reference_line

    cases: dict[str, list[dict[str, Any]]] = {}
    for record in results.get("results", []):
        cases.setdefault(" ".join(record[k] for k in _KEY[:4]), []).append(record)
    paths: list[Path] = []
    if not cases:
        return paths
    for name in ("time", "bytes"):
        figure, axes = panels(len(cases), height=2.6, columns=2)
        for ax, (case, records) in zip(axes, cases.items(), strict=True):
            peers = [r["peer"] for r in records]
            if name == "time":
                lows, values, highs = zip(*(quantiles(ratios(r, "copy")) for r in records), strict=True)
                label, reference = "time of a step / time of the copy", "copy"
            else:
                lows = values = highs = tuple(r["bytes"] / r["floor_bytes"] for r in records)
                label, reference = "bytes moved / bytes of the fused step", "fused step"
            limit = 1.2 * max(1.0, *(high for value, high in zip(values, highs, strict=True) if value <= _SHOWN))
            ax.set_xlim(0, limit)
            bars = ax.barh(peers, values, color=[COLORS[_kind(peer)] for peer in peers])
            if name == "bytes":
                for bar, record in zip(bars, records, strict=True):
                    bar.set_hatch("" if record["bytes_are"] == "counted" else "///")
                    bar.set_edgecolor("white")
            for place, (low, value, high) in enumerate(zip(lows, values, highs, strict=True)):
                cut_off, inside = value > limit, high > limit
                if not cut_off:
                    ax.hlines(place, low, high, color="black")
                ax.annotate(
                    f"{value:.2f} →" if cut_off else f"{value:.2f}", (min(low, limit) if inside else high, place),
                    (-4 if inside else 5, 0), textcoords="offset points", va="center", fontsize=7,
                    ha="right" if inside else "left", color="white" if inside else "black",
                )  # fmt: skip
            reference_line(ax, 1.0, reference)
            ax.invert_yaxis()
            ax.set_title(case, fontsize=9, pad=14)
            ax.set_xlabel(label, fontsize=8)
        figure.suptitle(
            f"{results['device']}: " + ("median, p20 to p80" if name == "time" else "counted; hatched: derived"),
            fontsize=9,
        )
        paths.append(folder / f"{results['name']}-{name}.png")
        figure.savefig(paths[-1], dpi=100)
    return paths


def _kind(peer: str) -> str:
    """Return the kind of a peer, which determines its color."""
    if peer.startswith("crsam_ext"):
        return "crsam_ext"
    return {"loop": "loop", "torch, base alone": "reference"}.get(peer, "other")


def compare(before: Results, after: Results) -> list[str]:
    """Return a line for each result that is slower in ``after`` or moves more bytes.

    Slower means: by more than :data:`TOLERANCE`, and beyond the spread (p20 above the other's p80). Times are compared
    as ratios to the copy of the same round (host times: to their floor), so that results of a drifting machine can be
    compared. Bytes and the time per training image are compared directly.
    """
    lines = []
    old = {tuple(r[k] for k in _KEY): r for r in before.get("results", [])}
    pairs = [
        (" ".join(key), ratios(old[key], "copy"), ratios(r, "copy"), old[key].get("bytes"), r.get("bytes"))
        for r in after.get("results", [])
        if (key := tuple(r[k] for k in _KEY)) in old
    ]
    old = {tuple(h[k] for k in _HOST_KEY): h for h in before.get("host", [])}
    for h in after.get("host", []):
        if (key := tuple(h[k] for k in _HOST_KEY)) in old:
            own, other = (
                [x / y for x, y in zip(host["seconds"], host["floor"], strict=True)] for host in (h, old[key])
            )
            pairs.append(("host " + " ".join(key), other, own, None, None))
    old = {tuple(r[k] for k in _TRAINING_KEY): r for r in before.get("training", [])}
    for r in after.get("training", []):
        if (key := tuple(r[k] for k in _TRAINING_KEY)) in old:
            own, other = ([1e3 / rate for rate in record["images_per_second"]] for record in (r, old[key]))
            pairs.append((f"{_training_name(r)}, ms per image", other, own, None, None))
    for name, x, y, old_bytes, new_bytes in pairs:
        (_, x50, x80), (y20, y50, _) = quantiles(x), quantiles(y)
        if y20 > x80 and y50 > (1 + TOLERANCE) * x50:
            lines.append(
                f"slower: {name}: {x50:.3f} -> {y50:.3f} ({y50 / x50 - 1:+.0%}), p80 {x80:.3f}, now p20 {y20:.3f}"
            )
        if old_bytes is not None and new_bytes is not None and new_bytes > old_bytes:
            lines.append(f"more bytes: {name}: {old_bytes:,} -> {new_bytes:,}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``crsam-bench``. The exit code of ``compare`` is 1 if anything is slower."""
    parser = argparse.ArgumentParser(prog="crsam-bench", description="Show and compare benchmark results.")
    commands = parser.add_subparsers(dest="command", required=True)
    comparison = commands.add_parser(
        "compare", help="compare two result files; exit with code 1 if AFTER is slower than BEFORE"
    )
    comparison.add_argument("before", type=Path, metavar="BEFORE")
    comparison.add_argument("after", type=Path, metavar="AFTER")
    for name, text in (("table", "print the results as a table"), ("draw", "draw two figures next to the result file")):
        commands.add_parser(name, help=text).add_argument("file", type=Path)
    given = parser.parse_args(arguments)
    if given.command != "compare":
        results = json.loads(given.file.read_text())
        print(table(results) if given.command == "table" else "\n".join(map(str, draw(results, given.file.parent))))
        return 0
    before, after = (json.loads(path.read_text()) for path in (given.before, given.after))
    if before["device"] != after["device"]:
        print(f"note: the devices differ: {before['device']} and {after['device']}")
    options, others = before.get("options", {}), after.get("options", {})
    for name in sorted(options.keys() & others.keys()):
        if options[name] != others[name]:
            print(f"note: {name} differs: {options[name]} and {others[name]}")
    slower = compare(before, after)
    print("\n".join(slower) or "nothing is slower")
    return int(bool(slower))
