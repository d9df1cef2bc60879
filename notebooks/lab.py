"""What the four notebooks share: short runs on `tiny`, quiet libraries, and how plots look. Import it first."""

from __future__ import annotations

import logging
import os
import warnings

# Before anything heavy is imported: these are read once.
os.environ |= {
    "TQDM_DISABLE": "1",  # progress bars would fill the page
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # nor those of loading a model
    "TRANSFORMERS_VERBOSITY": "error",  # its warnings speak to who writes training code
    "TRL_EXPERIMENTAL_SILENCE": "1",  # that ORPO is experimental, notebook 4 says itself
    "WANDB_MODE": "disabled",  # every figure is in the run directory too
}
warnings.filterwarnings(
    "ignore", message=".*gradient_checkpointing.* is deprecated"
)  # between TRL 1.16 and transformers
warnings.filterwarnings("ignore", message="IProgress not found")  # bars are off
logging.disable(logging.WARNING)  # what a run warns of is in its manifest, and shown from there

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML
from matplotlib.axes import Axes

import alignlab as al

plt.rcParams |= {
    "figure.figsize": (6.4, 3.4),
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
}
pd.set_option("display.max_colwidth", 60)

# `tiny` in a minute. A real recipe runs as it is written.
SHORT = {
    "tiny": (
        "data.toy.pairs=600",
        "monitor.kl.prompts=24",
        "sft.max_steps=60",
        "sft.eval_steps=20",
        "dpo.max_steps=40",
        "dpo.eval_steps=10",
        "dpo.learning_rate=1e-3",
        "kto.max_steps=30",
        "kto.eval_steps=30",
        "orpo.max_steps=100",  # as many as SFT and DPO together
        "orpo.eval_steps=50",
        "rounds.samples=2",
        "rounds.prompts=150",
    )
}


def load(recipe: str, *overrides: str):
    """The recipe, shortened where the notebooks know how; of two overrides of one setting the later one counts."""
    last = {override.partition("=")[0]: override for override in (*SHORT.get(recipe, ()), *overrides)}
    return al.load_recipe(recipe, *last.values())


def plot(ax: Axes, run: al.Run, figure: str, label: str | None = None, **style) -> None:
    """A figure of a run over its steps, such as `eval/kl`; with two standard errors where known."""
    rows = pd.DataFrame(run.metrics)
    rows = rows[rows[figure].notna()]
    (line,) = ax.plot(rows["step"], rows[figure], marker="o", markersize=3, label=label, **style)
    error = f"{figure}_stderr"
    if error in rows:
        band = 2 * rows[error].fillna(0)
        ax.fill_between(rows["step"], rows[figure] - band, rows[figure] + band, alpha=0.2, color=line.get_color())


def question(prompt: str) -> str:
    """What was asked last, without the dialogue before it."""
    return prompt.split("Human:")[-1].replace("Assistant:", "").strip()


def texts(table: pd.DataFrame) -> HTML:
    """The table with whole texts in its cells, each beginning at the left."""
    at_left = {"selector": "th, td", "props": "text-align: left; vertical-align: top; white-space: pre-line"}
    return HTML(table.style.set_table_styles([at_left]).format(precision=2).set_uuid("texts").to_html())
