"""Draw timelines as PNG, the format that every notebook viewer shows."""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

if TYPE_CHECKING:
    from .timeline import Attempt, Timeline

WIDTH, DPI = 9.0, 110  # inches; dots per inch
LANE_HEIGHT = 0.24  # inches, if there are few lanes
MAX_HEIGHT = 3.6  # inches for all lanes of one run
MAX_LABELLED_LANES = 14  # with more, lanes are too thin for labels
LETTER_WIDTH = 0.066  # inches
TITLE_HEIGHT, LEGEND_HEIGHT = 0.3, 0.5  # inches above each run, below the last

# Okabe and Ito's colours. Hatches and marks distinguish the states, too.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
WAITING, RECEIVING = "waiting for the first byte", "receiving"
STYLES: dict[str, dict[str, Any]] = {
    WAITING: {"facecolor": "#CCE3F0", "edgecolor": BLUE},
    RECEIVING: {"facecolor": BLUE, "edgecolor": BLUE},
    "failed ×": {"facecolor": "#F7DFCC", "edgecolor": VERMILION, "hatch": "xxx"},
    "cancelled /": {"facecolor": "#E0E0E0", "edgecolor": GREY, "hatch": "///"},
    "in flight >": {"facecolor": "white", "edgecolor": GREEN, "hatch": "..."},
}
MARKED = {style[:-2]: style for style in list(STYLES)[2:]}  # by state


@matplotlib.rc_context({"text.parse_math": False, "hatch.linewidth": 0.5})
def png(runs: "Sequence[Timeline]", table: str = "") -> bytes:
    """A PNG file of the runs, one below the other on a shared time axis."""
    lanes = [run.lanes for run in runs]
    heights = [min(LANE_HEIGHT * max(len(each), 1.4), MAX_HEIGHT) for each in lanes]
    above = 0.17 * (table.count("\n") + 2) if table else 0.0
    height = above + sum(heights) + TITLE_HEIGHT * len(runs) + LEGEND_HEIGHT
    seconds = max(max(run.wall for run in runs), 0.001)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    figure.text(0.02, 1 - 0.1 / height, table, va="top", family="monospace", size=8.5)
    used: set[str] = set()
    y = height - above
    for run, run_lanes, tall in zip(runs, lanes, heights, strict=True):
        y -= TITLE_HEIGHT + tall
        axes = figure.add_axes((0.02, y / height, 0.96, tall / height))
        used |= _draw(axes, run_lanes, seconds)
        axes.set_title(run.name if table else run.sentence, loc="left", size=9, pad=4)
        axes.tick_params(labelbottom=run is runs[-1], labelsize=8)
    axes.set_xlabel("seconds", size=8, labelpad=1, loc="left")
    key = [Patch(label=name, **STYLES[name]) for name in STYLES if name in used]
    figure.legend(handles=key, loc="lower right", ncols=5, frameon=False, fontsize=8)
    file = io.BytesIO()
    with warnings.catch_warnings():  # characters missing from the font become boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="png")
    return file.getvalue()


def _draw(axes: Axes, lanes: "list[list[Attempt]]", seconds: float) -> set[str]:
    """Draw the lanes of one run, the first at the top; return the styles used."""
    bars: dict[str, list[list[tuple[float, float]]]] = {}
    thin = len(lanes) > MAX_LABELLED_LANES
    half, width = (
        (0.5, 0.3) if thin else (0.4, 0.8)
    )  # half a bar's height, its edge width
    for row, lane in enumerate(lanes):
        for attempt in lane:
            start, first, end = attempt.arrival, attempt.first_byte, attempt.end
            pieces = [(WAITING, start, first), (RECEIVING, first, end)]
            if attempt.state in MARKED:
                pieces = [(MARKED[attempt.state], start, end)]
            for style, left, right in pieces:
                corners = [(left, row - half), (right, row - half)]
                corners += [(right, row + half), (left, row + half)]
                bars.setdefault(style, []).append(corners)
            if not thin:
                _label(axes, row, attempt, seconds)
    for style, drawn in bars.items():
        axes.add_collection(PolyCollection(drawn, linewidth=width, **STYLES[style]))
    axes.set(xlim=(0, seconds), ylim=(max(len(lanes), 1) - 0.5, -0.5), yticks=[])
    axes.spines[["top", "right", "left"]].set_visible(False)
    return set(bars)


def _label(axes: Axes, row: int, attempt: "Attempt", seconds: float) -> None:
    """Write the start of the prompt in the bar, as much as fits."""
    mark = MARKED.get(attempt.state, "")[-1:]
    text = f"{mark} {attempt.label}".strip()
    room = int((attempt.end - attempt.arrival) / seconds * WIDTH / LETTER_WIDTH) - 3
    if room < 4:
        return
    if len(text) > room:
        text = text[: room - 1].rstrip() + "…"
    outline = [withStroke(linewidth=3, foreground="white")]
    x = attempt.arrival + seconds * 0.006
    axes.text(x, row, text, va="center", size=8, path_effects=outline)
