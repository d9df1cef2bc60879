"""A finished run → a folder that loads anywhere: merged model or adapter, tokenizer, card, and how far it is off."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignlab.data.format import FIXED_DAY, Dialogue, Format, Stops
from alignlab.data.transcript import Turn
from alignlab.disk import filling, write_json
from alignlab.errors import ModelError, RunError
from alignlab.exports import difference
from alignlab.exports.card import CAUSES, QUESTION, CardFacts, difference_rows, is_local, write_card
from alignlab.exports.chat import chat_template, reads_as_in_training
from alignlab.exports.difference import Difference, Rows
from alignlab.exports.merge import Trained, find_trained, load_exported, load_trained, merge
from alignlab.models import load as models
from alignlab.recipe.load import Recipe, load_recipe
from alignlab.runs.run import Run, package_versions
from alignlab.text.safe import paths_in, publishable

log = logging.getLogger(__name__)

MERGED, ADAPTER = "merged", "adapter"
FULL, DEQUANTIZED = "full", "dequantized"
FACTS_FILE = "export.json"
SHARD = "5GB"
OF_LOADING = ("is_local", "local_files_only", "backend")  # how transformers 5 came by a tokenizer, not what it is


@dataclass(frozen=True)
class ExportOptions:
    """What is to be exported, and how."""

    form: str = MERGED  # or ADAPTER
    dtype: str | None = None  # of merged weights; none: the recipe's model.dtype
    base: str = FULL  # of a 4-bit run: merge into the base itself, or DEQUANTIZED: as training saw it
    model: str | None = None  # where the base lies, if not where training found it
    rows: int = 32  # held-out replies that the export is checked on
    force: bool = False  # replace an earlier export
    repository: str | None = None  # on the hub, where the folder will be published


@dataclass(frozen=True)
class Export:
    """A folder that was written."""

    path: Path
    form: str
    dtype: str
    base: str
    size: int  # bytes
    difference: Difference
    stops: Stops
    notes: tuple[str, ...]  # what a user of the folder should know, a sentence each


def export(run: Run, to: Path, options: ExportOptions | None = None) -> Export:
    """Writes a finished run's model into a folder, with tokenizer, chat template and card.

    The folder is re-loaded by transformers alone and its log-probabilities of held-out replies are compared with the
    run's. It is there whole or not at all: ModelError where it answers otherwise than the run, unexplained.
    """
    options = options or ExportOptions()
    with _beside(to, options.force) as folder:
        recipe = load_recipe(run.recipe_file)
        trained = find_trained(run, recipe, options.model)
        _refuse_options(trained, options)
        tokenizer = models.load_tokenizer(recipe.model, str(run.model))
        form = Format(recipe.data.format, tokenizer)
        stops = models.find_stops(recipe.model, form, trained.weights)
        rows = difference.held_out_rows(run, form, options.rows)
        dtype = options.dtype or recipe.model.dtype
        log.info("%s: its model answers %d held-out prompts", run.path, len(rows.prompts))
        before = _scores(lambda: load_trained(trained), rows, tokenizer)
        if options.form == ADAPTER:
            _write_adapter(trained, folder)
        else:
            _write_merged(merge(trained, dtype, dequantized=options.base == DEQUANTIZED), tokenizer, folder)
        models.generation_config(stops, tokenizer).save_pretrained(folder)
        template = chat_template(form)
        _write_tokenizer(tokenizer, template, folder)
        difference.release_memory()
        log.info("%s: the export answers them", run.path)
        after = _scores(lambda: load_exported(folder, dtype, trained), rows, tokenizer)
        found = difference.compare(before, after, rows.split, _cause(trained, options, dtype))
        _refuse_wrong(found, options)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        notes = [*_notes(found, trained, options, dtype), *_template_notes(form, template)]
        made = Export(to, options.form, dtype, options.base, size, found, stops, tuple(notes))
        _describe(trained, recipe, form, made, options, folder)
    return made


# Refusals ---------------------------------------------------------------------


def _refuse_target(to: Path, force: bool) -> None:
    if to.is_dir() and not any(to.iterdir()):
        return
    if (to / FACTS_FILE).is_file():
        if not force:
            raise RunError(f"{to} holds an export already; name another folder, or replace it with --force")
    elif to.exists():
        raise RunError(f"{to} is there and is no export; name a folder that is new or empty")


def _refuse_options(trained: Trained, options: ExportOptions) -> None:
    run = trained.run.path
    if options.form == ADAPTER:
        if trained.adapter is None:
            raise RunError(f"{run} trained all weights and has no adapter; export it --as {MERGED}")
        if trained.is_embedded:
            raise RunError(f"the base model of {run} is alignlab's own and nowhere else; export it --as {MERGED}")
        if options.repository and trained.base and is_local(trained.base):
            raise RunError(
                f"the adapter's base is the folder {trained.base}, which nobody else can load; push it --as {MERGED}"
            )
        if options.dtype or options.base == DEQUANTIZED:
            raise RunError(f"--dtype and --base {DEQUANTIZED} are for merged weights; leave them out --as {ADAPTER}")
    if options.base == DEQUANTIZED and not trained.is_4bit:
        raise RunError(f"{run} was not trained on a 4-bit base; leave --base out")


def _refuse_wrong(found: Difference, options: ExportOptions) -> None:
    if found.cause == difference.EXACT and not found.is_explained:
        remedy = f"; export it --as {ADAPTER}" if options.form == MERGED else ""
        raise ModelError(
            f"the export answers otherwise than the run: up to {found.reply_most:.3g} nats a reply, where rounding "
            f"makes up {difference.EXACT_NATS:g} at most; nothing was written{remedy}"
        )


# Weights ----------------------------------------------------------------------


def _write_adapter(trained: Trained, folder: Path) -> None:
    """The run's adapter as it is, and the name of its base as others know it."""
    assert trained.adapter is not None, "`_refuse_options` has asked"
    shutil.copy(trained.adapter / "adapter_model.safetensors", folder)
    config = json.loads((trained.adapter / models.ADAPTER_FILE).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": trained.base, "revision": trained.revision}
    write_json(folder / models.ADAPTER_FILE, config)


def _write_merged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights in shards."""
    model.generation_config = GenerationConfig()  # written by itself
    settings = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "use_cache": True}
    model.config.update(settings)  # training switches the cache off
    model.save_pretrained(folder, max_shard_size=SHARD)
    _also_for_transformers_4(folder / "config.json")


def _also_for_transformers_4(file: Path) -> None:
    """Adds the keys under which transformers 4, which many servers stand on, looks for dtype and rotary embedding.

    Without them it takes its own defaults in silence. transformers 5 reads either.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    config["torch_dtype"] = config.get("dtype")
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    write_json(file, config)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str | None, folder: Path) -> None:
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = {
        key: value for key, value in json.loads(file.read_text(encoding="utf-8")).items() if key not in OF_LOADING
    }
    if config.get("tokenizer_class") == "TokenizersBackend":  # the name that transformers 5 has for it, and 4 has not
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(file, config)


def _scores(load: Callable[[], PreTrainedModel], rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """What a model makes of the rows; it is gone from memory afterwards."""
    scores = difference.score_tokens(load(), rows, tokenizer.pad_token_id)
    difference.release_memory()
    return scores


def _cause(trained: Trained, options: ExportOptions, dtype: str) -> str:
    """What the log-probabilities of this export may differ by."""
    if trained.is_4bit and options.base == FULL:
        return difference.BASE
    computed = "float32" if trained.adapter is None else trained.section.dtype
    same_numbers = options.form == ADAPTER or dtype == computed == "float32"
    return difference.EXACT if same_numbers else difference.ROUNDING


# What is said of it -----------------------------------------------------------


def _notes(found: Difference, trained: Trained, options: ExportOptions, dtype: str) -> list[str]:
    notes = []
    if found.cause == difference.BASE and options.form == MERGED:
        notes.append(
            f"The adapter was trained on a 4-bit base and is merged into the full-precision one, which moves the "
            f"log-probabilities by {found.reply.mean:.2g} nats a reply; `--base {DEQUANTIZED}` merges it into the base "
            f"as training saw it."
        )
    if found.cause == difference.BASE and options.form == ADAPTER:
        notes.append(
            f"The adapter was trained on a 4-bit base (nf4, double quantization); on the full-precision one, as "
            f"measured here, its log-probabilities are {found.reply.mean:.2g} nats a reply off. Load the base in 4-bit "
            f"to have those of training."
        )
    if not found.is_explained:
        notes.append(
            f"Log-probabilities differ by {found.token.mean:.2g} nats a token from the run's, more than the "
            f"{difference.ROUNDING_NATS:g} that {dtype} explains: compare its replies before you rely on it."
        )
    if options.form == ADAPTER and trained.base and is_local(trained.base):
        notes.append(
            f"{models.ADAPTER_FILE} names the base as a folder, {trained.base}; write its hub id or its place "
            f"there where the adapter goes."
        )
    return notes


def _template_notes(form: Format, template: str | None) -> list[str]:
    notes = []
    if template is not None and not reads_as_in_training(form, template):
        notes = ["The chat template gives other token ids than training did; encode its prompts as text, with the BOS."]
    if form.writes_date:
        notes.append(f"The chat template writes the day's date; in training that was always {FIXED_DAY:%d %b %Y}.")
    return notes


def _describe(
    trained: Trained, recipe: Recipe, form: Format, export: Export, options: ExportOptions, folder: Path
) -> None:
    """Writes the card and the facts, neither of which names a place on this machine."""
    run, found = trained.run, asdict(export.difference)
    card = CardFacts(
        place=options.repository or export.path.resolve().name,
        form=export.form,
        dtype=export.dtype,
        base=trained.base,
        base_is=_base_is(trained, export),
        weights=models.weights_hash(run.model),
        difference=found,
        notes=export.notes,
        prompt=form.prompt(Dialogue([Turn("Human", f" {QUESTION}")])),
        stops=export.stops,
        has_template=form.tokenizer.chat_template is not None,
    )
    (folder / "README.md").write_text(write_card(run, recipe, card), encoding="utf-8")
    facts = {
        "run": str(run.path),
        "run_weights": card.weights,
        "form": export.form,
        "weights": models.weights_hash(folder),
        "made_of": card.base_is,
        "difference_nats": found,
        "notes": export.notes,
        "versions": package_versions(),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    (folder / FACTS_FILE).write_text(
        publishable(text, sorted(paths_in([run.manifest, str(run.path)]))), encoding="utf-8"
    )


def _base_is(trained: Trained, export: Export) -> str:
    if trained.adapter is None:
        return f"all weights of the run, in {export.dtype}"
    if export.form == ADAPTER:
        return "the adapter alone, in float32"
    which = f"the {export.dtype} base"
    if trained.is_4bit:
        which += ", rounded to 4 bits as in training" if export.base == DEQUANTIZED else ", not rounded to 4 bits"
    return f"the adapter merged into {which}"


def summarize(export: Export) -> str:
    """What was written, how far it is from the run, and how to load it, on one screen."""
    found = export.difference
    loader = "AutoPeftModelForCausalLM" if export.form == ADAPTER else "AutoModelForCausalLM"
    what = "the adapter" if export.form == ADAPTER else f"the merged model in {export.dtype}"
    lines = [
        f"{export.path}: {what}, {_bytes(export.size)}",
        "",
        f"  log-probabilities less the run's own, {found.reply.n} held-out replies ({found.split}), in nats",
        *(f"  {label:44}{value}" for label, value in difference_rows(asdict(found))),
        f"  {CAUSES[found.cause]}",
        *(f"  {note}" for note in export.notes),
        "",
        f"  load  {loader}.from_pretrained({json.dumps(str(export.path), ensure_ascii=False)})",
    ]
    if export.form == MERGED:
        lines.append(f"        vllm serve {shlex.quote(str(export.path))}")
    if export.stops.texts:
        texts = ", ".join(json.dumps(text) for text in export.stops.texts)
        lines.append(f"  stop  at {texts} too: no token ends a reply there, so that each request has to name it")
    return "\n".join(lines)


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


# The folder -------------------------------------------------------------------


@contextlib.contextmanager
def _beside(to: Path, force: bool) -> Iterator[Path]:
    """An empty folder that takes the target's place when the block ends well, and is gone when it does not."""
    _refuse_target(to, force)
    with filling(to) as folder:
        yield folder
        _refuse_target(to, force)
