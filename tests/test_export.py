"""Exports of real runs: what they weigh, what they answer, what their folders hold, and what is refused."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import fake_hub
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignlab.cli.commands import main
from alignlab.data.format import Dialogue, Format
from alignlab.data.transcript import Turn, split_last_turn, split_turns
from alignlab.disk import seal
from alignlab.errors import AlignlabError
from alignlab.exports import difference
from alignlab.exports.card import chosen_from, is_local
from alignlab.exports.chat import chat_template
from alignlab.exports.difference import BASE, EXACT, ROUNDING, compare
from alignlab.exports.export import ADAPTER, DEQUANTIZED, FACTS_FILE, ExportOptions, export
from alignlab.models.load import weights_hash
from alignlab.recipe.load import load_recipe
from alignlab.runs.run import Run, find_run, finished, seal_files
from alignlab.text.safe import paths_in, publishable
from alignlab.text.tables import figure
from alignlab.train.stages import train_dpo, train_sft

RECIPE = """
about: seconds on a CPU
data: {{source: toy, max_prompt_tokens: 80, max_reply_tokens: 48, toy: {{pairs: 96}}}}
model: {{name: {name}, dtype: float32, lora: {{r: 4, target_modules: all-linear}}}}
sft: {{max_steps: 4, learning_rate: 1.0e-2, logging_steps: 1, eval_steps: 4, per_device_eval_batch_size: 16}}
dpo: {{max_steps: 2, learning_rate: 1.0e-3, logging_steps: 1, eval_steps: 2, per_device_eval_batch_size: 16}}
monitor: {{kl: {{prompts: 8, max_new_tokens: 12}}}}
"""
QUESTION = "How do I grow beans?"


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    """A function: a stage, a model's name and overrides → a finished run, made once."""
    runs: dict[tuple[str, ...], Run] = {}

    def make(stage: str, name: str, *overrides: str) -> Run:
        key = (stage, name, *overrides)
        if key not in runs:
            root = tmp_path_factory.mktemp("made here")
            (root / "small.yaml").write_text(RECIPE.format(name=folders[name]))
            recipe = load_recipe(str(root / "small.yaml"), overrides)
            runs[key] = (train_sft if stage == "sft" else train_dpo)(recipe, root=root)
        return runs[key]

    return make


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    """A DPO run of a LoRA on the Llama, merged in its own float32."""
    return export(made("dpo", "llama"), tmp_path_factory.mktemp("exports") / "merged")


@pytest.fixture
def copied(made, tmp_path) -> Run:
    """A run that may be spoilt."""
    return Run(Path(shutil.copytree(made("sft", "llama").path, tmp_path / "runs" / "small" / "sft")))


# What it answers --------------------------------------------------------------


def test_a_float32_merge_is_the_adapter_on_its_base(exported, made, load):
    """The merged folder, loaded by transformers alone, against PEFT's adapter on the base: equal logits."""
    run = made("dpo", "llama")
    merged = AutoModelForCausalLM.from_pretrained(exported.path).eval()
    policy = PeftModel.from_pretrained(load("llama"), run.model).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, policy(ids).logits, atol=1e-4, rtol=1e-4)
        assert (merged(ids).logits - load("llama")(ids).logits).abs().max() > 0.1
    assert exported.difference.cause == EXACT and exported.difference.reply_most < 1e-3
    assert greedy(merged, exported.path) == greedy(policy, exported.path)


def greedy(model, folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_of_a_4bit_run_the_dequantized_base_is_exact_and_the_full_one_is_not(name, made, tmp_path):
    run = made("sft", name, "model.load_in_4bit=true")
    full = export(run, tmp_path / "full")
    dequantized = export(run, tmp_path / "dequantized", ExportOptions(base=DEQUANTIZED))
    assert dequantized.difference.cause == EXACT and dequantized.difference.reply_most < 1e-3
    assert full.difference.cause == BASE and full.difference.reply.mean > 0.1
    assert "--base dequantized" in full.notes[0] and not dequantized.notes
    for made_of in (full, dequantized):
        assert "quantization_config" not in json.loads((made_of.path / "config.json").read_text())
        assert {t.dtype for t in load_file(made_of.path / "model.safetensors").values()} == {torch.float32}


def test_rounding_to_16_bits_is_measured_and_told_apart(made, exported, tmp_path):
    """bfloat16 has 8 bits: the difference is there, and a thousand times that of the float32 export."""
    half = export(made("dpo", "llama"), tmp_path / "half", ExportOptions(dtype="bfloat16"))
    assert half.difference.cause == ROUNDING
    assert half.difference.reply.mean > 1000 * exported.difference.reply.mean
    assert {t.dtype for t in load_file(half.path / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(half.path).dtype == torch.bfloat16


def test_all_trained_weights_are_copied(made, tmp_path):
    run = made("sft", "gpt2", "model.lora=null")
    found = export(run, tmp_path / "out")
    assert found.difference.cause == EXACT and found.difference.reply_most == 0
    ours, theirs = load_file(found.path / "model.safetensors"), load_file(run.model / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    refused(run, tmp_path / "adapter", ExportOptions(form=ADAPTER), "trained all weights and has no adapter")


def test_an_adapter_is_exported_as_it_is(made, load, folders, tmp_path):
    run = made("dpo", "llama")
    found = export(run, tmp_path / "out", ExportOptions(form=ADAPTER))
    assert found.difference.reply_most == 0
    name = "adapter_model.safetensors"
    assert (found.path / name).read_bytes() == (run.model / name).read_bytes()
    loaded = AutoPeftModelForCausalLM.from_pretrained(found.path)
    assert greedy(loaded, found.path) == greedy(PeftModel.from_pretrained(load("llama"), run.model), found.path)
    assert json.loads((found.path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folders["llama"]
    )
    assert "names the base as a folder" in found.notes[0]


def test_differences_by_hand():
    """Two replies of 2 and 1 tokens, off by (+1, −3) and (+0.5): |sums| 2 and 0.5; tokens 4.5 ÷ 3."""
    run = [torch.tensor([-2.0, -1.0]), torch.tensor([-1.0])]
    exported = [torch.tensor([-1.0, -4.0]), torch.tensor([-0.5])]
    found = compare(run, exported, "test", ROUNDING)
    assert (found.reply.mean, found.reply_most, found.shift.mean) == (1.25, 2.0, -0.75)
    assert (found.token.mean, found.token_most, found.tokens, found.token.n) == (1.5, 3.0, 3, 2)
    assert not found.is_explained
    assert compare(run, run, "test", EXACT).is_explained
    assert compare(run, [torch.tensor([torch.nan, 0.0]), run[1]], "test", EXACT).reply_most == torch.inf


def test_an_export_that_answers_otherwise_is_refused_and_gone(made, tmp_path, monkeypatch):
    monkeypatch.setattr(difference, "EXACT_NATS", 0.0)
    refused(made("dpo", "llama"), tmp_path / "out", ExportOptions(), "the export answers otherwise than the run")
    assert not list(tmp_path.iterdir())


# What the folder holds --------------------------------------------------------


def test_the_folder_is_what_servers_read(exported, folders):
    config = json.loads((exported.path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["use_cache"]
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    tokenizer = AutoTokenizer.from_pretrained(exported.path)
    generation = json.loads((exported.path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] == tokenizer.eos_token_id
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    settings = json.loads((exported.path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    ours, base = (load_file(folder / "model.safetensors") for folder in (exported.path, folders["llama"]))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in base.items()}
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in exported.path.iterdir())


def test_nothing_in_the_folder_names_a_place_of_this_machine(exported, made, folders):
    run = made("dpo", "llama")
    texts = {f.name: f.read_text() for f in exported.path.iterdir() if f.suffix != ".safetensors"}
    for place in (run.path.parent.parent, folders["llama"].parent):
        assert str(place) in run.manifest_file.read_text()
        assert not [name for name, text in texts.items() if str(place) in text]


def test_the_card_says_what_the_run_measured(exported, made):
    run = made("dpo", "llama")
    card = (exported.path / "README.md").read_text()
    test, parent = run.manifest.test, run.manifest.parent
    assert f"| margin | – | – | {figure(test.margin)} |" in card
    assert f"`sft`, weights `{parent.weights}`" in card and run.manifest.data.fingerprint in card
    assert "learning_rate: 0.001" in card and f"trl {run.manifest.versions['trl']}" in card
    head = yaml.safe_load(card.split("---")[1])
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["alignlab", "trl", "dpo", "lora"],
    }
    assert json.loads((exported.path / FACTS_FILE).read_text())["difference_nats"]["tokens"] > 0


def test_the_front_matter_names_what_is_on_the_hub(copied, folders, tmp_path):
    """A run of a hub's base and data, whose base lies in a folder here: the ids stand in the card and the adapter."""
    on_hub(copied, folders)
    recipe = copied.recipe_file.read_text().replace("path: null", "path: Anthropic/hh-rlhf", 1)
    copied.recipe_file.write_text(recipe.replace("source: toy", "source: hh-rlhf", 1))
    seal_files(copied)
    found = export(copied, tmp_path / "out", ExportOptions(form=ADAPTER, model=str(folders["llama"])))
    head = yaml.safe_load((found.path / "README.md").read_text().split("---")[1])
    assert head["base_model"] == "someone/a-llama" and head["base_model_relation"] == "adapter"
    assert head["datasets"] == ["Anthropic/hh-rlhf"] and head["library_name"] == "peft"
    config = json.loads((found.path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/a-llama", "abc123")
    assert not any("names the base as a folder" in note for note in found.notes)


def on_hub(run: Run, folders) -> None:
    """Makes a run say that its base is on the hub."""
    file = run.model / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "someone/a-llama"}))
    run.recipe_file.write_text(run.recipe_file.read_text().replace(str(folders["llama"]), "someone/a-llama"))
    run.note(base={"name": "someone/a-llama", "revision": "abc123"})
    seal(run.model)
    seal_files(run)


def test_the_card_counts_only_the_members_that_were_trained(tmp_path):
    """Chosen of four, of which three are missing: a sweep of one."""
    members = [{"run": f"dpo-beta0.{i}", "settings": {"dpo.beta": i / 10}, "status": "missing"} for i in range(1, 5)]
    members[0]["status"] = "finished"
    sweep = {"members": members, "choice": "dpo-beta0.1", "rule": "largest margin"}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    assert chosen_from(Run(tmp_path / "dpo-beta0.1")) == (
        "Chosen from a sweep of 1 (beta 0.1) as the largest margin. Asked for, and not finished when it was chosen: "
        "beta 0.2, beta 0.3, beta 0.4."
    )
    assert chosen_from(Run(tmp_path / "dpo-beta0.2")) is None


def test_the_example_on_the_card_runs(exported, monkeypatch, capsys):
    monkeypatch.chdir(exported.path.parent)
    code = re.findall(r"```python\n(.*?)```", (exported.path / "README.md").read_text(), re.DOTALL)
    exec(code[0], {})
    assert capsys.readouterr().out.strip()
    tokenizer = AutoTokenizer.from_pretrained(exported.path)
    messages = [{"role": "user", "content": "How do I keep a pot of basil alive?"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert eval(code[1]) == rendered


@pytest.mark.parametrize(
    "text, published",
    [
        ("a frozen copy (/home/ann/runs/tiny/sft/model)", "a frozen copy (model)"),
        ("path: '/data/my rows.jsonl'", "path: 'my rows.jsonl'"),
        ("~/models/llama and file:///srv/x/y", "llama and y"),
        (
            "https://huggingface.co/a/b, runs/tiny/sft, and/or/not",
            "https://huggingface.co/a/b, runs/tiny/sft, and/or/not",
        ),
        ("[/INST] </s> 1/2/3", "[/INST] </s> 1/2/3"),
    ],
)
def test_a_path_is_published_as_its_last_part(text, published):
    assert publishable(text, ["/data/my rows.jsonl"]) == published


def test_paths_are_found_wherever_they_stand():
    assert paths_in({"a": ["/x y/z", {"b": "~/m/"}], "c": "dpo", "d": "/"}) == {"/x y/z", "~/m"}


def test_local_is_what_is_here_or_cannot_be_on_the_hub(tmp_path):
    assert all(map(is_local, [str(tmp_path), "/gone/away", "../x", "rows.jsonl", "a/b/c"]))
    assert not any(map(is_local, ["mistralai/Mistral-7B-v0.1", "gpt2", "Anthropic/hh-rlhf"]))


# Chat templates ---------------------------------------------------------------

TURNS = [Turn("Human", " Hi"), Turn("Assistant", " Hello. "), Turn("Human", " How\n\nare you?")]


def chat_ids(tokenizer, messages) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def messages_of(turns: list[Turn], system: str | None = None) -> list[dict[str, str]]:
    roles = {"Human": "user", "Assistant": "assistant"}
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": roles[turn.role], "content": turn.text.removeprefix(" ")} for turn in turns]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", ["hh", "alpaca"])
@pytest.mark.parametrize("which", ["gpt2", "llama2", "mistral"])
def test_the_template_gives_the_token_ids_of_training(name, which, system, shared):
    """With the BOS of Llama and Mistral, which a chat front end does not add to what a template renders."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / which)
    form = Format(name, tokenizer)
    tokenizer.chat_template = chat_template(form)
    assert chat_ids(tokenizer, messages_of(TURNS, system)) == form.prompt_ids(Dialogue(TURNS, system))


def test_real_dialogues_read_as_in_training(shared):
    """Of 300 HH prompts all but those with a turn that begins with two spaces, one of which messages cannot keep."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2")
    form = Format("hh", tokenizer)
    tokenizer.chat_template = chat_template(form)
    with gzip.open(shared / "data" / "hh-rlhf" / "helpful-base.test.jsonl.gz") as lines:
        prompts = [split_last_turn(json.loads(line)["chosen"])[0] for line, _ in zip(lines, range(300), strict=False)]
    odd = 0
    for prompt in prompts:
        turns = split_turns(prompt)[:-1]
        if all(turn.text[:1] == " " and turn.text[1:2] != " " for turn in turns):
            assert chat_ids(tokenizer, messages_of(turns)) == form.encode([prompt])[0]
        else:
            odd += 1
    assert odd < 10


def test_a_reply_with_its_leading_space_is_the_same_turn(tokenizer):
    form = Format("hh", tokenizer)
    with_space = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello."}]
    without = [with_space[0], {"role": "assistant", "content": "Hello."}]
    render = lambda m: tokenizer.apply_chat_template(m, chat_template=chat_template(form), tokenize=False)
    assert render(with_space) == render(without) == "\n\nHuman: Hi\n\nAssistant: Hello."


def test_a_chat_template_gets_the_bos_that_training_had(shared):
    """Zephyr's writes none, and the tokenizer put one before it in training; a template that writes its own is kept."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "mistral")
    zephyr = (Path(__file__).parents[1] / "recipes" / "zephyr.jinja").read_text()
    form = Format("chat", tokenizer, zephyr)
    tokenizer.chat_template = chat_template(form)
    ids = chat_ids(tokenizer, messages_of(TURNS, "Be brief."))
    assert ids == form.prompt_ids(Dialogue(TURNS, "Be brief.")) and ids.count(tokenizer.bos_token_id) == 1
    assert chat_template(Format("chat", tokenizer)) == tokenizer.chat_template


def test_plain_text_has_no_template(tokenizer):
    assert chat_template(Format("plain", tokenizer)) is None


# What is refused --------------------------------------------------------------


def refused(run: Run, to: Path, wish: ExportOptions, why: str) -> None:
    with pytest.raises(AlignlabError, match=re.escape(why)) as found:
        export(run, to, wish)
    assert "\n" not in str(found.value)
    assert not to.exists() or not (to / "README.md").exists()


def test_a_base_that_is_gone_is_one_line(copied, folders, tmp_path):
    file = copied.model / "adapter_config.json"
    file.write_text(file.read_text().replace(str(folders["llama"]), "/nowhere/llama"))
    seal(copied.model)
    copied.note(base={"name": "/nowhere/llama", "weights": copied.manifest.base.weights})
    refused(copied, tmp_path / "out", ExportOptions(), "is gone: there is no folder /nowhere/llama")
    assert export(copied, tmp_path / "out", ExportOptions(model=str(folders["llama"]))).difference.reply_most < 1e-3


def test_a_base_that_the_hub_does_not_give_is_one_line(copied, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    on_hub(copied, folders)
    refused(copied, tmp_path / "out", ExportOptions(), "someone/a-llama is neither a folder nor on this machine")


def test_another_base_than_that_of_training_is_refused(copied, folders, tmp_path):
    refused(copied, tmp_path / "out", ExportOptions(model=str(folders["mistral"])), "its weights differ")


def test_a_full_model_that_training_started_from_is_known_by_its_weights_too(copied, folders, tmp_path):
    """As under `model.start`: what the adapter stands on is the start, and the recipe's own base is another."""
    whole = weights_hash(folders["llama"])
    copied.note(base={"name": "a-base", "revision": None}, parent={"start": str(folders["llama"]), "weights": whole})
    assert export(copied, tmp_path / "out", ExportOptions()).difference.reply_most < 1e-3
    copied.note(parent={"start": str(folders["llama"]), "weights": "of another time"})
    refused(copied, tmp_path / "again", ExportOptions(), "its weights differ")


def test_without_held_out_replies_nothing_is_written(copied, tmp_path):
    copied.samples_file.unlink()
    refused(copied, tmp_path / "out", ExportOptions(), "holds no held-out replies")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_a_folder_in_use_is_left_alone(made, exported, tmp_path):
    run = made("dpo", "llama")
    (tmp_path / "notes.txt").write_text("mine")
    for force in (False, True):
        refused(run, tmp_path, ExportOptions(force=force), "is there and is no export")
    with pytest.raises(AlignlabError, match="holds an export already"):
        export(run, exported.path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_force_replaces_an_export(made, tmp_path):
    run = made("sft", "llama")
    export(run, tmp_path / "out", ExportOptions(form=ADAPTER))
    export(run, tmp_path / "out", ExportOptions(force=True))
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "out" / "adapter_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_not_trained_in_4bit_has_no_dequantized_base(made, tmp_path):
    refused(made("sft", "llama"), tmp_path / "out", ExportOptions(base=DEQUANTIZED), "was not trained on a 4-bit base")


def test_an_adapter_on_a_folder_is_not_pushed(made, tmp_path):
    wish = ExportOptions(form=ADAPTER, repository="me/x")
    refused(made("sft", "llama"), tmp_path / "out", wish, "which nobody else can load")


def test_the_run_is_found_by_recipe_name_and_choice(copied, monkeypatch):
    root = copied.path.parent.parent.parent
    monkeypatch.chdir(root)
    assert find_run("small", "sft").path == Path("runs/small/sft")
    assert find_run("runs/small/sft").path == find_run("small").path == Path("runs/small/sft")
    with pytest.raises(AlignlabError, match=r"there is no run at runs/small/dpo \(there: sft\)"):
        find_run("small", "dpo")
    with pytest.raises(AlignlabError, match=r"there is no runs/small/sweep\.json with a best run"):
        find_run("small", best=True)
    sweep = {"recipe": "small", "rule": "best", "choice": "sft", "why": "so", "members": []}
    Path("runs/small/sweep.json").write_text(json.dumps(sweep))
    assert find_run("small", best=True).path.name == "sft"
    Path("runs/small/sweep.json").write_text(json.dumps({**sweep, "choice": None, "why": "all above the limit"}))
    with pytest.raises(AlignlabError, match="has chosen no member: all above the limit"):
        find_run("small", best=True)
    copied.note(status="running")
    with pytest.raises(AlignlabError, match=r"is not finished \(it is running\); `.*` goes on from there"):
        finished(find_run("small", "sft"))


# The hub ----------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on loopback, and no token of whoever runs the tests."""
    import huggingface_hub.constants as constants

    with fake_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "")
        yield found


def test_a_push_uploads_the_folder_private(copied, hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert main(["export", str(copied.path), "--to", str(tmp_path / "out"), "--push", "me/small"]) == 0
    assert f"{hub.url}/me/small" in capsys.readouterr().out
    assert hub.private == {"me/small": True}
    assert hub.files["me/small"] == {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    assert 'from_pretrained("me/small"' in hub.files["me/small"]["README.md"].decode()


@pytest.mark.parametrize(
    "token, said", [("", "needs a hub token"), ("hf_bad", "the hub refuses this token for me/small (401)")]
)
def test_a_push_without_a_good_token_is_one_line_before_any_work(token, said, hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["export", "small", "--to", str(tmp_path / "out"), "--push", "me/small"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not hub.files


def test_what_is_public_is_not_pushed_to_unasked(hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    hub.private["me/open"] = False
    assert main(["export", "small", "--to", str(tmp_path / "out"), "--push", "me/open"]) == 2
    assert "me/open is there already and public; add --public" in capsys.readouterr().err


def test_no_hub_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert main(["export", "small", "--to", str(tmp_path / "out"), "--push", "me/small"]) == 2
    assert "the hub cannot be reached" in capsys.readouterr().err
    assert main(["export", "small", "--to", str(tmp_path / "out"), "--push", "small"]) == 2
    assert "write USER/NAME" in capsys.readouterr().err
