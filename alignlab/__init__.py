"""Preference alignment of language models: a recipe describes a run, TRL trains it, alignlab measures what came out.

Each function does what the command of its name does, and what it returns prints as the terminal shows it. Nothing heavy
is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alignlab.data.prepare import Prepared
    from alignlab.errors import AlignlabError
    from alignlab.recipe.load import Recipe
    from alignlab.runs.facts import OnTest

__version__ = "0.1.0"
__all__ = [
    "AlignlabError",
    "Run",
    "compare",
    "evaluate",
    "examine",
    "export",
    "load_recipe",
    "make_pairs",
    "plan",
    "prepare",
    "report",
    "run_rounds",
    "sweep",
    "train_dpo",
    "train_kto",
    "train_orpo",
    "train_sft",
]


def __getattr__(name: str) -> Any:
    if name == "AlignlabError":
        from alignlab.errors import AlignlabError

        return AlignlabError
    raise AttributeError(f"module 'alignlab' has no attribute {name!r}")


class Shown:
    """A result that prints as the terminal shows it; a notebook shows the same."""

    def __str__(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        # Jupyter's own font for this is proportional, and its lines wrap: columns would not stand below each other
        return f'<pre style="font-family: monospace; white-space: pre; overflow-x: auto">{escape(str(self))}</pre>'


class Result(Shown):
    """What an examination, a plan, an evaluation or an export found."""

    def __init__(self, text: str, facts: Any, path: Path | None = None):
        self.text = text
        self.facts = facts  # the same as a mapping, a dataclass, or a list of them
        self.path = path  # the file or folder that holds it

    def __str__(self) -> str:
        return self.text


class Run(Shown):
    """A run directory."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run in this folder; RunError where there is none."""
        run = cls(path)
        run.manifest  # noqa: B018  # raises where there is no run
        return run

    @property
    def manifest(self):
        """What it was made from, on what machine, and what came of it: `alignlab.runs.run.Manifest`."""
        return self._run.manifest

    @property
    def test(self) -> OnTest:
        """Its figures on the test split, each an Estimate with `mean`, `stderr`, `n`, `low` and `high`."""
        from alignlab.runs.facts import read_run

        return read_run(self.path).test

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One mapping a logged step, ready for `pandas.DataFrame`."""
        return self._run.metrics()

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Held-out prompts with the replies of the policy and of the reference, at each evaluation."""
        return self._run.samples()

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The trained model, in evaluation mode, and its tokenizer."""
        from alignlab.exports.merge import find_trained, load_trained
        from alignlab.models.load import load_tokenizer
        from alignlab.recipe.load import load_recipe
        from alignlab.runs.run import finished

        run = finished(self._run)
        trained = find_trained(run, load_recipe(run.recipe_file))
        return load_trained(trained).eval(), load_tokenizer(trained.section)

    @property
    def _run(self):
        from alignlab.runs import run

        return run.Run(self.path)

    def __str__(self) -> str:
        from alignlab.reports.summary import summarize

        return summarize(self._run)


class Pairs(Shown):
    """A recipe's preference pairs as the model will see them, and what was dropped on the way."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, prepared: Prepared):
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.prepared = prepared

    @property
    def splits(self) -> datasets.DatasetDict:
        """`train`, `validation` and `test`; the columns are those of `alignlab.data.prepare.Prepared`."""
        import datasets

        return datasets.DatasetDict({name: getattr(self.prepared, name) for name in ("train", "validation", "test")})

    @property
    def dropped(self) -> Mapping[str, int]:
        """How many rows were left out, by reason."""
        return self.prepared.dropped

    def __str__(self) -> str:
        kept = ", ".join(f"{count:,} {split}" for split, count in self.prepared.kept.items())
        dropped = [f"  {count:,} dropped: {reason}" for reason, count in self.dropped.items()]
        return "\n".join([f"{self.prepared.rows:,} rows read; pairs kept: {kept}", *dropped])


class Sweep(Shown):
    """The members of a sweep, and the choice among them."""

    def __init__(self, table, folder: Path):
        self.table = table
        self.folder = folder

    @property
    def best(self) -> Run | None:
        """The run that was chosen; none where no member is inside the limit of KL."""
        return Run(self.folder / self.table.choice) if self.table.choice else None

    @property
    def runs(self) -> list[Run]:
        return [Run(self.folder / member.run) for member in self.table.members]

    def __str__(self) -> str:
        from alignlab.sweeps.choice import render

        return render(self.table, self.folder)


def load_recipe(name: str | Path, *overrides: str) -> Recipe:
    """A recipe by its name or file, with overrides such as `"dpo.beta=0.3"`; it prints where each value was written."""
    from alignlab.data.rows import refuse_missing_paths
    from alignlab.recipe import load
    from alignlab.recipe.show import ShownRecipe

    recipe = load.load_recipe(name, overrides)
    refuse_missing_paths(recipe)
    return ShownRecipe(**vars(recipe))


def prepare(recipe: Recipe) -> Pairs:
    """The recipe's rows as preference pairs, split and tokenized."""
    from alignlab.train.stages import prepare_data

    return Pairs(recipe, *prepare_data(recipe))


def examine(pairs: Pairs) -> Result:
    """What is in the pairs, and what is wrong with them."""
    from alignlab.doctor.examination import examine
    from alignlab.doctor.page import render

    found = examine(pairs.prepared, pairs.recipe, pairs.tokenizer)
    return Result(render(found), found)


def plan(recipe: Recipe, gpu: float | None = None) -> Result:
    """The memory that SFT and DPO will need, in GiB, part by part, and whether it fits a GPU of that size."""
    from alignlab.memory.page import GPUS, plan_facts, show_plan
    from alignlab.memory.plan import plan

    gpus = [gpu] if gpu else GPUS
    plans = [plan(recipe, stage, cuda=gpu is not None or recipe.model.name != "toy") for stage in ("sft", "dpo")]
    return Result("\n\n".join(show_plan(each, gpus) for each in plans), plan_facts(plans, gpus))


def train_sft(recipe: Recipe, *, name: str | None = None, force: bool = False) -> Run:
    """Supervised fine-tuning on the chosen replies; a finished run is left as it is unless `force` is given."""
    return _trained("sft", recipe, name, force)


def train_dpo(recipe: Recipe, *, name: str | None = None, force: bool = False) -> Run:
    """DPO from the recipe's SFT run, which is trained first where it is missing."""
    return _trained("dpo", recipe, name, force)


def train_kto(recipe: Recipe, *, name: str | None = None, force: bool = False) -> Run:
    """KTO from the recipe's SFT run: it learns from thumbs, or from pairs taken apart."""
    return _trained("kto", recipe, name, force)


def train_orpo(recipe: Recipe, *, name: str | None = None, force: bool = False) -> Run:
    """ORPO from the base model: SFT and preferences in one stage."""
    return _trained("orpo", recipe, name, force)


def _trained(stage: str, recipe: Recipe, name: str | None, force: bool) -> Run:
    from alignlab.train import stages

    return Run(getattr(stages, f"train_{stage}")(recipe, name=name, force=force).path)


def evaluate(*runs: Run | str | Path, judge: str | None = None, **options: Any) -> Result:
    """The runs' models side by side; one run stands beside what it was made from.

    The options are those of `alignlab eval`, such as `replies=64` or `greedy=True`.
    """
    from alignlab.evaluation.evaluator import Options, evaluate
    from alignlab.evaluation.scoreboard import show
    from alignlab.runs.evaluation import read_evaluation
    from alignlab.runs.run import finished

    file = evaluate([finished(run) for run in _opened(runs)], Options(judge=judge, **options))
    found = read_evaluation(file)
    assert found, "it has just been written"
    return Result(show(found, file), found, file)


def sweep(recipe: Recipe, **grid: Sequence[Any]) -> Sweep:
    """One DPO run for each combination of the values, as in `sweep(recipe, beta=[0.5, 0.1])`, and the choice."""
    from alignlab.sweeps.members import find_members
    from alignlab.sweeps.runner import run_members

    words = [f"{key.replace('__', '.')}={','.join(str(value) for value in values)}" for key, values in grid.items()]
    betas = None if "beta" in grid else ",".join(str(beta) for beta in recipe.sweep.betas)
    members = find_members(str(recipe.path), recipe.overrides, betas, words)
    return Sweep(run_members(members), members.folder)


def make_pairs(
    recipe: Recipe,
    run: Run | str | Path | None = None,
    *,
    judge: Any = "rule",
    out: str | Path = "pairs.jsonl",
    constitution: str | None = None,
    **options: Any,
) -> Result:
    """Preference pairs from a run's own replies (by default the SFT run's), written to a file that `data.path` reads.

    The judge is as in `alignlab pairs` (of `votes:FILE` the pairs are those that people have seen), or a function from
    contests to verdicts. Options are those of that command, such as `samples=4`, `keep="all"` or `limit=100`.
    """
    from alignlab.people.votes import read_votes
    from alignlab.rounds import pairs
    from alignlab.rounds.constitution import make_revisions
    from alignlab.rounds.votes import pairs_of_votes

    ask = pairs.Ask(judge=judge, **options)
    pairs.check_out(Path(out))
    source = next(_opened([train_sft(recipe) if run is None else run]))
    if constitution:
        made = make_revisions(recipe, source, ask, constitution)
    elif isinstance(judge, str) and judge.startswith("votes:"):
        made = pairs_of_votes(recipe, source, read_votes(Path(judge.removeprefix("votes:"))), judge)
    else:
        made = pairs.make_pairs(recipe, source, ask)
    pairs.write_pairs(Path(out), made.rows)
    return Result(str(made), made, Path(out))


def run_rounds(recipe: Recipe, *, name: str | None = None, **options: Any) -> Result:
    """Iterative DPO as the recipe's section `rounds` says; options are `judge` (a function), `url`, `max_requests`."""
    from alignlab.rounds import rounds

    found = rounds.run_rounds(recipe, name=name, **options)
    file = Path("runs") / recipe.name / f"{name or rounds.NAME}.json"
    return Result(rounds.render(found, file), found, file)


def report(run: Run | str | Path) -> Path:
    """Writes the run's page, and returns the file."""
    from alignlab.reports.page import write_report

    return write_report(Run(run).path if isinstance(run, str | Path) else run.path)


def compare(*runs: Run | str | Path) -> Path:
    """Writes a page with the runs side by side, and returns the file."""
    from alignlab.reports.page import write_comparison

    return write_comparison([run.path for run in _opened(runs)])


def export(run: Run | str | Path, to: str | Path, **options: Any) -> Result:
    """A folder that loads with transformers alone, checked against the run; options as in `alignlab export`."""
    from alignlab.exports.export import ExportOptions, export, summarize
    from alignlab.runs.run import finished

    made = export(finished(next(_opened([run]))), Path(to), ExportOptions(**options))
    return Result(summarize(made), made, made.path)


def _opened(runs: Sequence[Run | str | Path]) -> Iterator[Any]:
    """The same as run directories, which are there."""
    for run in runs:
        yield (run if isinstance(run, Run) else Run.open(run))._run
