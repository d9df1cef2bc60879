"""Where a reply ends: one list for a recipe, in training, evaluation, the doctor and the export alike."""

from __future__ import annotations

import json
from pathlib import Path

import chat_models as made
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from alignlab.cli.commands import main
from alignlab.data.format import Dialogue, Format
from alignlab.data.prepare import prepare
from alignlab.data.transcript import Turn
from alignlab.disk import read_lines
from alignlab.evaluation.evaluator import Options, evaluate
from alignlab.exports.export import ExportOptions, export, summarize
from alignlab.measure.generate import sample_replies
from alignlab.models.load import find_stops, load_tokenizer
from alignlab.recipe.load import DataSection, load_recipe
from alignlab.train.stages import train_dpo

CASE = Path(__file__).parent / "cases" / "13-end-of-turn.jsonl"
RECIPE = """
about: seconds on a CPU
data: {{path: {data}, format: {format}, max_prompt_tokens: 400, max_reply_tokens: 80, test_share: 0.3,
  validation_share: 0.3}}
model: {{name: {model}, dtype: float32, lora: {{r: 2, target_modules: all-linear}}}}
sft: {{max_steps: 1, learning_rate: 1.0e-12, logging_steps: 1, eval_steps: 1}}
dpo: {{max_steps: 1, learning_rate: 1.0e-12, logging_steps: 1, eval_steps: 1}}
monitor: {{kl: {{prompts: 3, max_new_tokens: 40}}}}
"""
# name: template, what its prompts end with, what the model writes again and again, and the stops besides its EOS
KINDS = {
    "gemma": (made.GEMMA, "\n", "Yes.<end_of_turn>", ["<end_of_turn>"]),
    "chatml": (made.CHATML, "\n", "Yes.<|im_end|>", ["<|im_end|>"]),
    "phi": (made.PHI, "\n", "Yes.<|end|>", ["<|end|>"]),
    "llama": (made.LLAMA, "\n", "Yes.<|eot_id|>", ["<|eot_id|>"]),
    "plain text": (made.PLAIN, "\n", "Yes.[/GONE]", ["[/GONE]"]),
    "next turn": (made.BARE, ":", "Yes.\nQ", ["\nQ:"]),
    "before the next": (made.BEFORE_NEXT, "<|assistant|>", "Yes.<|end|>", ["<|end|>"]),
}


def folder_of(kind: str, root: Path) -> Path:
    template, begins, says, _ = KINDS[kind]
    return made.save_parrot(root / "model", made.chat_tokenizer(template), begins, says)


def recipe_for(root: Path, model: Path, form: str = "chat", data: Path = CASE) -> str:
    path = root / "small.yaml"
    path.write_text(RECIPE.format(data=data, format=form, model=model))
    return str(path)


def ask(text: str) -> Dialogue:
    return Dialogue([Turn("Human", f" {text}")])


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_says_where_its_replies_end(kind):
    template, _, _, ends = KINDS[kind]
    form = Format("chat", made.chat_tokenizer(template))
    assert form.stops().said == ["<eos>", *ends]
    assert form.learns_end is (kind not in ("next turn", "before the next"))


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("gemma", "<end_of_turn>"),
        ("phi", "<eos>"),
        ("llama", "<|eot_id|>"),
        ("plain text", "<eos>"),
        ("next turn", "<eos>"),
    ],
)
def test_a_reply_is_learned_up_to_the_token_that_ends_its_turn(kind, end):
    """Phi's template writes the EOS behind its own end; where no token ends a turn, an EOS does."""
    tokenizer = made.chat_tokenizer(KINDS[kind][0])
    section = DataSection(path=str(CASE), format="chat", validation_share=0.3, test_share=0.3)
    ids = prepare(section, tokenizer).train["chosen_ids"]
    assert {tokenizer.decode(reply[-1:]) for reply in ids} == {end}
    assert {sum(tokenizer.decode([token]) == end for token in reply) for reply in ids} == {1}


def test_an_end_of_turn_that_is_the_eos_is_one_stop():
    tokenizer = made.chat_tokenizer(made.CHATML, eos="<|im_end|>")
    assert Format("chat", tokenizer).stops().said == ["<|im_end|>"]
    assert Format("chat", tokenizer).stops([tokenizer.eos_token_id, 0]).said == ["<|im_end|>", "<eos>"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampled_reply_ends_at_the_end_of_its_turn_which_is_no_part_of_its_text(kind, tmp_path):
    """The ids hold the end, as an EOS stands in them; a model that is never stopped writes to the limit."""
    tokenizer = AutoTokenizer.from_pretrained(folder_of(kind, tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    form = Format("chat", tokenizer)
    prompts = [form.prompt_ids(ask("Why?")), form.prompt_ids(ask("How, and how many?"))]
    sampled = lambda stops: sample_replies(model, tokenizer, prompts, max_new_tokens=40, seed=0, stops=stops)
    replies = sampled(form.stops())
    ends = KINDS[kind][3][0]
    assert [(reply.text.strip(), reply.ended) for reply in replies] == [("Yes.", True)] * 2
    assert [tokenizer.decode(reply.ids).strip() for reply in replies] == [f"Yes.{ends}"] * 2
    eos = Format("plain", tokenizer).stops()
    assert not any(
        reply.ended for reply in sample_replies(model, tokenizer, prompts, max_new_tokens=40, seed=0, stops=eos)
    )


@pytest.mark.parametrize("kind", ["gemma", "plain text"])
def test_an_instruct_model_that_writes_only_its_end_of_turn(kind, tmp_path, monkeypatch):
    """Its replies end, and are what `generate` gives: in metrics, samples, evaluation, judging and export."""
    monkeypatch.chdir(tmp_path)
    run = train_dpo(load_recipe(recipe_for(tmp_path, folder_of(kind, tmp_path))))
    assert [row["eval/eos_rate"] for row in read_lines(run.metrics_file) if "eval/eos_rate" in row] == [1.0, 1.0]
    assert {row["reply"] for row in run.samples()} == {row["reference_reply"] for row in run.samples()} == {"Yes."}
    if kind == "gemma":  # its chosen replies are what it writes, end included: nothing in them surprises it
        assert run.manifest.test.perplexity < 1.001
    assert run.manifest.test.eos_rate == 1.0 and list(run.manifest.stops) == ["<eos>", *KINDS[kind][3]]
    file = evaluate([run], Options(replies=4, max_new_tokens=40))
    found = json.loads(file.read_text())
    rows = {row["measure"]: row["values"] for row in found["table"]}
    assert rows["ended by itself"]["dpo"]["mean"] == rows["ended by itself"]["base"]["mean"] == 1.0
    assert replies_beside(file) == {"Yes."}
    assert found["stops"] == list(run.manifest.stops)
    exported = export(run, tmp_path / "out", ExportOptions(dtype="float32"))
    if kind == "plain text":  # no token ends a reply, so that a request has to name the text
        assert 'stop  at "[/GONE]" too' in summarize(exported)
        assert "Stop at `'[/GONE]'` too" in (tmp_path / "out/README.md").read_text()
    else:
        assert generated(tmp_path / "out") == "Yes."
        assert "A reply ends with `<eos>` or `<end_of_turn>`." in (tmp_path / "out/README.md").read_text()


def generated(folder: Path) -> str:
    """What transformers' own `generate` gives, with nothing but what stands in the folder."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "How?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_alpacas_next_instruction_ends_a_reply_in_evaluation_as_in_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = made.chat_tokenizer(None, plain=["\n\n### Instruction:\n"])
    model = made.save_parrot(tmp_path / "model", tokenizer, "\n", "Yes.\n\n### Instruction:\n")
    run = train_dpo(load_recipe(recipe_for(tmp_path, model, "alpaca")))
    assert {(row["reply"], row["ended"]) for row in run.samples()} == {("Yes.", True)}
    file = evaluate([run], Options(replies=4, max_new_tokens=40))
    found = json.loads(file.read_text())
    assert replies_beside(file) == {"Yes."}
    assert found["stops"] == list(run.manifest.stops) == ["<eos>", "\n\n### Instruction:"]


def test_what_a_model_ends_with_by_its_own_settings_is_among_the_stops(tmp_path):
    """Of generation_config.json, or where there is none of config.json; twice the same is once."""
    folder = folder_of("gemma", tmp_path)
    recipe = load_recipe(recipe_for(tmp_path, folder))
    form = Format("chat", load_tokenizer(recipe.model))
    start = form.tokenizer.convert_tokens_to_ids("<start_of_turn>")
    assert find_stops(recipe.model, form).said == ["<eos>", "<end_of_turn>"]
    GenerationConfig(eos_token_id=[0, start, form.stops().ids[1]]).save_pretrained(folder)
    assert set(find_stops(recipe.model, form).said) == {"<eos>", "<end_of_turn>", "<start_of_turn>"}
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": start}))
    assert find_stops(recipe.model, form).said[0] == "<eos>"
    assert set(find_stops(recipe.model, form).said) == {"<eos>", "<end_of_turn>", "<start_of_turn>"}


def test_kept_replies_are_those_of_the_same_stops(tmp_path, monkeypatch):
    """A base model whose settings name another end: nothing that was sampled before is taken for its replies."""
    monkeypatch.chdir(tmp_path)
    folder = folder_of("gemma", tmp_path)
    run = train_dpo(load_recipe(recipe_for(tmp_path, folder)))
    options = Options(replies=4, max_new_tokens=40)
    assert replies_beside(evaluate([run], options)) == {"Yes."}
    dot = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(".")
    GenerationConfig(eos_token_id=[0, dot]).save_pretrained(folder)
    assert replies_beside(evaluate([run], options)) == {"Yes"}


def replies_beside(file: Path) -> set[str]:
    """The replies that were judged."""
    return {row["reply"] for row in read_lines(file.with_suffix(".replies.jsonl"))}


def test_the_doctor_looks_at_replies_before_the_template(tmp_path, monkeypatch, capsys):
    """Clean rows give no finding of level wrong, and their roles and markers are none of theirs."""
    monkeypatch.chdir(tmp_path)
    recipe = recipe_for(tmp_path, folder_of("chatml", tmp_path))
    assert main(["data", recipe, "--fail-on", "wrong", "role-words"]) == 0
    assert main(["data", recipe, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["stops"] == ["<eos>", "<|im_end|>"]
    names = {finding["name"] for finding in found["findings"] if finding["count"]}
    assert not names & {"role-words", "role-words-rejected", "role-words-prompts"}
    one_word = next(finding for finding in found["findings"] if finding["name"] == "one-word-replies")
    assert one_word["count"] == 12 and one_word["shown"][0]["chosen"] == "Yes."


def test_a_marker_in_a_row_itself_is_found_and_one_that_ends_turns_is_refused(tmp_path, monkeypatch, capsys):
    rows = [json.loads(line) for line in CASE.read_text().splitlines()]
    rows[0]["chosen"], rows[1]["chosen"] = "Yes.\nHuman: And you?", "Yes.[/GONE] And more."
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    recipe = recipe_for(tmp_path, folder_of("plain text", tmp_path), data=data)
    assert main(["data", recipe, "--json", "--fail-on", "role-words"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["dropped"] == {"the text spells the special token [/GONE]": 1}


def test_show_says_where_replies_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_for(tmp_path, folder_of("gemma", tmp_path))
    assert main(["show", recipe, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["stops"] == ["<eos>", "<end_of_turn>"] and shown["trl"]["dpo"]["max_steps"] == 1
    assert main(["show", recipe, "--json", "data.format=hh"]) == 0
    assert json.loads(capsys.readouterr().out)["stops"] == ["<eos>", "\n\nHuman:"]
    assert main(["show", recipe, "--json", f"model.name={tmp_path}"]) == 0
    assert json.loads(capsys.readouterr().out)["stops"] is None


def test_a_run_of_whole_weights_holds_what_ends_its_replies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_for(tmp_path, folder_of("chatml", tmp_path))
    run = train_dpo(load_recipe(recipe, ["model.lora=null"]))
    assert generated(run.model) == generated(Path(run.manifest.parent.run) / "model") == "Yes."
