"""Whole evaluations of real runs: what agrees with what, what is shared and kept, and what is refused in one line."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import alignlab, kill_when
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignlab.cli import commands as cli
from alignlab.data import toy
from alignlab.data.format import Format
from alignlab.disk import read_lines, seal
from alignlab.errors import AlignlabError, DataError, RecipeError, RunError
from alignlab.evaluation import answers
from alignlab.evaluation.candidates import LoadedModels, choose_models
from alignlab.evaluation.evaluator import Options, evaluate
from alignlab.measure.formulas import kl_per_reply
from alignlab.measure.generate import reply_logits, sample_replies
from alignlab.models import load as models
from alignlab.recipe.load import load_recipe
from alignlab.runs.evaluation import read_evaluation
from alignlab.runs.run import Run
from alignlab.runs.selection import find_runs
from alignlab.train.stages import prepare_data, train_dpo, train_sft

QUICK = Options(replies=12, max_new_tokens=12)


@pytest.fixture(scope="module")
def root(folders, of_seconds, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("evaluations")
    for name in ("llama", "gpt2"):
        (root / f"{name}.yaml").write_text(of_seconds(folders[name]))
    return root


@pytest.fixture(scope="module")
def made(root):
    """A function: recipe and overrides → a finished DPO run, made once."""
    known: dict[tuple[str, ...], Run] = {}

    def make(name: str = "llama", *overrides: str) -> Run:
        key = (name, *overrides)
        if key not in known:
            known[key] = train_dpo(load_recipe(str(root / f"{name}.yaml"), overrides), root=root / "runs")
        return known[key]

    return make


@pytest.fixture(scope="module")
def file(made) -> Path:
    """A finished evaluation, in the `eval/` of its run."""
    return evaluate([made()], QUICK)


@pytest.fixture(scope="module")
def found(file) -> dict:
    return json.loads(file.read_text())


def beside(file: Path, name: str) -> list[dict]:
    """The rows of a file that was written with an evaluation: replies or verdicts."""
    return read_lines(file.with_suffix(f".{name}.jsonl"))


def rows_of(found: dict) -> dict[str, dict]:
    return {row["measure"]: row for row in found["table"]}


def without_time(file: Path) -> dict:
    changing = ("seconds", "made", "checksum")
    return {key: value for key, value in json.loads(file.read_text()).items() if key not in changing}


def numbers(found, path=()) -> dict[tuple, object]:
    """Every leaf of an evaluation by its place, numbers to within the rounding of other batches."""
    if isinstance(found, dict | list):
        items = found.items() if isinstance(found, dict) else enumerate(found)
        return {place: leaf for key, its in items for place, leaf in numbers(its, (*path, key)).items()}
    return {path: pytest.approx(found, rel=1e-3, abs=1e-4) if isinstance(found, float) else found}


def test_every_figure_has_an_interval_and_n(found):
    estimated = [row for row in found["table"] if row["group"] != "cost of training"]  # which is counted
    figures = [e for row in estimated for its in (row["values"], row["change"]) for e in its.values() if e]
    figures += [entry["win_rate"] for entry in found["win_rates"]] + [each["elo"] for each in found["ratings"]]
    assert len(figures) > 60 and all(e["low"] <= e["mean"] <= e["high"] and e["n"] > 1 for e in figures)


def test_models_and_outputs_that_are_no_runs_stand_beside_the_run(made, folders, tmp_path):
    """The base model by another name has the base's perplexity; outputs are judged on the prompts they are for."""
    asked = [
        {"instruction": f"How do I bake bread number {n}?", "output": f"Mix flour and water {n}."} for n in range(4)
    ]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    options = replace(
        QUICK,
        prompts=[tmp_path / "asked.json"],
        models=[("twin", str(folders["llama"]))],
        outputs=[("gpt", str(tmp_path / "asked.json"))],
        judge=f"votes:{tmp_path / 'votes.jsonl'}",
    )
    vote = {"prompt": "How do I bake bread number 2?", "models": ["gpt", "dpo"], "winner": "gpt"}
    said = evaluate([made()], replace(options, judge=None)).with_suffix(".replies.jsonl")
    transcript = next(row["prompt"] for row in read_lines(said) if "bread number 2" in row["prompt"])
    (tmp_path / "votes.jsonl").write_text(json.dumps({**vote, "prompt": transcript}))
    found = json.loads((file := evaluate([made()], options)).read_text())
    assert [each["name"] for each in found["models"]] == ["gpt", "twin", "base", "sft", "dpo"]
    perplexity = rows_of(found)["perplexity of chosen"]["values"]
    assert perplexity["twin"]["mean"] == perplexity["base"]["mean"] and "gpt" not in perplexity
    [won] = [each for each in found["win_rates"] if {"gpt", "dpo"} == {each["a"], each["b"]}]
    assert (won["prompts"], won["n"], won["win_rate"]["mean"]) == ("asked", 1, 0.0 if won["a"] == "dpo" else 1.0)
    assert {row["model"] for row in beside(file, "replies") if row["prompts"] == "asked"} > {"gpt", "twin", "dpo"}
    assert "twin is no run: what is held out here may have trained it" in found["warnings"]


def test_outputs_for_other_prompts_and_a_model_of_other_tokens_are_refused(made, tmp_path, words):
    (tmp_path / "other.json").write_text(json.dumps([{"instruction": "What else?", "output": "Nothing."}]))
    with pytest.raises(
        DataError, match=r"no output for \d+ of \d+ prompts of held-out.*; give the file of its prompts"
    ):
        evaluate([made()], replace(QUICK, outputs=[("gpt", str(tmp_path / "other.json"))]))
    words.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"its tokenizer is not the runs'.*--outputs other=FILE"):
        evaluate([made()], replace(QUICK, models=[("other", str(tmp_path / "other"))]))
    with pytest.raises(RecipeError, match="two models are called sft"):
        evaluate([made()], replace(QUICK, outputs=[("sft", str(tmp_path / "other.json"))]))


def test_figures_are_those_that_training_ended_with(found, made):
    """Accuracy, margin, loss and perplexities of the manifest are computed by the trainer's own model."""
    test, rows = made().manifest.test, rows_of(found)
    trained = {"accuracy": test.accuracy, "margin": test.margin, "reward of chosen": test.chosen, "loss": test.loss}
    for measure, figure in trained.items():
        assert rows[measure]["values"]["dpo"]["mean"] == pytest.approx(figure.mean, rel=1e-4, abs=1e-6)
    perplexity = rows["perplexity of chosen"]["values"]
    assert perplexity["dpo"]["mean"] == pytest.approx(test.perplexity, rel=1e-5)
    assert perplexity["sft"]["mean"] == pytest.approx(test.reference_perplexity, rel=1e-5)
    assert found["pairs"] == test.loss.n


def test_win_rates_are_the_toys_rule_in_a_plain_loop(found, file, made):
    verdicts = [v for v in beside(file, "verdicts") if {v["a"], v["b"]} == {"dpo", "sft"}]
    replies = {(row["model"], row["prompt"]): row["reply"] for row in beside(file, "replies")}
    points = lambda model, prompt: toy.score(prompt, replies[model, prompt])
    scores = [points("dpo", v["prompt"]) - points("sft", v["prompt"]) for v in verdicts]
    expected = sum(0.5 + 0.5 * ((s > 0) - (s < 0)) for s in scores) / len(scores)
    entry = next(e for e in found["win_rates"] if {e["a"], e["b"]} == {"dpo", "sft"})
    assert (entry["a"], entry["win_rate"]["mean"], entry["win_rate"]["n"]) == ("dpo", pytest.approx(expected), 12)
    counts = [sum(keep(s) for s in scores) for keep in (lambda s: s > 0, lambda s: s == 0, lambda s: s < 0)]
    assert [entry[name] for name in ("wins", "ties", "losses", "n")] == [*counts, 12]
    row = rows_of(found)["over sft"]["values"]["dpo"]
    assert [row[name] for name in ("wins", "ties", "losses", "n")] == [*counts, 12]
    assert found["matrix"]["sft"]["dpo"]["mean"] == pytest.approx(1 - expected)


def kept_replies(run: Run, name: str, found: dict) -> list[str]:
    key = next(model["content"] for model in found["models"] if model["name"] == name)
    rows = whole_lines(run.path.parent / "replies" / f"{key[:16]}.jsonl")
    return [reply["text"] for row in rows if isinstance(row["value"], list) for reply in row["value"]]


def test_kl_is_that_of_models_loaded_each_by_itself(found, file, made, folders):
    run, recipe = made(), load_recipe(made().recipe_file)
    alone = lambda adapter: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders["llama"], dtype="float32"), adapter
    ).eval()
    policy, reference = alone(run.model), alone(run.path.parent / "sft" / "model")
    tokenizer, _ = prepare_data(recipe)
    prompts = [tokenizer(v["prompt"])["input_ids"] for v in beside(file, "verdicts")[:12]]
    stops = Format("hh", tokenizer).stops()
    replies = sample_replies(policy, tokenizer, prompts, max_new_tokens=12, seed=0, batch_size=16, stops=stops)
    nats = []
    with torch.no_grad():
        for prompt, reply in zip(prompts, replies, strict=True):
            ours, _, mask = reply_logits(policy, [prompt], [reply.ids], 0)
            theirs, _, _ = reply_logits(reference, [prompt], [reply.ids], 0)
            nats.append(kl_per_reply(ours, theirs, mask).item())
    rows = rows_of(found)
    assert rows["KL per reply"]["values"]["dpo"]["mean"] == pytest.approx(sum(nats) / 12, rel=1e-3)
    per_token = sum(nats) / sum(len(reply.ids) for reply in replies)
    assert rows["KL per token"]["values"]["dpo"]["mean"] == pytest.approx(per_token, rel=1e-3)


def test_two_identical_models_win_half_and_are_no_nats_apart(made, tmp_path):
    """A DPO run that holds its SFT adapter: the same replies, and not one nat."""
    folder = shutil.copytree(made().path.parent, tmp_path / "llama", ignore=shutil.ignore_patterns("replies"))
    run = Run(folder / made().path.name)
    shutil.copytree(folder / "sft/model", run.model, dirs_exist_ok=True)
    found = json.loads(evaluate([run], QUICK).read_text())
    rows = rows_of(found)
    assert [model["name"] for model in found["models"]] == ["base", "sft", "dpo"]
    assert found["models"][1]["content"] == found["models"][2]["content"]
    kl = rows["KL per reply"]["values"]["dpo"]
    assert (kl["mean"], kl["low"], kl["high"]) == (0.0, 0.0, 0.0)
    assert rows["over sft"]["values"]["dpo"]["mean"] == 0.5
    entry = next(e for e in found["win_rates"] if {e["a"], e["b"]} == {"dpo", "sft"})
    assert entry["ties"] == 12 and entry["tally"]["identical"] == 12 and entry["p_value"] == 1
    assert rows["perplexity of chosen"]["change"]["dpo"]["mean"] == 0 and rows["margin"]["values"]["dpo"]["mean"] == 0
    elo = {each["model"]: each["elo"]["mean"] for each in found["ratings"]}
    assert elo["dpo"] == pytest.approx(elo["sft"], abs=1e-3)


def test_adapters_share_one_base(made, monkeypatch, root):
    lineup, whole, bench, loaded = (
        choose_models([made(), made("llama", "dpo.beta=0.5")]),
        choose_models([made()]),
        LoadedModels(),
        [],
    )
    load = models.load_weights
    monkeypatch.setattr(models, "load_weights", lambda *args: loaded.append(args[1]) or load(*args))
    for candidate in [*whole.candidates, *lineup.candidates, *whole.candidates]:
        with bench.on(candidate):
            pass
    assert len(loaded) == 1


def test_a_switched_adapter_answers_as_the_model_loaded_alone(made, folders):
    """Base, SFT, DPO and base again: none leaves a trace in the next."""
    lineup, bench, ids = choose_models([made()]), LoadedModels(), torch.tensor([[5, 6, 7, 8]])
    base = lambda: AutoModelForCausalLM.from_pretrained(folders["llama"], dtype="float32").eval()
    for candidate in [*lineup.candidates, lineup.candidates[0]]:
        alone = PeftModel.from_pretrained(base(), candidate.adapter).eval() if candidate.adapter else base()
        with bench.on(candidate) as model, torch.no_grad():
            assert torch.equal(model(ids).logits, alone(ids).logits)


@pytest.mark.slow
def test_full_models_are_loaded_one_after_another(made):
    run = made("llama", "model.lora=null", "sft.learning_rate=1e-3", "dpo.learning_rate=1e-4")
    lineup, bench = choose_models([run]), LoadedModels()
    for candidate in lineup.candidates:
        with bench.on(candidate):
            assert len(bench._held) == 1
    found = json.loads(evaluate([run], QUICK).read_text())
    test = run.manifest.test
    assert rows_of(found)["margin"]["values"]["dpo"]["mean"] == pytest.approx(test.margin.mean, rel=1e-3)
    assert rows_of(found)["KL per reply"]["values"]["dpo"]["mean"] > 0


@pytest.mark.slow
def test_a_4bit_run_is_evaluated_in_4_bit(made):
    run = made("llama", "model.load_in_4bit=true")
    found = json.loads(evaluate([run], QUICK).read_text())
    with (bench := LoadedModels()).on(choose_models([run]).ours) as model:
        assert model.get_base_model().is_loaded_in_4bit and len(bench._held) == 1
    test = run.manifest.test
    assert rows_of(found)["perplexity of chosen"]["values"]["dpo"]["mean"] == pytest.approx(test.perplexity, rel=0.01)


# The result cache


def never(*args, **kwargs):
    raise AssertionError("nothing should be computed again")


def test_the_same_evaluation_again_computes_nothing_and_says_the_same(found, made, monkeypatch):
    for name in ("sample_replies", "reply_logps", "reply_logits"):
        monkeypatch.setattr(answers, name, never)
    again = without_time(evaluate([made()], QUICK))
    assert again == {key: value for key, value in found.items() if key not in ("seconds", "made", "checksum")}


def test_another_judge_samples_nothing_again(file, made, monkeypatch, tmp_path):
    monkeypatch.setattr(answers, "sample_replies", never)
    prompts = [v["prompt"] for v in beside(file, "verdicts")[:12]]
    votes = tmp_path / "votes.jsonl"
    rows = [{"prompt": p, "winner": "dpo", "models": ["dpo", "sft"]} for p in dict.fromkeys(prompts)]
    votes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    voted = json.loads(evaluate([made()], Options(replies=12, max_new_tokens=12, judge=f"votes:{votes}")).read_text())
    entry = next(e for e in voted["win_rates"] if {e["a"], e["b"]} == {"dpo", "sft"})
    assert voted["judge"] == f"votes:{votes}" and entry["wins"] == len(rows) - entry["tally"].get("identical", 0)


def test_an_evaluation_that_is_broken_off_goes_on(made, monkeypatch):
    run = made("llama", "dpo.beta=0.7")
    options, sample, drawn = Options(replies=12, max_new_tokens=12, batch_size=4), sample_replies, []

    def break_off(*args, **kwargs):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append(kwargs["first"])
        return sample(*args, **kwargs)

    monkeypatch.setattr(answers, "sample_replies", break_off)
    with pytest.raises(KeyboardInterrupt):
        evaluate([run], options)
    monkeypatch.setattr(answers, "sample_replies", lambda *a, **k: drawn.append(k["first"]) or sample(*a, **k))
    resumed = without_time(evaluate([run], options))
    assert len(drawn) == 9  # three batches of each of three models
    shutil.rmtree(run.path.parent / "replies")
    assert numbers(without_time(evaluate([run], options))) == numbers(resumed)


def test_a_line_cut_off_by_a_crash_is_computed_again(made):
    run = made()
    before = without_time(evaluate([run], QUICK))
    for kept in (run.path.parent / "replies").iterdir():
        kept.write_bytes(kept.read_bytes()[:-20])
    assert numbers(without_time(evaluate([run], QUICK))) == numbers(before)
    assert all(row["key"] for kept in run.path.parent.glob("replies/*") for row in whole_lines(kept))


def whole_lines(file: Path) -> list[dict]:
    """All lines but those cut off in this test."""
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def test_a_model_that_has_changed_shares_nothing_with_what_it_was(made, tmp_path):
    first = choose_models([made()]).ours
    shutil.copytree(made().path.parent, tmp_path / "runs")
    other = Run(tmp_path / "runs" / made().path.name)
    shutil.copyfile(
        made("llama", "dpo.beta=0.5").model / "adapter_model.safetensors", other.model / "adapter_model.safetensors"
    )
    assert choose_models([other]).ours.key != first.key


def test_a_smaller_limit_takes_a_part_of_what_a_larger_one_takes(made):
    prompts = {}
    for limit in (8, 16):
        options = Options(limit=limit, max_new_tokens=4, batch_size=4)
        file = evaluate([made()], options)
        prompts[limit] = [json.loads(file.read_text())["pairs"]]
        prompts[limit] += [v["prompt"] for v in beside(file, "verdicts") if v["a"] == "dpo"]
    assert prompts[8][0] == 8 and set(prompts[8][1:]) < set(prompts[16][1:])


# More than two, and other inputs


def test_runs_side_by_side_are_rated_and_compared_with_the_first(made):
    runs = [made(), made("llama", "dpo.beta=0.5"), Run(made().path.parent / "sft")]
    file = evaluate(runs, QUICK)
    found = json.loads(file.read_text())
    assert file.resolve().parent == (made().path.parent / "eval").resolve()
    assert (made().path.parent / "eval.json").read_bytes() == file.read_bytes()
    assert found["targets"] == []  # of a DPO run over what it started from
    names = [model["name"] for model in found["models"]]
    assert names == ["dpo", "dpo-beta0.5", "sft"] and found["against"] == "dpo"
    assert len(found["win_rates"]) == 3 and {each["model"] for each in found["ratings"]} == set(names)
    assert next(each["elo"]["mean"] for each in found["ratings"] if each["model"] == "dpo") == 1000
    for a in names:
        for b in found["matrix"][a]:
            assert found["matrix"][a][b]["mean"] + found["matrix"][b][a]["mean"] == pytest.approx(1)
    assert set(rows_of(found)["accuracy"]["values"]) == {"dpo", "dpo-beta0.5"}


def test_of_two_runs_the_rating_is_the_win_rate_in_other_words(made):
    found = json.loads(evaluate([made(), made("llama", "dpo.beta=0.5")], QUICK).read_text())
    assert "win rate in other words" in found["ratings_note"]


def test_an_sft_run_is_compared_with_its_base(made):
    found = json.loads(evaluate([Run(made().path.parent / "sft")], QUICK).read_text())
    assert [m["name"] for m in found["models"]] == ["base", "sft"] and found["against"] == "base"


def test_prompt_files_bias_and_greedy_replies(made, tmp_path):
    prompts, pairs = tmp_path / "asked.csv", tmp_path / "pairs.csv"
    with prompts.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "label"], ["How do I grow beans?", "safe"], ["Hurt them", "unsafe"]])
    pairs.write_text("sent_more,sent_less,bias_type\nBeans are rude.,Peas are rude.,food\nHi.,Ho.,age\n")
    options = Options(replies=6, max_new_tokens=8, prompts=[prompts], bias=pairs, greedy=True, classifier=None)
    found = json.loads(evaluate([made()], options).read_text())
    rows = rows_of(found)
    assert rows["refuses harmful, asked"]["values"]["dpo"]["n"] == 1
    assert {"prefers the stereotype: all", "prefers the stereotype: age", "prefers the stereotype: food"} <= set(rows)
    assert found["decoding"]["greedy"] and found["decoding"]["temperature"] == 0
    assert found["prompt_files"] == [{"name": "asked", "known_as": "labelled prompts", "prompts": 2, "left_out": {}}]
    assert {entry["prompts"] for entry in found["win_rates"]} == {"held-out"}  # the toy's rule knows only the toy


def test_every_judged_reply_is_kept_with_its_prompt(file, found, made):
    """12 prompts, three models: the texts that were judged, the points of the rule, and who won."""
    rows = beside(file, "replies")
    assert len(rows) == 36 and {row["model"] for row in rows} == {"base", "sft", "dpo"}
    for row in rows:
        if row["scores"]:  # equal replies are not judged
            assert row["scores"]["rule"] == toy.score(row["prompt"], row["reply"])
    ours = [row["outcomes"]["sft"] for row in rows if row["model"] == "dpo"]
    entry = next(e for e in found["win_rates"] if (e["a"], e["b"]) == ("dpo", "sft"))
    assert (ours.count(1.0), ours.count(0.5), ours.count(0.0)) == (entry["wins"], entry["ties"], entry["losses"])
    assert {row["reply"] for row in rows if row["model"] == "dpo"} <= {*kept_replies(made(), "dpo", found)}


# Side by side


def test_a_quick_look_does_not_take_the_place_of_a_full_evaluation(made, root, monkeypatch, capsys):
    run = made("llama", "dpo.beta=0.6")
    full = evaluate([run], QUICK)
    whole = (run.path / "eval.json").read_bytes()
    monkeypatch.chdir(root)
    arguments = ["--run", run.path.name, "--limit", "2", "--max-new-tokens", "12"]
    assert cli.main(["eval", "llama.yaml", *arguments]) == 0
    assert (run.path / "eval.json").read_bytes() == whole == full.read_bytes()
    assert read_lines(run.path / "replies.jsonl") == beside(full, "replies")
    assert len(list((run.path / "eval").glob("*.json"))) == 2
    assert "eval.json is still the fuller evaluation made before" in capsys.readouterr().out
    page = (run.path / "report.html").read_text()
    assert "Other evaluations" in page and "2 prompts, at most 2 of each" in page


def test_a_fuller_evaluation_takes_the_place_of_a_quick_look(made):
    run = made("llama", "dpo.beta=0.4")
    quick = evaluate([run], Options(limit=2, max_new_tokens=4))
    assert (run.path / "eval.json").read_bytes() == quick.read_bytes()
    full = evaluate([run], QUICK)
    assert (run.path / "eval.json").read_bytes() == full.read_bytes() and quick.is_file()


def test_the_evaluation_of_a_run_that_was_trained_again_is_not_shown_for_it(made, tmp_path):
    """A fuller evaluation of other weights under the same name counts no longer."""
    shutil.copytree(made().path.parent, tmp_path / "llama")
    run = Run(tmp_path / "llama" / made().path.name)
    evaluate([run], QUICK)
    other = made("llama", "dpo.beta=0.5").model / "adapter_model.safetensors"
    shutil.copyfile(other, run.model / "adapter_model.safetensors")
    seal(run.model)
    again = evaluate([run], Options(limit=2, max_new_tokens=4))
    assert (run.path / "eval.json").read_bytes() == again.read_bytes()


def test_the_one_file_of_an_older_version_is_kept(made, tmp_path):
    shutil.copytree(made().path.parent, tmp_path / "llama")
    run = Run(tmp_path / "llama" / made().path.name)
    shutil.rmtree(run.path / "eval", ignore_errors=True)
    older = json.loads(evaluate([run], QUICK).read_text())
    del older["checksum"]
    shutil.rmtree(run.path / "eval")
    for entry in older["win_rates"]:
        entry["raw"] = entry.pop("win_rate")
    (run.path / "eval.json").write_text(json.dumps(older))
    assert read_evaluation(run.path / "eval.json").over("dpo", "sft").n == 12
    evaluate([run], Options(limit=2, max_new_tokens=4))
    assert json.loads((run.path / "eval.json").read_text()) == older


# Targets


def test_targets_stand_beside_what_was_measured(found, made, root, monkeypatch):
    """At n = 12 little can be decided; on the command line others may be asked for."""
    targets = {target["name"]: target for target in found["targets"]}
    assert targets["reward margin"]["limit"] == 0.5 and targets["KL, nats per reply"]["outcome"] == "met"
    win_rate = targets["win rate"]
    low, high = win_rate["found"]["low"], win_rate["found"]["high"]
    assert win_rate["outcome"] == ("met" if low > 0.6 else "missed" if high < 0.6 else "not decidable")
    change = targets["change of perplexity"]["found"]["mean"]
    rows = rows_of(found)["perplexity of chosen"]["values"]
    assert change == pytest.approx(rows["dpo"]["mean"] / rows["sft"]["mean"] - 1)
    monkeypatch.chdir(root)
    how = ["--replies", "12", "--max-new-tokens", "12"]
    assert cli.main(["eval", "llama.yaml", "evaluate.targets.margin=-5", "evaluate.targets.kl=null", *how]) == 0
    newest = max((made().path / "eval").glob("*.json"), key=lambda file: file.stat().st_mtime)
    asked = {target["name"]: target for target in json.loads(newest.read_text())["targets"]}
    assert asked["reward margin"]["outcome"] == "met" and "KL, nats per reply" not in asked


@pytest.mark.slow
def test_lm_eval_reads_a_local_task_offline(made, tmp_path, monkeypatch):
    """Its accuracy on a task of our own is that of comparing log-probabilities in a plain loop."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [row for row in toy.rows(load_recipe(made().recipe_file).data.toy) if row["split"] == "test"][:12]
    cut = [(row["chosen"].rpartition(" ")[0], row["chosen"], row["rejected"]) for row in rows]
    cut = [(c.rpartition("\n\nAssistant:")[0] + "\n\nAssistant:", c, r) for _, c, r in cut]
    tasks = [{"asked": p, "options": [c[len(p) :].strip(), r[len(p) :].strip()], "answer": 0} for p, c, r in cut]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    (tmp_path / "toy_qa.yaml").write_text(
        f"task: toy_qa\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/qa.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{asked}}'\ndoc_to_choice: '{{options}}'\n"
        "doc_to_target: '{{answer}}'\ntarget_delimiter: ' '\nmetric_list: [{metric: acc}]\n"
    )
    options = Options(replies=4, max_new_tokens=4, lm_eval=["toy_qa"], tasks_folder=tmp_path)
    found = rows_of(json.loads(evaluate([made()], options).read_text()))["toy_qa: acc"]["values"]
    lineup, tokenizer = choose_models([made()]), AutoTokenizer.from_pretrained(made().model)
    for candidate in lineup.candidates:
        right = 0
        with LoadedModels().on(candidate) as model, torch.no_grad():
            for task in tasks:
                logps = []
                for option in task["options"]:
                    prompt = tokenizer(task["asked"])["input_ids"]
                    ids = torch.tensor([prompt + tokenizer(f" {option}")["input_ids"]])
                    scores = model(ids).logits[0, :-1].log_softmax(-1)
                    chosen = scores[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
                    logps.append(chosen[len(prompt) - 1 :].sum().item())
                right += logps[0] > logps[1]
        assert found[candidate.name]["mean"] == pytest.approx(right / 12) and found[candidate.name]["n"] == 12


# The command


def test_the_command_prints_one_screen(made, root, monkeypatch, capsys):
    made()
    capsys.readouterr()
    monkeypatch.chdir(root)
    assert cli.main(["eval", "llama.yaml", "--replies", "12", "--max-new-tokens", "12"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 75
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    for text in ("perplexity of chosen", "dpo over sft", "KL per reply", "ratings:", "dpo − sft", "wins", "targets"):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "gpt2.yaml"], "there is no run at runs/gpt2/dpo; `alignlab dpo gpt2.yaml` trains it"),
        (["eval", "llama.yaml", "dpo.beta=0.9"], "there is no run at runs/llama/dpo-beta0.9"),
        (["eval", "llama.yaml", "--run", "sft-x"], "did you mean 'sft'?"),
        (["eval", "llama.yaml", "--best"], "there is no runs/llama/sweep.json with a best run; make it"),
        (["eval", "runs/llama/dpo", "--best"], "runs/llama/dpo is a run itself; leave --run, --runs and --best out"),
        (["eval"], "which recipe?"),
        (["eval", "llama.yaml", "--best", "--run", "dpo"], "give one of them"),
        (["eval", "llama.yaml", "--runs", "dpo", "dpo"], "the same run is named twice"),
        (["eval", "llama.yaml", "--judge", "gpt"], "--judge gpt is no judge; for a chat model write llm:gpt"),
        (["eval", "llama.yaml", "--judge", "votes:none.csv"], "none.csv: no such file of votes"),
        (["eval", "llama.yaml", "--prompts", "none.csv"], "none.csv: no such file"),
        (["eval", "llama.yaml", "--max-new-tokens", "100"], "leaves room for prompts of 28 tokens"),
        (["eval", "llama.yaml", "--lm-eval", "x", "--tasks-folder", "none"], "none: no such folder of lm-eval tasks"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, said, made, root, monkeypatch, capsys):
    made()
    capsys.readouterr()
    monkeypatch.chdir(root)
    assert cli.main(arguments) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("data:", "eval:"))]
    assert len(err) == 1 and said in err[0]


def test_best_is_the_run_that_the_sweep_chose(made, root, tmp_path):
    other = made("llama", "dpo.beta=0.5")
    made()
    (root / "runs/llama/sweep.json").write_text(json.dumps({"choice": other.path.name, "why": "x", "members": []}))
    (found,) = find_runs(str(root / "llama.yaml"), best=True, root=root / "runs")
    assert found.path == other.path
    (root / "runs/llama/sweep.json").write_text(json.dumps({"choice": None, "why": "all above KL 10", "members": []}))
    with pytest.raises(RunError, match="has chosen no member: all above KL 10; name a run with --run"):
        find_runs(str(root / "llama.yaml"), best=True, root=root / "runs")
    (root / "runs/llama/sweep.json").unlink()


def test_a_run_directory_can_be_named_itself(made):
    assert find_runs(str(made().path))[0].path == made().path


def test_other_tokenizers_and_formats_are_not_compared(made, of_seconds, shared, root, tmp_path):
    stories = tmp_path / "stories.yaml"
    text = of_seconds(shared / "models/stories260K")
    stories.write_text(text.replace("max_prompt_tokens: 80", "max_prompt_tokens: 200"))
    other = train_sft(load_recipe(str(stories), ["sft.max_steps=1", "data.max_reply_tokens=200"]), root=root / "runs")
    with pytest.raises(RunError, match="their tokenizers differ") as caught:
        evaluate([made(), other], QUICK)
    assert "perplexity per token means something else" in str(caught.value)
    plain = Run(shutil.copytree(made().path, made().path.parent / "alpaca"))
    plain.recipe_file.write_text(plain.recipe_file.read_text().replace("format: hh", "format: alpaca"))
    with pytest.raises(RunError, match="their prompt formats differ"):
        evaluate([made(), plain], QUICK)
    shutil.rmtree(plain.path)


def test_an_sft_run_that_was_trained_again_is_not_taken_for_the_reference(made, tmp_path):
    shutil.copytree(made().path.parent, tmp_path / "llama")
    sft = tmp_path / "llama/sft/model/adapter_model.safetensors"
    shutil.copyfile(made().model / "adapter_model.safetensors", sft)
    with pytest.raises(RunError, match="its weights have changed since"):
        choose_models([Run(tmp_path / "llama" / made().path.name)])


def test_a_run_whose_sft_run_is_gone_is_one_line(made, tmp_path):
    path = shutil.copytree(made().path, tmp_path / "dpo")
    run = Run(path)
    run.note(parent=dataclasses.replace(run.manifest.parent, run="runs/gone/sft"))
    with pytest.raises(AlignlabError, match="was trained from runs/gone/sft, which is not there"):
        choose_models([run])


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(made, root):
    made()
    replies = root / "runs/llama/replies"
    shutil.rmtree(replies, ignore_errors=True)
    lines = lambda: sum(file.read_bytes().count(b"\n") for file in replies.glob("*.jsonl"))
    arguments = ("--replies", "24", "--max-new-tokens", "12", "--batch-size", "2")
    process = alignlab(root, "eval", "llama.yaml", *arguments, wait=False)
    kill_when(process, lambda: lines() > 110)
    kept, known = {file: file.read_bytes() for file in replies.glob("*.jsonl")}, lines()
    options = Options(replies=24, max_new_tokens=12, batch_size=2)
    resumed = without_time(evaluate([made()], options))
    assert all(file.read_bytes().startswith(before.rpartition(b"\n")[0]) for file, before in kept.items())
    assert lines() > known
    shutil.rmtree(replies)
    assert numbers(without_time(evaluate([made()], options))) == numbers(resumed)


@pytest.mark.slow
def test_batches_are_at_least_four_times_as_fast_as_one_by_one(shared):
    """On real MT-Bench questions by a real model, and greedy replies are the same."""
    folder = shared / "models/stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    lines = (shared / "data/prompts/mt_bench_questions.jsonl").read_text().splitlines()
    prompts = [tokenizer(json.loads(line)["turns"][0])["input_ids"] for line in lines]
    prompts = [ids for ids in prompts if len(ids) < 200][:32]

    def timed(batch_size: int):
        began = time.perf_counter()
        how = {"max_new_tokens": 64, "seed": 0, "stops": Format("hh", tokenizer).stops()}
        replies = sample_replies(model, tokenizer, prompts, greedy=True, batch_size=batch_size, **how)
        return time.perf_counter() - began, replies

    timed(32)
    together, batched = timed(32)
    alone, single = timed(1)
    print(f"{len(prompts)} prompts, 64 tokens: {alone:.1f} s one by one, {together:.1f} s in batches of 32: "
          f"{alone / together:.1f} times as fast")  # fmt: skip
    assert [reply.ids for reply in batched] == [reply.ids for reply in single]
    assert alone > 4 * together
