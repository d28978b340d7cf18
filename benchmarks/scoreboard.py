"""All ways of lesson 15 on the same prompts: python run.py bench

The ways are the notebook's own cells with the tag `bench`. The last rows are
baselines, which send the same requests through fewer layers. Each run has a
fresh Python process, and the ways take turns. The table shows medians.

The clock starts when a way is called and stops when it has returned its
answers. Imports, building the clients and starting a Dask cluster are not
included. Modules that the first call loads are included, unless --warm makes
one call before the clock starts. Efficiency is ideal time / measured time. The
ideal time counts only the waits: one per prompt for the loop, one in total for
gather, and ceil(prompts / at once) for the others. CPU and memory include the
process and its workers. Memory is the peak RSS, sampled 20 times
a second.
"""

import argparse
import csv
import json
import platform
import sys
from importlib.metadata import version
from itertools import cycle, product
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING

import psutil
from _ways import BASELINES, WAYS, Row, expected, measure

from helpers import connect

if TYPE_CHECKING:  # measured processes import this file too, and must stay small
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
PACKAGES = ["langchain-openai", "openai", "aiohttp", "distributed"]
GROWTH = [10, 100, 1000, 10_000]  # prompts
GROWTH_HELP = "measure cost for growing numbers of prompts (10 100 1000 10000)"
GROWING = ["semaphore", "workers", "aiohttp", "Dask"]
MAX_LOOP_PROMPTS = 10  # because the loop runs them one after the other
BATCH_SPEED = 1000  # lines per second, for the stub's Batch API
MAX_LATENCY = 3600  # seconds
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
STYLES = [("o-", BLUE), ("s--", VERMILION), ("^-.", GREEN), ("D:", GREY)]

COLUMNS = {  # of the table: key of a row, heading, format
    "way": ("way", ""),
    "prompts": ("prompts", ",d"),
    "answered": ("answered", ",d"),
    "seconds": ("wall, s", ".2f"),
    "ms_per_call": ("ms/call", ".1f"),
    "efficiency": ("efficiency", ".2f"),
    "min_efficiency": ("min", ".2f"),
    "max_efficiency": ("max", ".2f"),
    "in_flight": ("peak in flight", ",d"),
    "attempts": ("attempts", ",d"),
    "rejected": ("rejected", ",d"),
    "cpu_ms": ("CPU, ms/call", ".1f"),
    "memory_mb": ("memory, MB", ".0f"),
    "lines": ("lines", "d"),
}


def main() -> int:
    """Run the benchmark, print the table and write the result files."""
    options = parse_options()
    provider = connect(live=False, per_token=0, jitter=0, batch_speed=BATCH_SPEED)
    expected()
    provider.configure(first_token=options.latency, burst=1)
    runs: list[Row] = []
    plan = product(options.growth or [options.prompts], range(options.repeat))
    for (prompts, turn), name in product(plan, options.ways):
        if sys.stderr.isatty():
            progress = f"{prompts} prompts, run {turn + 1}: {name:20}"
            print(f"\r{progress}", end="", file=sys.stderr)
        count = min(prompts, MAX_LOOP_PROMPTS) if name == "loop" else prompts
        try:
            runs.append(measure(name, count, provider, options))
        except EOFError:  # the process has printed its traceback
            print(
                f"run.py bench: {name!r} failed; see the traceback above.",
                file=sys.stderr,
            )
            return 1
    rows = medians(runs)
    print(
        f"{options.at_once:,} calls in flight, {options.latency:g} s per call, "
        f"median of {options.repeat}, {'with' if options.warm else 'without'} a "
        "warm-up call"
        f"\n\n{table(rows)}"
    )
    if "Dask" in options.ways:
        seconds = max(row["cluster_s"] for row in rows if row["way"] == "Dask")
        print(f"\nDask's cluster took {seconds:.1f} s to start.")
    write_results(options, rows, runs)
    return 0


def medians(runs: list[Row]) -> list[Row]:
    """One row per way and number of prompts."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for run in runs:
        groups.setdefault((run["way"], run["prompts"]), []).append(run)
    rows = []
    for group in groups.values():
        row = {
            key: value if value is None else median_low(run[key] for run in group)
            for key, value in group[0].items()
        }
        values = [run["efficiency"] for run in group]
        undefined = None in values
        row["min_efficiency"] = None if undefined else min(values)
        row["max_efficiency"] = None if undefined else max(values)
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """Format the rows as a Markdown table."""
    lines = [[heading for heading, _ in COLUMNS.values()], ["---"] * len(COLUMNS)]
    for row in rows:
        cells = [(row[key], form) for key, (_, form) in COLUMNS.items()]
        lines.append(["–" if value is None else format(value, f) for value, f in cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_results(
    options: argparse.Namespace, rows: list[Row], runs: list[Row]
) -> None:
    """Write rows and single runs as JSON, and the rows as CSV and as a picture."""
    content = {
        "settings": {**vars(options), "out": str(options.out)},
        "python": platform.python_version(),
        "cpus": psutil.cpu_count(),
        "packages": {name: version(name) for name in PACKAGES},
        "rows": rows,
        "runs": runs,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem: Path = options.out / ("growth" if options.growth else "scoreboard")
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1), "utf-8")
    with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure = draw_growth(rows) if options.growth else draw_bars(rows, options)
    figure.savefig(stem.with_suffix(".png"))
    print(f"\nWrote {stem}.json, .csv and .png")


def draw_bars(rows: list[Row], options: argparse.Namespace) -> "Figure":
    """Draw the efficiency of each way, with its minimum and maximum."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["efficiency"] is not None][::-1]
    figure = Figure(figsize=(8, 1 + 0.32 * len(rows)), dpi=110, layout="tight")
    axes = figure.subplots()
    values = [row["efficiency"] for row in rows]
    spread = [
        [row["efficiency"] - row["min_efficiency"] for row in rows],
        [row["max_efficiency"] - row["efficiency"] for row in rows],
    ]
    axes.barh(
        [row["way"] for row in rows],
        values,
        xerr=spread,
        color=[GREY if row["way"] in BASELINES else BLUE for row in rows],
        error_kw={"capsize": 3},
    )
    for position, value in enumerate(values):
        axes.text(0.01, position, f"{value:.2f}", va="center", color="white")
    axes.set_xlim(0, 1.02)
    axes.set_xlabel(
        f"efficiency: ideal time / measured time; {options.prompts:,} prompts, "
        f"{options.at_once:,} in flight, {options.latency:g} s per call"
    )
    return figure


def draw_growth(rows: list[Row]) -> "Figure":
    """Draw time per call, CPU per call and memory against the number of prompts."""
    from matplotlib.figure import Figure

    keys = ["ms_per_call", "cpu_ms", "memory_mb"]
    figure = Figure(figsize=(10, 3.2), dpi=110, layout="tight")
    all_axes = figure.subplots(1, 3)
    ways = dict.fromkeys(row["way"] for row in rows)
    for axes, key in zip(all_axes, keys, strict=True):
        for way, style in zip(ways, cycle(STYLES), strict=False):
            points = [(row["prompts"], row[key]) for row in rows if row["way"] == way]
            axes.plot(*zip(*points, strict=True), style[0], color=style[1], label=way)
        axes.set(xscale="log", xlabel="prompts", title=COLUMNS[key][0])
        axes.set_ylim(bottom=0)
    all_axes[0].legend(fontsize="small")
    return figure


def positive_int(text: str) -> int:
    """Parse an integer above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer above 0, not {text!r}")
    return int(text)


def latency(text: str) -> float:
    """Parse a number of seconds between 0 and 3600."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < MAX_LATENCY:
        raise argparse.ArgumentTypeError(
            f"must be a number above 0 and below {MAX_LATENCY} (seconds), not {text!r}"
        )
    return seconds


def parse_options() -> argparse.Namespace:
    """Parse the command line and fill in the defaults."""
    parser = argparse.ArgumentParser(
        prog="python run.py bench", description="Compare all ways of lesson 15."
    )
    add = parser.add_argument
    add("--prompts", type=positive_int, help="number of prompts (256)")
    add("--at-once", type=positive_int, help="calls in flight (128; with --growth 10)")
    add("--latency", type=latency, help="seconds per call (1; with --growth 0.05)")
    add("--repeat", type=positive_int, help="runs of each way (5; with --growth 1)")
    add(
        "--ways",
        nargs="+",
        choices=[*WAYS, *BASELINES],
        metavar="WAY",
        help="run only these ways",
    )
    add("--workers", type=positive_int, default=2, help="Dask worker processes (2)")
    add(
        "--limit", type=positive_int, help="rate limit of the stub, requests per minute"
    )
    add("--warm", action="store_true", help="make one call before the clock starts")
    add("--growth", nargs="*", type=positive_int, metavar="PROMPTS", help=GROWTH_HELP)
    add("--quick", action="store_true", help="run everything once, in under a minute")
    add(
        "--out",
        type=Path,
        default=RESULTS,
        help="folder for the JSON, CSV and PNG files",
    )
    options = parser.parse_args()
    growth, quick = options.growth is not None, options.quick
    defaults = {
        "prompts": 16 if quick else 256,
        "at_once": 8 if quick else 10 if growth else 128,
        "latency": 0.2 if quick else 0.05 if growth else 1.0,
        "repeat": 1 if quick or growth else 5,
        "ways": GROWING if growth else [*WAYS, *BASELINES],
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if growth:
        options.growth = options.growth or (GROWTH[:2] if quick else GROWTH)
    if options.at_once < options.workers:
        parser.error(
            f"--at-once must be at least as large as --workers, but "
            f"{options.at_once} is less than {options.workers}"
        )
    return options


if __name__ == "__main__":
    raise SystemExit(main())
