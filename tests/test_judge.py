"""The judges: from answers to outcomes, the toy's rule, a reward model made on the spot, and votes from files."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch

from alignlab.data import toy
from alignlab.errors import DataError, ModelError
from alignlab.evaluation.judge import (
    Contest,
    Judgement,
    RewardJudge,
    Verdict,
    combine_orders,
    judge_by_rule,
    judge_contests,
    read_votes,
    tally,
)
from alignlab.recipe.load import ToySection

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def swapped(contests: list[Contest]) -> list[Contest]:
    return [Contest(c.prompt, c.reply_b, c.reply_a) for c in contests]


def mirrored(verdicts: list[Verdict]) -> list:
    return [None if verdict.outcome is None else 1 - verdict.outcome for verdict in verdicts]


@pytest.fixture(scope="module")
def contests() -> list[Contest]:
    rows = toy.rows(ToySection(pairs=60))
    found = []
    for row in rows:
        prompt, _, chosen = row["chosen"].rpartition("Assistant:")
        found.append(Contest(prompt + "Assistant:", chosen, row["rejected"].rpartition("Assistant:")[2]))
    return found[-40:]


# Contests and verdicts


@pytest.mark.parametrize(
    ("prompt", "messages"),
    [
        ("How?", [("user", "How?")]),
        ("\n\nHuman: How?\n\nAssistant:", [("user", "How?")]),
        (
            "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\nso?\n\nAssistant:",
            [("user", "Hi"), ("assistant", "Yes?"), ("user", "Why\nso?")],
        ),
        ("\n\nHuman: One\n\nHuman: Two\n\nAssistant:", [("user", "One\n\nTwo")]),
    ],
)
def test_a_prompt_becomes_chat_messages(prompt, messages):
    found = Contest(prompt, " a", " b").messages()
    assert [(message["role"], message["content"]) for message in found] == messages


@pytest.mark.parametrize(
    ("one", "other", "outcome", "how"),
    [
        ("a", "a", 1, "judged"),
        ("b", "b", 0, "judged"),
        ("tie", "tie", 0.5, "judged"),
        ("a", "b", 0.5, "disagreement"),
        ("a", "tie", 0.5, "disagreement"),
        ("b", None, None, "unparseable"),
        (None, None, None, "unparseable"),
    ],
)
def test_two_orders_make_one_outcome(one, other, outcome, how):
    for first, second in ((one, other), (other, one)):
        verdict = combine_orders([Judgement("ab", first, text="…"), Judgement("ba", second, text="…")])
        assert (verdict.outcome, verdict.how) == (outcome, how)


def test_what_was_not_asked_or_failed_is_told_apart():
    answered, unasked = Judgement("ab", "a", text="…"), Judgement("ba", None)
    failed = Judgement("ba", None, error="429")
    assert [combine_orders([answered, other]).how for other in (unasked, failed)] == ["not asked", "failed"]


def test_scores_are_the_mean_over_both_orders():
    """a's helpfulness is 4 and 5: 4.5."""
    scores = [{"a": {"helpfulness": n}, "b": {"helpfulness": 1}} for n in (4, 5)]
    verdict = combine_orders([Judgement("ab", "a", scores[0], "…"), Judgement("ba", "a", scores[1], "…")])
    assert verdict.scores == {"a": {"helpfulness": 4.5}, "b": {"helpfulness": 1}}


def test_equal_replies_are_never_shown_to_a_judge():
    shown = []

    def judge(contests):
        shown.extend(contests)
        return [Verdict(1.0, "judged") for _ in contests]

    contests = [Contest("p", " same", "same "), Contest("p", "one", "other"), Contest("q", "x", "x")]
    assert tally(judge_contests(judge, contests)) == {"ties": 2, "identical": 2, "judged": 1}
    assert shown == contests[1:2]


def test_the_rules_need_no_client_of_a_judge_server():
    program = "import sys, alignlab.evaluation; print('openai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


# Rule


def test_the_rule_prefers_the_chosen_reply(contests):
    """Test rows of the toy have no flipped labels, so that every chosen reply has the higher score."""
    verdicts = judge_contests(judge_by_rule, contests)
    assert [verdict.outcome for verdict in verdicts] == [1.0] * 40
    assert mirrored(judge_contests(judge_by_rule, swapped(contests))) == [1.0] * 40
    assert verdicts[0].scores["a"] == {"rule": toy.score(contests[0].prompt, contests[0].reply_a)}


# Reward model


@pytest.fixture(scope="module", params=["transcript", "chat"])
def reward_folder(request, tokenizer, tmp_path_factory):
    """A random Llama with one output, and a tokenizer with or without a chat template."""
    return make_reward_model(tmp_path_factory.mktemp("reward"), tokenizer, TEMPLATE * (request.param == "chat"))


def make_reward_model(folder, tokenizer, template=None, outputs=1, positions=512):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **shape, vocab_size=len(tokenizer), num_labels=outputs, max_position_embeddings=positions, initializer_range=0.2
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_reward_model_prefers_the_higher_reward(reward_folder, contests):
    """Against one text at a time, written out by hand and without padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)

    def reward(contest, reply):
        if not tokenizer.chat_template:
            text = contest.prompt + reply
        else:
            told = [*contest.messages(), {"role": "assistant", "content": reply.strip()}]
            text = "".join(f"<{message['role']}>{message['content']}" for message in told)
        with torch.no_grad():
            return model(torch.tensor([tokenizer(text)["input_ids"]])).logits.item()

    verdicts = judge_contests(RewardJudge(str(reward_folder), batch_size=7), contests)
    expected = [(reward(c, c.reply_a), reward(c, c.reply_b)) for c in contests]
    found = [(verdict.scores["a"]["reward"], verdict.scores["b"]["reward"]) for verdict in verdicts]
    assert torch.tensor(found) == pytest.approx(torch.tensor(expected), abs=1e-4)
    assert [verdict.outcome for verdict in verdicts] == [float(a > b) for a, b in expected]
    assert 0 < sum(verdict.outcome for verdict in verdicts) < 40


def test_a_reward_model_does_not_care_which_reply_comes_first(reward_folder, contests):
    judge = RewardJudge(str(reward_folder))
    verdicts = judge_contests(judge, contests)
    assert mirrored(judge_contests(judge, swapped(contests))) == [verdict.outcome for verdict in verdicts]


def test_a_text_longer_than_the_reward_model_loses_its_beginning(tokenizer, contests, tmp_path, caplog):
    folder = make_reward_model(tmp_path, tokenizer, positions=16)
    long = [Contest("word " * 50 + contest.prompt, contest.reply_a, contest.reply_b) for contest in contests]
    with caplog.at_level(logging.WARNING):
        verdicts = judge_contests(RewardJudge(str(folder)), contests)
    assert "80 of 80 texts are longer than its 16 tokens; cut in front" in caplog.text
    assert judge_contests(RewardJudge(str(folder)), long) == verdicts


@pytest.mark.parametrize("kind", ["two outputs", "causal", "missing"])
def test_what_is_no_reward_model_is_one_line(kind, tokenizer, folders, tmp_path):
    folder = {"causal": folders["llama"], "missing": tmp_path / "nowhere"}.get(kind)
    name = str(folder or make_reward_model(tmp_path, tokenizer, outputs=2))
    says = {"two outputs": "it has 2 outputs", "causal": "is no reward model", "missing": "there is no folder"}[kind]
    with pytest.raises(ModelError, match=says) as caught:
        RewardJudge(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


# Votes

PROMPTS, MODELS = ["Why?", "How?", "Who?"], ["dpo", "sft"]
VOTED = [Contest(prompt, " yes", " no") for prompt in PROMPTS]


def votes_file(tmp_path, rows, name="votes.jsonl"):
    path = tmp_path / name
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"prompt": "Why?", "winner": "dpo"},
    {"prompt": "Why?", "winner": "tie"},
    {"prompt": "Why?", "winner": "dpo"},
    {"prompt": 1, "winner": "sft"},
]
CSV = "prompt,winner,voter\nWhy?,dpo,1\nWhy?,tie,2\nWhy?,dpo,3\n1,sft,1\n"


@pytest.mark.parametrize(("rows", "name"), [(ROWS, "votes.jsonl"), (CSV, "votes.csv"), ("\ufeff" + CSV, "excel.csv")])
def test_votes_count_with_their_mean(tmp_path, rows, name):
    """Two for dpo and a tie: 2.5 of 3. One for sft: 0. Nobody was asked about the third."""
    votes = read_votes(votes_file(tmp_path, rows, name), PROMPTS, MODELS)
    verdicts = judge_contests(votes.judge("dpo", "sft"), VOTED)
    assert [verdict.outcome for verdict in verdicts] == [pytest.approx(2.5 / 3), 0, None]
    assert verdicts[2].how == "not asked"
    assert mirrored(judge_contests(votes.judge("sft", "dpo"), VOTED)) == [pytest.approx(2.5 / 3), 0, None]


def test_votes_on_three_models_name_the_two_that_were_compared(tmp_path):
    rows = [
        {"prompt": 0, "winner": "dpo", "models": ["sft", "dpo"]},
        {"prompt": 0, "winner": "base", "models": ["base", "sft"]},
    ]
    votes = read_votes(votes_file(tmp_path, rows), PROMPTS, [*MODELS, "base"])
    first = lambda a, b: judge_contests(votes.judge(a, b), VOTED[:1])[0].outcome
    assert (first("dpo", "sft"), first("sft", "base"), first("dpo", "base")) == (1, 0, None)
    file = votes_file(tmp_path, "prompt,winner,models\n0,dpo,sft|dpo\n", "votes.csv")
    assert judge_contests(read_votes(file, PROMPTS, [*MODELS, "base"]).judge("dpo", "sft"), VOTED[:1])[0].outcome == 1


@pytest.mark.parametrize(
    ("row", "models", "says"),
    [
        ({"prompt": "Wat?", "winner": "dpo"}, MODELS, "votes.jsonl:2: prompt 'Wat?' is not one of the 3 judged"),
        ({"prompt": 3, "winner": "dpo"}, MODELS, "its number from 0 to 2"),
        ({"prompt": -1, "winner": "dpo"}, MODELS, "prompt '-1' is not"),
        ({"winner": "dpo"}, MODELS, "prompt 'None' is not"),
        ({"prompt": 0, "winner": "gpt"}, MODELS, "votes.jsonl:2: winner is 'gpt', and not one of dpo, sft or tie"),
        ({"prompt": 0}, MODELS, "winner is None"),
        ({"prompt": 0, "winner": "dpo"}, [*MODELS, "base"], "which two of dpo, sft, base were compared?"),
        ({"prompt": 0, "winner": "dpo", "models": ["dpo", "x"]}, MODELS, "models are ['dpo', 'x'], and not two of"),
        ({"prompt": 0, "winner": "dpo", "models": 7}, MODELS, "models are 7, and not two of"),
        ({"prompt": [0], "winner": "dpo"}, MODELS, "prompt '[0]' is not"),
        ({"prompt": 0, "winner": ["dpo"]}, MODELS, "winner is ['dpo']"),
    ],
)
def test_a_vote_that_cannot_be_counted_is_one_line_with_its_place(tmp_path, row, models, says):
    good = {"prompt": 0, "winner": "dpo", "models": MODELS}
    with pytest.raises(DataError) as caught:
        read_votes(votes_file(tmp_path, [good, row]), PROMPTS, models)
    assert says in str(caught.value) and "votes.jsonl:2" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("none.jsonl", None, "no such file"),
        ("votes.jsonl", "", "no votes"),
        ("votes.jsonl", "{\n", "not JSON"),
        ("votes.csv", "prompt,winner\n", "no votes"),
        ("votes.csv", "a,b\n1,2\n", "prompt 'None' is not"),
        ("votes.txt", "hm", "not a kind of file"),
    ],
)
def test_a_file_without_votes_is_one_line(tmp_path, name, text, says):
    path = tmp_path / name if text is None else votes_file(tmp_path, text, name)
    with pytest.raises(DataError, match=says):
        read_votes(path, PROMPTS, MODELS)
