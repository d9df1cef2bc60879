"""Data as inline SVG: how long its texts are, and how often a shallow feature alone tells the chosen reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from alignlab.report.charts import ACCENT, DASHES, INK, MUTED, TEXT, drawing, ellipsis, make_axes, to_svg

LENGTHS = {"prompt": MUTED, "chosen": ACCENT, "rejected": INK}
LONGEST_NAME = 34  # letters of a feature's name


def draw_lengths(histogram: Mapping[str, Sequence[int]]) -> str:
    """How many pairs have so many tokens in prompt, chosen and rejected; counts are on a logarithmic axis."""
    edges = histogram["edges"]
    title = "Length of prompts and replies"
    with drawing(title):
        figure, axes = make_axes({"share": False, "unit": "pairs, tokens across", "across": "tokens"}, 8, wide=True)
        for (name, colour), dash in zip(LENGTHS.items(), DASHES, strict=False):
            axes.stairs(histogram[name], edges, color=colour, ls=dash, lw=1.4, label=name)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(1))
        powers = [10**k for k in range(len(str(max(max(histogram[name]) for name in LENGTHS))))]
        axes.set_yticks([0, *powers], labels=[f"{n:,}" for n in (0, *powers)])
        axes.minorticks_off()
        legend = axes.legend(loc="upper right", frameon=False, fontsize=TEXT - 0.5)
        for text in legend.get_texts():
            text.set_color(INK)
        most = "; ".join(f"{name} {_fullest(histogram[name], edges)} tokens" for name in LENGTHS)
        return to_svg(figure, f"{title}: most often {most}")


def _fullest(counts: Sequence[int], edges: Sequence[int]) -> str:
    at = max(range(len(counts)), key=lambda i: counts[i])
    return f"{edges[at]} to {edges[at + 1] - 1}"


def draw_features(features: Sequence[Mapping[str, Any]]) -> str:
    """Of each feature how often the reply that has more of it is the chosen one, with its 95 % interval."""
    title = "What a model could win by without reading"
    shown = sorted(features, key=lambda one: abs(one["accuracy"] - 0.5))
    with drawing(title):
        chart = {"share": False, "unit": "feature", "across": "pairs whose chosen reply has more of it"}
        figure, axes = make_axes(chart, 2, wide=True)
        figure.set_size_inches(400 / 72, (90 + 18 * len(shown)) / 72)
        height = 90 + 18 * len(shown)
        axes.set_position((185 / 400, 36 / height, 200 / 400, (height - 66) / height))
        axes.axvline(0.5, color=MUTED, lw=1, ls=DASHES[1])
        for row, one in enumerate(shown):
            axes.plot([one["low"], one["high"]], [row, row], color=ACCENT, lw=1.6)
            axes.plot([one["accuracy"]], [row], "o", color=ACCENT, ms=5)
        axes.set_yticks(range(len(shown)), labels=[ellipsis(one["name"], LONGEST_NAME) for one in shown])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        said = [f"{one['name']} {one['accuracy']:.1%}" for one in reversed(shown)]
        return to_svg(figure, f"{title}: {'; '.join(said)}")
