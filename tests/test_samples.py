"""Replies at an evaluation: whose they are, and a KL that is one, with an error that is honest."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import statistics
from pathlib import Path

import pytest
import torch

from alignlab.data.format import Format, Stops
from alignlab.measure.formulas import kl_per_reply, token_logps
from alignlab.measure.generate import reply_logits, sample_replies
from alignlab.runs.run import Run
from alignlab.text.estimate import mean_estimate
from alignlab.train import samples as sampling
from alignlab.train.samples import HeldOutPrompts, Samples
from alignlab.train.store import ReferenceIdentity, clear_store, list_store

TEXTS = ["\n\nHuman: Hello!\n\nAssistant:", "a", "\n\nHuman: How do I grow beans?\n\nAssistant:"]


@pytest.fixture
def prompts(tokenizer) -> HeldOutPrompts:
    return HeldOutPrompts(
        "validation",
        TEXTS,
        tokenizer(TEXTS)["input_ids"],
        max_new_tokens=10,
        stops=Format("hh", tokenizer).stops(),
        batch_size=8,
        seed=5,
    )


@pytest.fixture
def samples(prompts, tokenizer, tmp_path) -> Samples:
    return Samples(Run(tmp_path), tokenizer, prompts)


def as_reference(model):
    """A context in which `model` answers as the reference."""

    @contextlib.contextmanager
    def context():
        yield model

    return context


def test_kl_of_a_policy_that_is_the_reference_is_exactly_zero(samples, load):
    model = load("llama")
    metrics = samples.measure(model, 0, as_reference(model))
    assert (metrics["eval_kl"], metrics["eval_kl_stderr"], metrics["eval_kl_per_token"]) == (0.0, 0.0, 0.0)
    assert [row["kl"] for row in samples.run.samples()] == [0.0] * 3
    assert all(row["reply"] == row["reference_reply"] for row in samples.run.samples())


def test_kl_is_measured_on_replies_of_the_policy(samples, prompts, load, tokenizer):
    policy, reference = load("llama"), load("mistral")
    metrics = samples.measure(policy, 7, as_reference(reference))
    replies = sample_replies(
        policy, tokenizer, prompts.ids, max_new_tokens=10, seed=5, batch_size=8, stops=prompts.stops
    )
    kl = []
    with torch.no_grad():
        for prompt, reply in zip(prompts.ids, replies, strict=True):
            ours, _, mask = reply_logits(policy, [prompt], [reply.ids], 0)
            theirs, _, _ = reply_logits(reference, [prompt], [reply.ids], 0)
            kl.append(kl_per_reply(ours, theirs, mask).item())
    assert metrics["eval_kl"] == pytest.approx(statistics.mean(kl), rel=1e-4) and metrics["eval_kl"] > 1
    assert metrics["eval_kl_stderr"] == pytest.approx(statistics.stdev(kl) / 3**0.5, rel=1e-3)
    tokens = [len(reply.ids) for reply in replies]
    assert metrics["eval_kl_per_token"] == pytest.approx(sum(kl) / sum(tokens), rel=1e-4)
    assert metrics["eval_reply_tokens"] == pytest.approx(statistics.mean(tokens))
    assert metrics["eval_eos_rate"] == pytest.approx(statistics.mean(reply.ended for reply in replies))


def test_samples_are_written_with_both_replies_a_prompt(samples, prompts, load, tokenizer):
    policy, reference = load("llama"), load("gpt2")
    samples.measure(policy, 7, as_reference(reference))
    rows = samples.run.samples()
    ours, theirs = (
        sample_replies(model, tokenizer, prompts.ids, max_new_tokens=10, seed=5, batch_size=8, stops=prompts.stops)
        for model in (policy, reference)
    )
    assert [(row["step"], row["split"], row["prompt"]) for row in rows] == [(7, "validation", text) for text in TEXTS]
    assert [row["reply"] for row in rows] == [reply.text for reply in ours]
    assert [row["reference_reply"] for row in rows] == [reply.text for reply in theirs]
    assert [(row["tokens"], row["ended"]) for row in rows] == [(len(reply.ids), reply.ended) for reply in ours]


def test_samples_do_not_depend_on_what_was_drawn_before(samples, load):
    model = load("llama").train()
    first = samples.measure(model, 0, as_reference(load("mistral")))
    torch.rand(11)
    assert samples.measure(model, 1, as_reference(load("mistral"))) == first
    assert model.training
    before, after = samples.run.samples()[:3], samples.run.samples()[3:]
    assert [row | {"step": 1} for row in before] == after


def test_without_a_reference_there_is_no_kl(samples, load):
    metrics = samples.measure(load("llama"), 0, None)
    assert not any("kl" in name for name in metrics) and metrics["eval_reply_tokens"] > 0
    assert set(samples.run.samples()[0]) == {"step", "split", "prompt", "reply", "tokens", "ended"}


def test_shares_of_several_processes_are_together_what_one_process_draws(tokenizer, tmp_path, load):
    """Twenty prompts are three batches: two processes draw two and one of them, each with the batch's own seed."""
    ids, stops = tokenizer([f"\n\nHuman: {n}\n\nAssistant:" for n in range(20)])["input_ids"], Stops((0,), ("<eos>",))
    prompts = HeldOutPrompts(
        "validation",
        [str(n) for n in range(20)],
        ids,
        max_new_tokens=5,
        stops=stops,
        batch_size=8,
        seed=3,
    )
    policy, reference = load("llama"), as_reference(load("mistral"))
    whole = Samples(Run(tmp_path), tokenizer, prompts)._answers(policy, reference)
    shares = [Samples(Run(tmp_path), tokenizer, prompts, (rank, 2)) for rank in (0, 1)]
    batches = {n: shares[n % 2]._batch(policy, n, range(8 * n, min(8 * n + 8, 20)), reference) for n in range(3)}
    assert [answer for n in range(3) for answer in batches[n]] == whole


# --- the reference's replies, drawn once ---

MISTRAL = ReferenceIdentity("a random Mistral", {"weights": "of the fixture"})


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """Where this test's store is."""
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture
def drawn_by(monkeypatch) -> list:
    """The models that have drawn a batch of replies, in order."""
    asked = []
    monkeypatch.setattr(sampling, "sample_replies", lambda m, *a, **k: (asked.append(m), sample_replies(m, *a, **k))[1])
    return asked


@pytest.fixture
def sampled(prompts, tokenizer, tmp_path, load):
    """A function: what a run of its own writes, step by step, about a policy (a Llama) beside its reference."""
    policy, reference = load("llama"), load("mistral")

    def rows(steps=(3,), policy=policy, identity=MISTRAL, shared_by=(0, 1), **changed) -> list[dict]:
        asked = dataclasses.replace(prompts, **changed)
        run = Run(tmp_path / f"run{len(list(tmp_path.glob('run*')))}")
        run.path.mkdir()
        samples = Samples(run, tokenizer, asked, shared_by, identity)
        for step in steps:
            samples.measure(policy, step, as_reference(reference))
        return run.samples()

    rows.policy, rows.reference = policy, reference
    return rows


def test_another_run_finds_the_references_replies_in_the_store(sampled, store, drawn_by):
    """Two batches: the first run draws two of the policy's and two of the reference's, the second the policy's only."""
    without = sampled(identity=None, batch_size=2)
    drawn_by.clear()
    first = sampled(batch_size=2)
    assert [drawn_by.count(model) for model in (sampled.policy, sampled.reference)] == [2, 2]
    drawn_by.clear()
    second = sampled(batch_size=2)
    assert [drawn_by.count(model) for model in (sampled.policy, sampled.reference)] == [2, 0]
    assert first == second == without
    assert len(list(store.glob("*.replies"))) == 2


def test_before_the_first_step_the_policys_replies_are_the_stored_ones(sampled, store, drawn_by):
    """Nothing is drawn, and the KL is computed all the same: a policy that is not the reference draws its own."""
    equal = sampled((0,), policy=sampled.reference)
    drawn_by.clear()
    again = sampled((0,), policy=sampled.reference)
    assert again == equal and not drawn_by
    assert [row["kl"] for row in again] == [0.0] * 3 and all(row["reply"] == row["reference_reply"] for row in again)
    other = sampled((0,))
    assert drawn_by == [sampled.policy] and min(row["kl"] for row in other) > 0
    assert other == sampled((0,), identity=None)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6},
        {"max_new_tokens": 9},
        {"batch_size": 4},
        {"stops": Stops((0,), ("<eos>",), ("\n",))},
        {"texts": TEXTS[:2], "ids": [[5, 6], [7]]},
        {"identity": ReferenceIdentity("another", {"weights": "others"})},
    ],
)
def test_replies_asked_for_in_another_way_are_other_replies(change, sampled, store, drawn_by):
    sampled()
    drawn_by.clear()
    assert sampled(**change) == sampled(**{**change, "identity": None})
    assert drawn_by.count(sampled.reference) == 2


@pytest.mark.parametrize("change", ["pad_token", "eos_token"])
def test_another_tokenizer_draws_anew(change, sampled, store, drawn_by, prompts, tokenizer, tmp_path):
    import copy

    sampled()
    other = copy.deepcopy(tokenizer)
    setattr(other, change, "a")
    drawn_by.clear()
    Samples(Run(tmp_path), other, prompts, identity=MISTRAL).measure(sampled.policy, 3, as_reference(sampled.reference))
    assert drawn_by.count(sampled.reference) == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "about another reference"])
def test_a_damaged_file_of_replies_is_said_and_drawn_again(damage, sampled, store, drawn_by, caplog):
    before = sampled()
    (file,) = store.glob("*.replies")
    whole = file.read_bytes()
    head, _, body = whole.partition(b"\n")
    facts = json.dumps({**json.loads(head), "facts": {}}).encode()
    changed = body.replace(b'"ended": false', b'"ended": true ', 1)
    assert changed != body
    file.write_bytes(
        {
            "cut": whole[:-9],
            "changed": head + b"\n" + changed,
            "emptied": b"",
            "about another reference": facts + b"\n" + body,
        }[damage]
    )
    drawn_by.clear()
    assert sampled() == before
    assert drawn_by.count(sampled.reference) == 1
    assert f"{file} is {'about' if 'about' in damage else 'damaged'}" in caplog.text
    assert "drawing its replies again" in caplog.text
    assert file.read_bytes() == whole


def test_each_process_stores_the_batches_it_draws(sampled, store, drawn_by, monkeypatch):
    """Batches of one: of three, process 0 of two draws the first and the last; one process then finds all three."""
    monkeypatch.setattr(sampling, "gather_object", lambda mine: mine)
    for rank in (0, 1):
        with contextlib.suppress(ValueError):  # what is written needs the other's share
            sampled(shared_by=(rank, 2), batch_size=1)
    assert len(list(store.glob("*.replies"))) == 3
    drawn_by.clear()
    assert sampled(batch_size=1) == sampled(batch_size=1, identity=None)
    assert drawn_by.count(sampled.reference) == 3  # by the run without a store


def test_a_store_that_cannot_be_written_costs_a_line(sampled, store, caplog):
    store.parent.mkdir()
    store.write_text("a file where the folder should be")
    assert sampled() == sampled(identity=None)
    assert "cannot store replies in" in caplog.messages[-1]


def test_the_store_lists_and_clears_replies(sampled, store):
    sampled()
    sampled(seed=6)
    (row,) = list_store()
    assert (row.reference, row.pairs) == ("a random Mistral, and 6 replies it drew", 0)
    assert row.bytes == sum(file.stat().st_size for file in store.iterdir())
    assert clear_store() == row.bytes and not list_store()


# --- the estimator, against enumeration ---


@pytest.fixture(scope="module")
def drawn():
    """64,000 replies of a policy whose 400 possible replies can be enumerated: the exact KL, each one's KL, log-ratio.

    The words are a to f, a colon and <eos>; of at most three tokens, 1 + 7 + 49 replies end and 343 are cut.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["<eos>", *"abcdef:"])}, unk_token="a"))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>", pad_token="<eos>")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    policy, reference = (random_model(LlamaForCausalLM, LlamaConfig(**shape, vocab_size=8), seed) for seed in (1, 2))
    prompt = [1, 2, 3]
    ended = [(*body, 0) for length in range(3) for body in itertools.product(range(1, 8), repeat=length)]
    every = ended + list(itertools.product(range(1, 8), repeat=3))
    ours, theirs = (reply_figures(policy, reference, prompt, every))[:2]
    assert ours.exp().sum().item() == pytest.approx(1, abs=1e-5)  # these are all the replies there are
    exact = (ours.exp() * (ours - theirs)).sum().item()
    how = {"max_new_tokens": 3, "seed": 0, "batch_size": 2000, "stops": Format("plain", tokenizer).stops()}
    replies = sample_replies(policy, tokenizer, [prompt] * 64_000, **how)
    ours, theirs, kl = reply_figures(policy, reference, prompt, [reply.ids for reply in replies])
    return exact, kl.reshape(1000, 64), (ours - theirs).reshape(1000, 64)


def random_model(kind, config, seed):
    torch.manual_seed(seed)
    return kind(config).eval().apply(lambda m: m.weight.data.mul_(6) if isinstance(m, torch.nn.Linear) else None)


@torch.no_grad()
def reply_figures(policy, reference, prompt, replies):
    """log π, log π_ref and the summed next-token KL of each reply."""
    ours, ids, mask = reply_logits(policy, [prompt] * len(replies), replies, 0)
    theirs, _, _ = reply_logits(reference, [prompt] * len(replies), replies, 0)
    logps = ((token_logps(logits, ids) * mask).sum(-1).double() for logits in (ours, theirs))
    return (*logps, kl_per_reply(ours, theirs, mask).double())


def test_sampled_kl_is_the_enumerated_kl_within_one_percent(drawn):
    exact, kl, _ = drawn
    print(f"\nKL {kl.mean().item():.4f} nats sampled, {exact:.4f} enumerated")
    assert kl.mean().item() == pytest.approx(exact, rel=0.01)


def test_the_standard_error_covers_as_it_says(drawn):
    """Of 1,000 estimates from 64 replies, 95 % ± 2 are within Student's 1.998 standard errors of the enumerated KL."""
    exact, kl, _ = drawn
    found = [mean_estimate(row) for row in kl]
    covered = sum(abs(e.mean - exact) <= 1.998 * e.stderr for e in found) / len(found)
    print(f"\ncoverage {covered:.3f} of {len(found)}")
    assert 0.93 <= covered <= 0.97


def test_the_standard_error_is_at_most_six_tenths_of_the_log_ratios(drawn):
    _, kl, log_ratio = drawn
    share = statistics.median(
        mean_estimate(a).stderr / mean_estimate(b).stderr for a, b in zip(kl, log_ratio, strict=True)
    )
    print(f"\nstandard error {share:.2f} of the plain log-ratio estimator's")
    assert share <= 0.6
