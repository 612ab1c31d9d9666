"""Plots of the results: few colours, told apart by everybody, and each line or point with its name beside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks import blocking, restore, sequences, training, whole
from benchmarks.timing import Samples, quartiles

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import Bbox

OURS, OURS_TOO, OTHERS = "#D55E00", "#E69F00", "#0072B2"  # vermilion, orange, blue: the palette of Okabe and Ito
GREY = "#666666"
LINES = ("-", "--", "-.", ":")
SIZE, DPI = (8.0, 4.6), 130
MARGINS = {"left": 0.09, "right": 0.97, "bottom": 0.12, "top": 0.92}
NAMES_A_LINE = 3
PLACES = sorted(((x, y) for x in range(10, 131, 30) for y in range(-120, 121, 3)), key=lambda at: math.hypot(*at))
"""Where a name may stand from its point, the nearest first."""
Results = dict[str, dict[str, Any]]
Bar = tuple[float, float, float]
"""x, and from where to where"""


def draw(found: Results, folder: Path) -> dict[str, Path]:
    """name -> file, of the plots for which there are results."""
    made = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (plot, needs) in PLOTS.items():
        if all(need in found for need in needs):
            figure, axes = pyplot.subplots(figsize=SIZE, dpi=DPI)
            figure.subplots_adjust(**MARGINS)
            axes.spines[["top", "right"]].set_visible(False)
            plot(axes, found)
            made[name] = folder / f"{name}.png"
            figure.savefig(made[name], metadata={"Software": None})
            pyplot.close(figure)
    return made


def colour(name: str) -> str:
    if name == "everystep":
        return OURS
    return OURS_TOO if name.startswith("everystep") else OTHERS


def name_points(axes: Axes, points: Sequence[tuple[str, float, float]], bars: Sequence[Bar] = ()) -> None:
    """Names to the right of points, moved away until none covers another, a point or a bar."""
    renderer = axes.figure.canvas.get_renderer()
    place = axes.transData.transform
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in (place(point[1:]) for point in points)]
    for x, low, high in bars:
        (left, bottom), (_, top) = place((x, low)), place((x, high))
        taken.append(Bbox.from_extents(left - 4, bottom, left + 4, top))
    for name, x, y in sorted(points, key=lambda point: -point[2]):
        arrow = {"arrowstyle": "-", "color": "#bbbbbb", "lw": 0.7, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
        label = axes.annotate(
            name, (x, y), xytext=(10, 0), textcoords="offset points", fontsize=8, va="center", annotation_clip=False,
            color=colour(name), arrowprops=arrow,
        )  # fmt: skip
        for across, offset in PLACES:
            label.set_position((across, offset))
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)
            inside = axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


# the plots -----------------------------------------------------------------------------------------------------------


def plot_bytes(axes: Axes, found: Results) -> None:
    """Stored bytes over n; lines that end together share a name."""
    row = next(row for row in found["whole"]["rows"] if row["row"] == whole.FIRST)
    ways = sorted(row["ways"].items(), key=lambda way: way[1]["sizes"][-1] / len(way[1]["sizes"]))
    groups: list[tuple[list[str], float, float]] = []
    top = row["count"] * row["checkpoint_bytes"] / 1e9
    for name, way in ways:
        sizes = [size / 1e9 for size in way["sizes"]]
        mine = name.startswith("everystep")
        style = {"lw": 2.4 if mine else 1.1, "ls": LINES[0] if mine else LINES[len(groups) % len(LINES)]}
        axes.plot(range(1, len(sizes) + 1), sizes, color=colour(name), alpha=1 if mine else 0.7, **style)
        near = groups and sizes[-1] - groups[-1][2] < 0.02 * top and not groups[-1][0][0].startswith("everystep")
        if near and not mine:
            groups[-1][0].append(name)
        else:
            groups.append(([name], len(sizes), sizes[-1]))
    axes.figure.subplots_adjust(right=0.68)
    axes.set(xlabel="checkpoints kept", ylabel="GB on disk", xlim=(0, row["count"]), ylim=(0, 1.08 * top))
    axes.set_title(f"{whole.FIRST}: {row['checkpoint_bytes'] / 1e6:.0f} MB each, all kept, lossless", fontsize=10)
    name_points(axes, [(_lines(names), x, y) for names, x, y in groups])


def _lines(names: list[str]) -> str:
    parts = [names[start : start + NAMES_A_LINE] for start in range(0, len(names), NAMES_A_LINE)]
    return "\n".join(" · ".join(part) for part in parts)


def plot_training(axes: Axes, found: Results) -> None:
    result = found["training-10"]
    samples = Samples.from_dict(result["samples"])
    points, bars = [], []
    for name in samples.values:
        blocking = samples.median(name, "blocking")
        if blocking is None:
            continue
        slower = [100 * value for value in training.slowdowns(samples, name)]
        middle, (low, high) = statistics.median(slower), quartiles(slower) or (0.0, 0.0)
        error = [[middle - low], [high - middle]]
        axes.errorbar(1e3 * blocking, middle, yerr=error, fmt="o", color=colour(name), capsize=3, lw=1)
        points.append((name, 1e3 * blocking, middle))
        bars.append((1e3 * blocking, low, high))
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set(xlabel="a save blocks the loop, ms", ylabel="the loop takes longer, %")
    axes.set_xlim(0, 1.35 * max(point[1] for point in points))
    axes.set_title(
        f"A save every {result['every']} steps, {result['nbytes'] / 1e6:.0f} MB of state; median and quartiles",
        fontsize=10,
    )
    name_points(axes, points, bars)


def plot_depth(axes: Axes, found: Results) -> None:
    for (what, links), style, shade in zip(found["restore"]["links"].items(), LINES, (OURS, OURS_TOO)):
        samples = Samples.from_dict(links["samples"])
        depths = sorted(int(name) for name in samples.values if name != restore.TORCH)
        values = [samples.ratio(str(depth), restore.TORCH, "load") or 0.0 for depth in depths]
        axes.plot(depths, values, style, color=shade, marker="o", label=f"{what}, {links['nbytes'] / 1e6:.0f} MB")
    axes.axhline(1, color=OTHERS, lw=1, label="torch.load")
    axes.set(xlabel="bases that the deepest chunk leans on", ylabel="times torch.load", ylim=(0, None))
    axes.set_xticks(depths)
    axes.set_title("A load, verified, from the page cache", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def plot_speed(axes: Axes, found: Results) -> None:
    row = next(row for row in found["whole"]["rows"] if row["row"] == whole.FIRST)
    _, homes = blocking.together(found["blocking-small"])
    points = []
    for name, way in row["ways"].items():
        stored = whole.share(way, row, min(sequences.COUNT, row["count"]))
        durable = homes[name].median(name, "durable") if name in homes else None
        if stored is None or durable is None:
            continue
        axes.plot(durable, stored, "o", color=colour(name), ms=8 if name.startswith("everystep") else 6)
        points.append((name, durable, stored))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="seconds until a save is durable", ylabel="stored / raw", ylim=(None, 1.03))
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 2.2)
    count = min(sequences.COUNT, row["count"])
    size = f"{count} checkpoints of {row['checkpoint_bytes'] / 1e6:.0f} MB"
    axes.set_title(f"{whole.FIRST}: {size}; lower left is better", fontsize=10)
    name_points(axes, points)


PLOTS: dict[str, tuple[Callable[[Axes, Results], None], tuple[str, ...]]] = {
    "bytes": (plot_bytes, ("whole",)),
    "speed": (plot_speed, ("whole", "blocking-small")),
    "training": (plot_training, ("training-10",)),
    "depth": (plot_depth, ("restore",)),
}
