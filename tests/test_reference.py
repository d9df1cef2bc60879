"""The reference store: numbers that depend on nothing but reference and pair, and files that can be relied on."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import resource
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from alignlab.data import toy
from alignlab.errors import MachineError, ModelError
from alignlab.measure.heldout import score_pairs
from alignlab.models import load as models
from alignlab.recipe.load import ModelSection, ToySection
from alignlab.train import reference, store
from alignlab.train.reference import complete, identify_reference, look_up, pairs_scored_online, worth_storing
from alignlab.train.store import ReferenceIdentity, clear_store, list_store, pair_keys
from alignlab.train.trainers import AlignDPOTrainer

COLUMNS = ["ref_chosen_logps", "ref_rejected_logps"]
ANY = ReferenceIdentity("a reference made up", {"weights": "of no model"})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where this test's store is."""
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture(scope="module")
def pairs(tokenizer) -> Dataset:
    """40 pairs of 40 to 100 tokens, all different."""
    rows, seen = [], set()
    for row in toy.rows(ToySection(pairs=200)):
        prompt, _, chosen = row["chosen"].rpartition("\n\nAssistant:")
        texts = (prompt + "\n\nAssistant:", chosen, row["rejected"].rpartition("\n\nAssistant:")[2])
        ids = [tokenizer(text)["input_ids"] for text in texts]
        if texts not in seen:
            seen.add(texts)
            end = [tokenizer.eos_token_id]
            rows.append({"prompt_ids": ids[0], "chosen_ids": ids[1] + end, "rejected_ids": ids[2] + end})
    assert len(rows) >= 40
    return Dataset.from_list(rows[:40])


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory) -> list[Path]:
    """Two adapters of the Llama, which answer unlike it and unlike each other."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype="float32")
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        made.append(tmp_path_factory.mktemp("adapter"))
        get_peft_model(base, config).save_pretrained(made[-1])
    return made


@pytest.fixture
def section(folders):
    defaults = {"name": str(folders["llama"]), "dtype": "float32", "lora": {"r": 4}}
    return lambda **given: ModelSection(**{**defaults, **given})


@pytest.fixture
def build(folders, adapters, pairs, tokenizer, tmp_path):
    """`build()` is a trainer whose policy continues the first adapter, with a frozen copy of it as reference."""

    def trainer(rows: Dataset = pairs, adapter: Path | None = None, **options) -> AlignDPOTrainer:
        base = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype="float32")
        policy = PeftModel.from_pretrained(base, adapter or adapters[0], is_trainable=True)
        options = {"output_dir": str(tmp_path / "run"), "bf16": False, "per_device_train_batch_size": 8} | options
        fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "gradient_checkpointing": False}
        args = DPOConfig(max_length=512, logging_steps=1, save_strategy="no", **fixed, **options)
        return AlignDPOTrainer(policy, None, args, train_dataset=rows, processing_class=tokenizer)

    return trainer


def by(trainer: AlignDPOTrainer):
    """The reference of a trainer, one pair at a time."""

    def compute(pair):
        trainer.model.eval()
        inputs = trainer._prepare_inputs(trainer.data_collator([pair]))
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs)
        return chosen.item(), rejected.item()

    return compute


def in_batches(trainer: AlignDPOTrainer, pairs: Dataset) -> np.ndarray:
    """What the reference says online, of 8 pairs at a time."""
    trainer.model.eval()
    batches = [trainer.data_collator([*pairs.select(range(i, i + 8))]) for i in range(0, len(pairs), 8)]
    online = [trainer.compute_ref_log_probs(trainer.model, batch) for batch in batches]
    return np.array([torch.cat(side).tolist() for side in zip(*online, strict=True)])


def by_hash(pair) -> tuple[float, float]:
    """A reference in no time: numbers that are the pair's own."""
    of = lambda reply: -float(xxhash.xxh32_intdigest(str((pair["prompt_ids"], pair[reply])).encode()))
    return of("chosen_ids"), of("rejected_ids")


def nobody(pair):
    raise AssertionError("no pair should be computed")


def fill(pairs: Dataset, identity=ANY, compute=by_hash):
    filled, receipt = complete(look_up(identity, {"train": pairs}), compute)
    return filled["train"], receipt


def numbers(pairs: Dataset) -> np.ndarray:
    return np.array([pairs[name] for name in COLUMNS], np.float32)


# Numbers ----------------------------------------------------------------------


def test_numbers_are_those_of_the_reference_online(build, pairs):
    """In float32, in batches of 8 as TRL would make them: within 1e-5 of their size, which is hundreds of nats."""
    trainer = build()
    filled, receipt = fill(pairs, compute=by(trainer))
    stored = numbers(filled)
    np.testing.assert_allclose(stored, in_batches(trainer, pairs), rtol=1e-5)
    assert (receipt.pairs, receipt.hits) == (40, 0)
    assert np.abs(stored).min() > 10


@pytest.mark.parametrize("sharing", ["auto", False])
@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.5}])
def test_scoring_gives_the_bits_of_trls_own(options, sharing, build, pairs):
    """The reference is put in place once for all pairs, where TRL does it for each."""
    trainer = build(**options)
    trainer.share_prefixes(sharing)
    few = pairs.select(range(6))
    with trainer.scoring_reference() as score:
        found = [score(pair) for pair in few]
    assert found == [by(trainer)(pair) for pair in few]
    assert trainer.model.active_adapter == "default"


@pytest.mark.parametrize("size", [8, 3])
def test_pairs_scored_with_shared_prompts_are_those_scored_plainly(size, build, pairs, tokenizer):
    """Policy and reference, each pair in its place whatever the batch: within 1e-4 nats of `heldout.score_pairs`."""
    trainer = build(per_device_eval_batch_size=size)
    assert trainer.share_prefixes(True)
    with torch.no_grad():  # a policy that is not the reference
        for name, weight in trainer.model.named_parameters():
            if ".lora_B.default." in name:
                weight += 0.02
    trainer.model.train()
    policy = trainer.score_pairs(trainer.model, pairs)
    assert trainer.model.training
    with trainer.as_reference() as reference_model:
        reference_logps = trainer.score_pairs(reference_model, pairs)
        plain_reference = score_pairs(reference_model, pairs, tokenizer.pad_token_id)
    plain = score_pairs(trainer.model, pairs, tokenizer.pad_token_id)
    for found, expected in ((policy, plain), (reference_logps, plain_reference)):
        for name in ("chosen_N", "rejected_N", "chosen_tokens_N"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-4)
    assert (policy.chosen_N - reference_logps.chosen_N).abs().min() > 0.01


def test_bfloat16_differs_from_batches_by_no_more_than_from_float32(build, pairs, capsys):
    """What a pair's company in the batch does to its numbers is rounding, and no more than other rounding."""
    trainer = build()
    exact = numbers(fill(pairs, compute=by(trainer))[0])
    with torch.autocast("cpu", torch.bfloat16):
        stored = numbers(fill(pairs, dataclasses.replace(ANY, facts={"dtype": "bfloat16"}), by(trainer))[0])
        online = in_batches(trainer, pairs)
    company, rounding, online_rounding = (np.abs(x).mean() for x in (stored - online, stored - exact, online - exact))
    nats = np.abs(exact).mean()
    with capsys.disabled():
        print(f"\nbfloat16, of {nats:.0f} nats a reply: stored from online {company:.2g}, ", end="")
        print(f"stored from float32 {rounding:.2f}, online from float32 {online_rounding:.2f}")
    assert company < online_rounding and rounding < 1.2 * online_rounding < 0.01 * nats


def test_numbers_are_the_same_whichever_run_filled_the_store(build, pairs, folder):
    """All at once; or a part in another order, then the rest: the same bits."""
    compute = by(build())
    at_once = numbers(fill(pairs, compute=compute)[0])
    clear_store()
    fill(pairs.select([31, 2, 17, 5]), compute=compute)
    in_parts, receipt = fill(pairs, compute=compute)
    assert receipt.hits == 4
    assert (numbers(in_parts) == at_once).all()


def test_each_pair_gets_its_own_numbers(pairs):
    """Whatever the order, the split, and pairs that stand there twice."""
    fill(pairs.select(range(20)))
    shuffled = pairs.shuffle(seed=3)
    twice = Dataset.from_list([*pairs.select([0, 0, 39])])
    filled, receipt = complete(look_up(ANY, {"train": shuffled, "validation": twice}), by_hash)
    for name in filled:
        assert numbers(filled[name]).T.tolist() == [list(np.float32(by_hash(pair))) for pair in filled[name]]
    assert (receipt.pairs, receipt.hits) == (43, 22)
    assert filled["train"]["prompt_ids"] == shuffled["prompt_ids"]


def test_training_with_the_columns_gives_the_same_losses(build, pairs):
    without = build(max_steps=4, learning_rate=1e-3)
    without.train()
    filled, _ = fill(pairs, compute=by(build()))
    trainer = build(filled, max_steps=4, learning_rate=1e-3, output_dir="elsewhere")
    trainer.precompute_ref_logps = True
    trainer.compute_ref_log_probs = nobody
    trainer.train()
    losses = [[row["loss"] for row in one.state.log_history if "loss" in row] for one in (without, trainer)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[0][0] == pytest.approx(0.693147, abs=1e-5) and min(losses[0]) < 0.67


def test_a_reference_that_answers_nan_is_not_stored(pairs, folder):
    with pytest.raises(ModelError, match=r"pair \d+ of train the log-probabilities nan"):
        fill(pairs, compute=lambda pair: (float("nan"), 0.0))
    assert not list_store()


# What is found again ----------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"beta": 0.5}, {"learning_rate": 1e-7}, {"output_dir": "another"}, {"max_steps": 7}, {"seed": 9}]
)
def test_another_run_of_the_same_reference_computes_nothing(change, build, pairs, section, adapters, folder):
    """The store knows no training setting, so it is enough that a run asks with the same weights and pairs."""
    identity = identify_reference(section(), models.Start(section().name, str(adapters[0]), "it"))
    trainer = build(**change)
    fill(pairs, identity)
    again = identify_reference(
        section(), models.Start(section().name, str(adapters[0]), "it"), ld_alpha=trainer.ld_alpha
    )
    filled, receipt = fill(trainer.train_dataset, again, nobody)
    assert receipt.hits == receipt.pairs == 40
    assert str(receipt).startswith("reference: 40 of 40 pairs from the store (saved about ")
    assert set(COLUMNS) <= set(filled.column_names)


def test_the_same_reference_is_recognized_whatever_the_policy_and_wherever_it_lies(
    section, adapters, folders, tmp_path
):
    plain = models.Start(str(folders["llama"]), None, "plain")
    of_rank = [identify_reference(section(lora={"r": r, "lora_dropout": 0.1}), plain) for r in (4, 64)]
    assert of_rank[0].file == of_rank[1].file
    copies = [
        shutil.copytree(what, tmp_path / f"copy of {n}") for n, what in enumerate((folders["llama"], adapters[0]))
    ]
    moved = identify_reference(section(name=str(copies[0])), models.Start(str(copies[0]), str(copies[1]), "moved"))
    there = identify_reference(section(), models.Start(str(folders["llama"]), str(adapters[0]), "there"))
    assert moved.file == there.file
    base = section(reference="base")
    bare = [identify_reference(base, models.Start(base.name, str(adapter), "base")) for adapter in adapters]
    assert bare[0].file == bare[1].file == of_rank[0].file
    known = models.identify(section())
    assert identify_reference(section(), plain, known=known).file == of_rank[0].file
    assert identify_reference(section(), plain, known={"name": "another", "weights": "0"}).file == of_rank[0].file


def test_another_reference_is_another(section, adapters, folders, tmp_path):
    """Weights, configuration, adapter, its scaling, dtype, quantization, ld_alpha: each is another file."""
    scaled = shutil.copytree(adapters[0], tmp_path / "scaled")
    file = scaled / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    rotated = shutil.copytree(folders["llama"], tmp_path / "rotated")
    file = rotated / "config.json"
    file.write_text(file.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 2'))
    llama, one = str(folders["llama"]), models.Start(str(folders["llama"]), str(adapters[0]), "one")
    identities = [
        identify_reference(section(), one),
        identify_reference(section(), dataclasses.replace(one, adapter=str(adapters[1]))),
        identify_reference(section(), dataclasses.replace(one, adapter=str(scaled))),
        identify_reference(section(), dataclasses.replace(one, adapter=None)),
        identify_reference(section(name=str(rotated)), dataclasses.replace(one, weights=str(rotated))),
        identify_reference(section(), dataclasses.replace(one, weights=str(folders["mistral"]))),
        identify_reference(section(dtype="bfloat16"), one),
        identify_reference(section(dtype="bfloat16", lora=None), models.Start(llama, None, "in float32")),
        identify_reference(section(dtype="bfloat16"), models.Start(llama, None, "in bfloat16")),
        identify_reference(section(load_in_4bit=True), one),
        identify_reference(section(attn_implementation="eager"), one),
        identify_reference(section(), one, ld_alpha=0.5),
        identify_reference(section(), one, prefix_sharing=True),
    ]
    assert len({identity.file for identity in identities}) == len(identities)


def test_an_adapter_from_the_hub_is_known_by_its_content(section, adapters, tmp_path, monkeypatch):
    """Its files lie in the hub's cache once it has been loaded."""
    from huggingface_hub import constants

    cached = tmp_path / "hub" / "models--someone--adapter"
    shutil.copytree(adapters[0], cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    of_hub = models.Start(section().name, "someone/adapter", "from the hub")
    local = dataclasses.replace(of_hub, adapter=str(adapters[0]))
    assert identify_reference(section(), of_hub).file == identify_reference(section(), local).file


def test_other_weights_in_the_same_place_are_another_reference(section, adapters, tmp_path):
    adapter = shutil.copytree(adapters[0], tmp_path / "sft")
    start = models.Start(section().name, str(adapter), "it")
    before = identify_reference(section(), start)
    shutil.copy(adapters[1] / "adapter_model.safetensors", adapter)
    assert identify_reference(section(), start).file != before.file


def test_ids_of_another_tokenizer_are_other_pairs(pairs):
    """Also where the same ids are divided otherwise into prompt and reply."""
    fill(pairs)
    other = pairs.map(lambda row: {name: [i + 1 for i in row[name]] for name in row})
    moved = pairs.map(
        lambda row: (
            row | {"prompt_ids": row["prompt_ids"][:-1], "chosen_ids": row["prompt_ids"][-1:] + row["chosen_ids"]}
        )
    )
    for pairs_of_others in (other, moved):
        assert look_up(ANY, {"train": pairs_of_others}).hits == 0


def test_a_cut_counts_where_it_cuts(pairs):
    """TRL scores only `max_length` tokens: a longer pair is another pair under each cut, a shorter one is not."""
    keys, _ = pair_keys(pairs, None, "keep_start")
    longest = max(len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs)
    assert (pair_keys(pairs, longest, "keep_end")[0] == keys).all()
    cut = [pair_keys(pairs, longest - 1, mode)[0] != keys for mode in ("keep_start", "keep_end")]
    assert (cut[0] == cut[1]).all() and 0 < cut[0].sum() < len(pairs)
    assert len({pair_keys(pairs, length, mode)[0][0] for length in (9, 8) for mode in ("keep_start", "keep_end")}) == 4


def test_keys_do_not_depend_on_how_arrow_holds_the_ids(pairs):
    import datasets

    keys, lengths = pair_keys(pairs, None, "keep_start")
    narrow = pairs.cast(datasets.Features(dict.fromkeys(pairs.column_names, datasets.List(datasets.Value("int32")))))
    part = pairs.select(range(7, 30))
    assert (pair_keys(narrow, None, "keep_start")[0] == keys).all()
    assert (pair_keys(part, None, "keep_start")[0] == keys[7:30]).all()
    assert (pair_keys(pairs.select([9, 3]), None, "keep_start")[0] == keys[[9, 3]]).all()
    assert lengths[5] == 2 * len(pairs[5]["prompt_ids"]) + len(pairs[5]["chosen_ids"]) + len(pairs[5]["rejected_ids"])


# When -------------------------------------------------------------------------


def test_the_store_is_completed_where_that_is_no_more_work_than_without_it(pairs, tmp_path):
    """40 pairs; 2 steps of 8 score 16 of them and, with evaluations at 0, 1 and 2, 3 × 4: 28 in all."""

    def online(**options) -> int:
        own = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "eval_on_start": True}
        args = DPOConfig(str(tmp_path), eval_strategy="steps", bf16=False, use_cpu=True, **own, **options)
        return pairs_scored_online(args, 40, 4)

    assert online(max_steps=2, eval_steps=1) == 2 * 8 + 3 * 4
    assert online(num_train_epochs=3, eval_steps=5) == 3 * 40 + 4 * 4
    assert online(num_train_epochs=1, eval_steps=0.5) == 40 + 3 * 4
    found = look_up(ANY, {"train": pairs})
    assert worth_storing(found, online(num_train_epochs=1, eval_steps=5))
    assert not worth_storing(found, online(max_steps=2, eval_steps=1))
    fill(pairs.select(range(12)))
    assert worth_storing(look_up(ANY, {"train": pairs}), online(max_steps=2, eval_steps=1))


# Files ------------------------------------------------------------------------


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)


def put_a_folder_there(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_short, "is damaged"),
        (flip_a_bit, "is damaged"),
        (lambda file: file.write_bytes(b""), "is damaged"),
        (lambda file: file.write_bytes(os.urandom(999)), "is damaged"),
        (lambda file: file.write_bytes(b"[]\n"), "is damaged"),
        (put_a_folder_there, "cannot be read"),
    ],
)
def test_a_file_that_is_not_whole_is_computed_again_and_one_line_says_so(damage, said, pairs, caplog):
    expected = numbers(fill(pairs)[0])
    damage(ANY.file)
    found = look_up(ANY, {"train": pairs})
    assert found.hits == 0
    assert [said in line for line in caplog.messages] == [True]
    filled, _ = complete(found, by_hash)
    assert (numbers(filled["train"]) == expected).all()
    if ANY.file.is_file():
        assert fill(pairs, compute=nobody)[1].hits == 40


def test_a_file_under_another_references_name_is_not_believed(pairs, caplog):
    other = dataclasses.replace(ANY, facts={"weights": "others"})
    fill(pairs)
    ANY.file.rename(other.file)
    assert fill(pairs, other)[1].hits == 0
    assert "is about another reference" in caplog.text
    assert fill(pairs, other, nobody)[1].hits == 40


def test_what_was_computed_before_an_interruption_is_kept(pairs, folder):
    computed = []

    def until_interrupted(pair):
        if len(computed) == 20:
            raise KeyboardInterrupt
        computed.append(pair)
        return by_hash(pair)

    with pytest.raises(KeyboardInterrupt):
        fill(pairs, compute=until_interrupted)
    assert look_up(ANY, {"train": pairs}).hits == reference.PAIRS_A_TURN
    assert [file.suffix for file in sorted(folder.iterdir())] == [".lock", ".logps"]


def in_other_processes(count: int, work) -> list:
    """What `work(n)` returns in each of `count` forked processes that start it together."""
    context = multiprocessing.get_context("fork")
    results, start = context.SimpleQueue(), context.Barrier(count)

    def one(n: int) -> None:
        try:
            start.wait(20)
            results.put((n, work(n)))
        except BaseException as e:
            results.put((n, repr(e)))

    processes = [context.Process(target=one, args=(n,)) for n in range(count)]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join(20)
    return [found[n] for n in range(count)]


def test_runs_that_fill_the_store_at_once_lose_nothing(pairs, monkeypatch):
    """Four runs, each with half of the pairs, and each saves after every turn."""
    monkeypatch.setattr(store, "SECONDS_BETWEEN_SAVES", 0.001)
    monkeypatch.setattr(reference, "PAIRS_A_TURN", 2)
    halves = [range(0, 20), range(10, 30), range(20, 40), range(0, 40, 2)]
    said = in_other_processes(4, lambda n: fill(pairs.select(halves[n]))[1].pairs)
    assert said == [20] * 4
    filled, receipt = fill(pairs, compute=nobody)
    assert receipt.hits == 40
    assert numbers(filled).T.tolist() == [list(np.float32(by_hash(pair))) for pair in pairs]


def test_numbers_that_another_run_stored_meanwhile_are_taken(pairs):
    def overtaken(pair):
        if not ANY.file.exists():
            fill(pairs.select(range(20)), compute=lambda pair: (-7.0, -8.0))
        return by_hash(pair)

    filled = numbers(fill(pairs, compute=overtaken)[0])
    assert (filled[:, :20].T == [-7, -8]).all() and (filled[:, 20:] < -8).all()
    assert (numbers(fill(pairs, compute=nobody)[0]) == filled).all()


def test_ranks_share_the_work_and_rank_0_writes(pairs, tmp_path, monkeypatch):
    """Three ranks with 40 pairs, of which each computes as many; only rank 0 has the store's folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(n: int):
        world = {"RANK": n, "LOCAL_RANK": n, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in world.items()}
        if n:
            os.environ["ALIGNLAB_CACHE"] = str(tmp_path / f"of rank {n}")
        PartialState._reset_state()
        assert PartialState(cpu=True).num_processes == 3
        calls = []
        filled, first = fill(pairs, compute=lambda pair: calls.append(pair) or by_hash(pair))
        again = fill(pairs, compute=nobody)[1]
        return len(calls), numbers(filled).tolist(), first.hits, again.hits

    expected = np.float32([by_hash(pair) for pair in pairs]).T.tolist()
    assert in_other_processes(3, rank) == [(14, expected, 0, 40)] * 3
    assert len(list_store()) == 1
    assert not list(tmp_path.glob("of rank*"))


def test_processes_that_draw_the_same_replies_at_once_leave_them_whole(folder):
    """Three processes write and read 30 times over: what is read is all there, and nothing lies about afterwards."""
    replies = [{"ids": list(range(n)), "text": "word " * n, "ended": n % 2 == 0} for n in range(1, 60)]

    def work(_n: int) -> list:
        read = []
        for _ in range(30):
            store.store_replies(ANY, {"seed": 1}, replies)
            read.append(store.read_replies(ANY, {"seed": 1}) == replies)
        return read

    assert in_other_processes(3, work) == [[True] * 30] * 3
    assert [file.suffix for file in folder.iterdir()] == [".replies"]
    assert store.read_replies(ANY, {"seed": 2}) is None


def test_without_write_permission_the_run_goes_on(pairs, folder, caplog):
    folder.parent.mkdir()
    folder.write_text("a file where the folder should be")
    filled, _ = fill(pairs)
    assert numbers(filled).T.tolist() == [list(np.float32(by_hash(pair))) for pair in pairs]
    assert "cannot store in" in caplog.messages[-1] and "going on without" in caplog.messages[-1]
    assert list_store() == [] and clear_store() == 0


def test_a_folder_that_is_ours_to_read_only_is_read(pairs, folder, caplog):
    fill(pairs.select(range(30)))
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user writes everywhere")
        assert fill(pairs)[1].hits == 30
        assert "cannot store in" in caplog.messages[-1]
    finally:
        folder.chmod(0o755)


def test_a_disk_that_takes_no_more_costs_a_line_and_harms_nothing(pairs, folder):
    """The limit on the size of files stands for the disk; what was there before stays as it was."""
    fill(pairs.select(range(4)))
    before = ANY.file.read_bytes()

    def on_a_full_disk(_n: int):
        lines, handler = [], logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        store.log.addHandler(handler)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1, resource.RLIM_INFINITY))
        filled, receipt = fill(pairs)
        return numbers(filled).tolist(), receipt.hits, lines

    [(found, hits, lines)] = in_other_processes(1, on_a_full_disk)
    assert found == np.float32([by_hash(pair) for pair in pairs]).T.tolist() and hits == 4
    assert len(lines) == 1 and "cannot store in" in lines[0]
    assert ANY.file.read_bytes() == before
    assert sorted(file.suffix for file in folder.iterdir()) == [".lock", ".logps"]


def test_the_store_says_what_it_holds_and_is_cleared(pairs, folder):
    assert list_store() == [] and clear_store() == 0
    other = ReferenceIdentity("the other", {"weights": "others"})
    fill(pairs)
    fill(pairs.select(range(5)), other)
    os.utime(other.file, (1, 1))
    (folder / f".{ANY.file.name}.cut_off").write_bytes(b"left by a run that was killed")
    rows = list_store()
    assert [(row.reference, row.pairs) for row in rows] == [(ANY.sentence, 40), ("the other", 5)]
    assert all(row.bytes == row.path.stat().st_size for row in rows)
    fill(pairs.select(range(5)), other, nobody)
    assert list_store()[0].reference == "the other", "what was used last comes first"
    other.file.write_bytes(b"x")
    assert "damaged" in list_store()[0].reference
    assert clear_store() > sum(row.bytes for row in rows[:1])
    assert list(folder.iterdir()) == [] and fill(pairs)[1].hits == 0


def test_what_cannot_be_removed_is_named(pairs, folder, monkeypatch):
    fill(pairs)
    monkeypatch.setattr(Path, "unlink", _denied)
    with pytest.raises(MachineError, match=r"\.lo.* cannot be removed \(Permission denied\)"):
        clear_store()


def _denied(self, missing_ok=False):
    raise PermissionError(13, "Permission denied")


def test_listing_the_store_needs_no_torch(pairs):
    import subprocess
    import sys

    fill(pairs)
    program = (
        "import sys; from alignlab.train.store import list_store; print(list_store()[0].pairs, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert done.stdout.split() == ["40", "False"], done.stderr
