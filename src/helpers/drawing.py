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
from matplotlib.transforms import Bbox, TransformedBbox

if TYPE_CHECKING:
    from .timeline import Attempt, Timeline

WIDTH, DPI = 9.0, 110  # inches; dots per inch
LEFT, RIGHT, LABELS = 0.2, 0.6, 2.3  # inches: margins, and labels beside the bars
ROW_HEIGHT = 0.24  # inches, if there are few rows
MAX_HEIGHT = 3.6  # inches for all rows of one run
MAX_LABELLED_ROWS = 14  # with more, rows are too thin for text
MAX_EDGED_ROWS = 100  # with more, rows are too thin for edges and hatches
LETTER_WIDTH = 0.066  # inches
TITLE_HEIGHT, LEGEND_HEIGHT = 0.3, 0.5  # inches above each run, below the last
MARK_HEIGHT = 0.16  # inches between a run and its title, if it has marks

# Okabe and Ito's colours. Hatches distinguish the states, too.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
AMBER = "#8A6500"
WAITING, RECEIVING = "waiting", "receiving"
STYLES: dict[str, dict[str, Any]] = {
    WAITING: {"facecolor": "#CCE3F0", "edgecolor": BLUE},
    RECEIVING: {"facecolor": BLUE, "edgecolor": BLUE},
    "failed": {"facecolor": "#F7DFCC", "edgecolor": VERMILION, "hatch": "xxx"},
    "cancelled": {"facecolor": "#E0E0E0", "edgecolor": GREY, "hatch": "///"},
    "timed out": {"facecolor": "#FAE9C0", "edgecolor": AMBER, "hatch": "---"},
    "in flight": {"facecolor": "white", "edgecolor": GREEN, "hatch": "..."},
}
OUTLINE = [withStroke(linewidth=3, foreground="white")]
BESIDE = Bbox(((0, 0), ((LABELS - 0.08) / WIDTH, 1)))  # where labels may be


@matplotlib.rc_context({"text.parse_math": False, "hatch.linewidth": 0.5})
def png(runs: "Sequence[Timeline]", table: str = "") -> bytes:
    """A PNG file of the runs, one below the other on a shared time axis.

    A single run has a row for each call, with its prompt beside it. With more than
    MAX_LABELLED_ROWS calls, and in a comparison, a run has as many rows as it had
    attempts in flight at its peak.
    """
    labelled = not table and len(runs[0].rows) <= MAX_LABELLED_ROWS
    drawn = [run.rows if labelled else run.lanes for run in runs]
    heights = [min(ROW_HEIGHT * max(len(rows), 1.4), MAX_HEIGHT) for rows in drawn]
    above = 0.17 * (table.count("\n") + 2) if table else 0.0
    titles = [TITLE_HEIGHT + MARK_HEIGHT * bool(run.marks) for run in runs]
    height = above + sum(heights) + sum(titles) + LEGEND_HEIGHT
    seconds = max(max(run.wall for run in runs), 0.001)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    figure.text(0.02, 1 - 0.1 / height, table, va="top", family="monospace", size=8.5)
    prompts = [row[0].prompt for run in runs for row in run.rows]
    numbers = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts), 1)}
    left = LABELS if labelled else LEFT
    width = (WIDTH - left - RIGHT) / WIDTH
    used: set[str] = set()
    y = height - above
    for run, rows, tall, gap in zip(runs, drawn, heights, titles, strict=True):
        y -= gap + tall
        axes = figure.add_axes((left / WIDTH, y / height, width, tall / height))
        used |= _draw_bars(axes, rows, seconds)
        if labelled:
            _label_rows(axes, rows)
        else:
            _number_bars(axes, rows, numbers, seconds)
            _write_time(axes, run, rows)
        for moment, text in run.marks:
            _draw_mark(axes, moment, text, seconds)
        title = run.name if table else run.sentence
        figure.text(LEFT / WIDTH, (y + tall + gap - 0.23) / height, title, size=9)
        axes.tick_params(labelbottom=run is runs[-1], labelsize=8)
    axes.set_xlabel("seconds", size=8, labelpad=1, loc="left")
    key = [Patch(label=name, **STYLES[name]) for name in STYLES if name in used]
    figure.legend(handles=key, loc="lower right", ncols=6, frameon=False, fontsize=8)
    file = io.BytesIO()
    with warnings.catch_warnings():  # characters missing from the font become boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="png")
    return file.getvalue()


def _draw_bars(axes: Axes, rows: "list[list[Attempt]]", seconds: float) -> set[str]:
    """Draw the bars of one run, the first row at the top; return the styles used."""
    bars: dict[str, list[list[tuple[float, float]]]] = {}
    thin = len(rows) > MAX_LABELLED_ROWS
    # half a bar's height, its edge width
    half, width = (0.5, 0.3) if thin else (0.4, 0.8)
    if len(rows) > MAX_EDGED_ROWS:  # the edges would hide the bars
        width = 0
    for y, row in enumerate(rows):
        for attempt in row:
            start, first, end = attempt.arrival, attempt.first_byte, attempt.end
            pieces = [(WAITING, start, first), (RECEIVING, first, end)]
            if attempt.state in STYLES:
                pieces = [(attempt.state, start, end)]
            for style, left, right in pieces:
                if style == RECEIVING and right - left < seconds / 500:
                    continue  # a complete answer in one piece: nothing to see
                corners = [(left, y - half), (right, y - half)]
                corners += [(right, y + half), (left, y + half)]
                bars.setdefault(style, []).append(corners)
    for style, drawn in bars.items():
        options = STYLES[style] | ({} if width else {"hatch": None})
        axes.add_collection(PolyCollection(drawn, linewidth=width, **options))
    axes.set(xlim=(0, seconds), ylim=(max(len(rows), 1) - 0.5, -0.5), yticks=[])
    axes.spines[["top", "right", "left"]].set_visible(False)
    return set(bars)


def _label_rows(axes: Axes, rows: "list[list[Attempt]]") -> None:
    """Write each call's number and prompt beside its bars, and its time after them."""
    room = int((LABELS - LEFT) / LETTER_WIDTH) - 3
    for y, row in enumerate(rows):
        took = row[-1].end - row[0].arrival
        beside = axes.get_yaxis_transform()  # x in widths of the axes, y in rows
        x = (LEFT - LABELS) / (WIDTH - LABELS - RIGHT)
        style: dict[str, Any] = {"va": "center", "size": 8, "transform": beside}
        axes.text(x + 0.02, y, str(y + 1), ha="right", **style)
        label = axes.text(x + 0.03, y, row[0].label(room), **style)
        label.set_clip_on(True)  # wide letters must not run into the bars
        label.set_clip_box(TransformedBbox(BESIDE, axes.figure.transFigure))
        text = f"  {took:.2f} s" if took < 100 else f"  {took:.0f} s"
        axes.text(row[-1].end, y, text, va="center", size=8, path_effects=OUTLINE)


def _number_bars(
    axes: Axes, rows: "list[list[Attempt]]", numbers: dict[str, int], seconds: float
) -> None:
    """Write the number of its prompt into each bar that has room for it."""
    if len(rows) > MAX_LABELLED_ROWS:
        return
    letter = LETTER_WIDTH / (WIDTH - LEFT - RIGHT) * seconds
    for y, row in enumerate(rows):
        for attempt in row:
            text = str(numbers[attempt.prompt])
            if attempt.end - attempt.arrival > letter * (len(text) + 1):
                x = attempt.arrival + letter / 2
                axes.text(x, y, text, va="center", size=8, path_effects=OUTLINE)


def _write_time(axes: Axes, run: "Timeline", rows: "list[list[Attempt]]") -> None:
    """Write how long the run took after the bar that ended last."""
    ends = [(attempt.end, y) for y, row in enumerate(rows) for attempt in row]
    end, y = max(ends, default=(0, 0))
    axes.text(end, y, f"  {run.wall:.1f} s", va="center", size=9, weight="bold")


def _draw_mark(axes: Axes, moment: float, text: str, seconds: float) -> None:
    """Draw a vertical line, with its text on the side that has more room."""
    axes.axvline(moment, color=VERMILION, linewidth=1.2, linestyle="--", zorder=3)
    early = moment < seconds / 2
    axes.annotate(
        f" {text} ",
        (moment, 1),
        xycoords=("data", "axes fraction"),
        ha="left" if early else "right",
        va="bottom",
        size=8,
        color=VERMILION,
        annotation_clip=False,
    )
