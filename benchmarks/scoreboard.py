"""Every way of lesson 15 on the same prompts: python run.py bench

The ways are the notebook's own cells with the tag `bench`; below them stand
floors, which send the same through fewer layers. Each run has a fresh Python
process, and the ways take turns. The table shows medians.

The clock runs from the call of a way until its answers are there. Packages
have been imported and clients built before, and a cluster of Dask started.
What the first call loads counts; with --warm, a call before the clock has
loaded it. The ideal is nothing but the waits: one for each prompt in the
loop, a single one for gather, and ceil(prompts / at once) for the others.
CPU and memory are those of the process and its workers together; memory is
the most that they held, as the system counts it (RSS), 20 times a second.
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
from _ways import FLOORS, WAYS, Row, expected, measure

from helpers import connect

if TYPE_CHECKING:  # the processes that are measured import this file too
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
PACKAGES = ["langchain-openai", "openai", "aiohttp", "distributed"]
GROWTH = [10, 100, 1000, 10_000]  # prompts
GROWTH_HELP = "cost against the number of prompts (10 100 1000 10000)"
GROWING = ["semaphore", "workers", "aiohttp", "Dask"]
LOOP_MOST = 10  # prompts for the loop, which waits for each of them in turn
BATCH_SPEED = 1000  # lines a second of the provider's Batch API
BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
STYLES = [("o-", BLUE), ("s--", VERMILLION), ("^-.", GREEN), ("D:", GREY)]

COLUMNS = {  # of the table: what stands in a row, its heading, its format
    "way": ("way", ""),
    "prompts": ("prompts", ",d"),
    "answered": ("answered", ",d"),
    "seconds": ("wall, s", ".2f"),
    "each_ms": ("ms a call", ".1f"),
    "efficiency": ("efficiency", ".2f"),
    "least": ("least", ".2f"),
    "most": ("most", ".2f"),
    "in_flight": ("in flight", ",d"),
    "attempts": ("attempts", ",d"),
    "refused": ("refused", ",d"),
    "cpu_ms": ("CPU, ms a call", ".1f"),
    "memory_mb": ("memory, MB", ".0f"),
    "lines": ("lines", "d"),
}


def main() -> int:
    """Measure, print the table, and write the files."""
    options = read_options()
    provider = connect(live=False, per_token=0, jitter=0, batch_speed=BATCH_SPEED)
    expected()
    provider.configure(first_token=options.latency, burst=1)
    runs: list[Row] = []
    plan = product(options.growth or [options.prompts], range(options.repeat))
    for (number, turn), name in product(plan, options.ways):
        if sys.stderr.isatty():
            print(f"\r{number} prompts, {turn + 1}: {name:20}", end="", file=sys.stderr)
        few = min(number, LOOP_MOST) if name == "loop" else number
        try:
            runs.append(measure(name, few, provider, options))
        except EOFError:  # its own error stands above
            print(f"run.py bench: the way {name!r} has failed.", file=sys.stderr)
            return 1
    rows = medians(runs)
    print(
        f"{options.at_once:,} at once, {options.latency:g} s a call, medians of "
        f"{options.repeat}, {'a call' if options.warm else 'nothing'} before the clock"
        f"\n\n{table(rows)}"
    )
    if "Dask" in options.ways:
        started = max(row["cluster_s"] for row in rows if row["way"] == "Dask")
        print(f"\nDask's cluster took {started:.1f} s to start.")
    write(options, rows, runs)
    return 0


def medians(runs: list[Row]) -> list[Row]:
    """A row for each way and number of prompts."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for run in runs:
        groups.setdefault((run["way"], run["prompts"]), []).append(run)
    rows = []
    for same in groups.values():
        first, shares = same[0], [run["efficiency"] for run in same]
        row = {
            key: value if value is None else median_low(run[key] for run in same)
            for key, value in first.items()
        }
        none = None in shares
        row |= {"least": None if none else min(shares)}
        row |= {"most": None if none else max(shares)}
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = [[heading for heading, _ in COLUMNS.values()], ["---"] * len(COLUMNS)]
    for row in rows:
        shown = [(row[key], form) for key, (_, form) in COLUMNS.items()]
        lines.append(["–" if value is None else format(value, f) for value, f in shown])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(options: argparse.Namespace, rows: list[Row], runs: list[Row]) -> None:
    """The rows and the single runs as JSON, the rows as CSV and as a picture."""
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
    figure = curves(rows) if options.growth else bars(rows, options)
    figure.savefig(stem.with_suffix(".png"))
    print(f"\nWritten: {stem}.json, .csv and .png")


def bars(rows: list[Row], options: argparse.Namespace) -> "Figure":
    """The efficiency of each way, with the least and the most."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["efficiency"] is not None][::-1]
    figure = Figure(figsize=(8, 1 + 0.32 * len(rows)), dpi=110, layout="tight")
    axes = figure.subplots()
    shares = [row["efficiency"] for row in rows]
    spread = [
        [row["efficiency"] - row["least"] for row in rows],
        [row["most"] - row["efficiency"] for row in rows],
    ]
    axes.barh(
        [row["way"] for row in rows],
        shares,
        xerr=spread,
        color=[GREY if row["way"] in FLOORS else BLUE for row in rows],
        error_kw={"capsize": 3},
    )
    for place, share in enumerate(shares):
        axes.text(0.01, place, f"{share:.2f}", va="center", color="white")
    axes.set_xlim(0, 1.02)
    axes.set_xlabel(
        f"efficiency: ideal time / measured time; {options.prompts:,} prompts, "
        f"{options.at_once:,} at once, {options.latency:g} s each"
    )
    return figure


def curves(rows: list[Row]) -> "Figure":
    """Time a call, CPU a call and memory over the number of prompts."""
    from matplotlib.figure import Figure

    keys = ["each_ms", "cpu_ms", "memory_mb"]
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


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"wanted a whole number above 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A time, above 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0
    if not 0 < found < 3600:
        raise argparse.ArgumentTypeError(f"wanted seconds above 0, got {text!r}")
    return found


def read_options() -> argparse.Namespace:
    """What is to be measured."""
    parser = argparse.ArgumentParser(
        prog="python run.py bench", description="All ways of lesson 15 side by side."
    )
    add = parser.add_argument
    add("--prompts", type=count, help="how many (256)")
    add("--at-once", type=count, help="how many in flight (128; for --growth 10)")
    add("--latency", type=seconds, help="of each call, in s (1; for --growth 0.05)")
    add("--repeat", type=count, help="runs of each way (5; for --growth 1)")
    add("--ways", nargs="+", choices=[*WAYS, *FLOORS], metavar="WAY", help="only these")
    add("--workers", type=count, default=2, help="processes of the Dask way (2)")
    add("--limit", type=count, help="requests that the provider allows in a minute")
    add("--warm", action="store_true", help="one call before the clock starts")
    add("--growth", nargs="*", type=count, metavar="PROMPTS", help=GROWTH_HELP)
    add("--quick", action="store_true", help="everything once, in a minute")
    add("--out", type=Path, default=RESULTS, help="folder for JSON, CSV and PNG")
    options = parser.parse_args()
    growth, few = options.growth is not None, options.quick
    usual = {
        "prompts": 16 if few else 256,
        "at_once": 8 if few else 10 if growth else 128,
        "latency": 0.2 if few else 0.05 if growth else 1.0,
        "repeat": 1 if few or growth else 5,
        "ways": GROWING if growth else [*WAYS, *FLOORS],
    }
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if growth:
        options.growth = options.growth or (GROWTH[:2] if few else GROWTH)
    if options.at_once < options.workers:
        parser.error("--at-once must not be less than --workers")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
