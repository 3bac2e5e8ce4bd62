"""Draw docs/images/model.svg, one layer of the model: python docs/draw_model.py."""

import itertools
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TARGET = Path(__file__).parent / "images" / "model.svg"
BLUE, ORANGE, GREEN, GREY = "#dbe9f6", "#fde3cf", "#dff0d8", "#eeeeee"


def main() -> None:
    """Draw the figure. The file depends on nothing but this script and matplotlib."""
    matplotlib.rcParams["svg.hashsalt"] = "mmrec"
    figure = Figure(figsize=(9.6, 3.2), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 96)
    axes.set_ylim(3.5, 35.5)
    axes.axis("off")

    def box(x: float, y: float, width: float, height: float, text: str, color: str) -> None:
        shape = FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0.3", facecolor=color, edgecolor="#555555"
        )
        axes.add_patch(shape)
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)

    def arrow(*points: tuple[float, float]) -> None:
        for start, end in itertools.pairwise(points[:-1]):
            axes.plot(*zip(start, end, strict=True), color="#555555", linewidth=1)
        tip = FancyArrowPatch(
            points[-2],
            points[-1],
            arrowstyle="-|>",
            mutation_scale=9,
            color="#555555",
            shrinkA=0,
            shrinkB=0,
            linewidth=1,
        )
        axes.add_patch(tip)

    def label(x: float, y: float, text: str, **options: str) -> None:
        axes.text(x, y, text, fontsize=8, color="#333333", **options)

    box(9, 14, 11, 6, "RMS norm,\ncausal conv\n(width 4)", GREY)
    box(22, 14, 6, 6, "W_in", BLUE)
    box(37, 22, 20, 6, "gated recurrence\none vector h per layer", ORANGE)
    box(37, 12, 20, 6, "gated delta rule\none matrix S per head", GREEN)
    box(62, 17, 9, 6, "RMS norms,\nsum,\ntimes silu(r)", GREY)
    box(75, 17, 6, 6, "W_out", BLUE)
    for y, x in ((28.6, 47), (11.4, 47)):  # states go to the next token
        sign = 1 if y > 20 else -1
        arrow((x + 4, y), (x + 4, y + 2 * sign), (x - 4, y + 2 * sign), (x - 4, y + 0.1 * sign))
    label(47, 31.4, "state h, from token to token", ha="center")
    label(47, 7.4, "state S, from token to token", ha="center")

    arrow((0.5, 17), (8.6, 17))
    arrow((20.4, 17), (21.6, 17))
    arrow((28.4, 18), (33, 18), (33, 25), (36.6, 25))
    arrow((28.4, 15), (36.6, 15))
    label(32.6, 22.6, "z, f, g", ha="right")
    label(36.2, 12.6, "q, k, v, a, b", ha="right")
    arrow((57.4, 25), (59.5, 25), (59.5, 21.5), (61.6, 21.5))
    arrow((57.4, 15), (59.5, 15), (59.5, 18.5), (61.6, 18.5))
    arrow((25, 13.6), (25, 4.8), (66.5, 4.8), (66.5, 16.6))
    label(60, 5.5, "output gate r", ha="center")
    arrow((71.4, 20), (74.6, 20))
    arrow((81.4, 20), (86.4, 20))
    axes.text(87.5, 20, "+", ha="center", va="center", fontsize=14)
    arrow((4, 17), (4, 33.4), (87.5, 33.4), (87.5, 21.6))
    label(22, 32, "x, the residual stream (B, T, D)", ha="center")
    arrow((88.6, 20), (95.5, 20))
    label(92, 21, "to the", ha="center")
    label(92, 17.6, "feed-forward", ha="center")

    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
