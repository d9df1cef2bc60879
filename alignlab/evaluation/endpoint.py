"""A judge behind an OpenAI-compatible endpoint: asked in both orders, within a budget, and never twice the same thing.

Answers are kept in alignlab's cache by what was asked and of which model, whatever its URL: a model that changes
behind the same name keeps its old answers until their file is removed. The key is read from the environment and
stands in nothing that is written or printed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice

from alignlab.disk import ResultCache, cache_folder, digest
from alignlab.errors import AlignlabError, MachineError, ModelError, RecipeError
from alignlab.evaluation.judge import TIE, Contest, Judgement, Scores, Verdict, combine_orders

log = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"
PROMPT_FILE = Path(__file__).with_name("judge-prompt.md")
SCORES = ("relevance", "helpfulness", "harmlessness")
ORDERS = ("ab", "ba")
FAILURES_IN_A_ROW = 10  # after which the endpoint is given up: each has been tried `retries` times by then


class EndpointJudge:
    """Asks a chat model which of two replies is better, and for scores from 1 to 5; a judge's function on contests.

    `url` is the endpoint's (up to its /v1), by default OPENAI_BASE_URL or OpenAI's own. `max_requests` limits what is
    sent, retries included; what it leaves unasked is `not asked`, and the same call goes on from there. Rate limits,
    server errors and dropped connections are tried again by the client, with growing pauses. A question that fails
    all the same is `failed`, and asked again next time; so is one whose answer is empty, cut, or thoughts alone.
    """

    def __init__(
        self,
        model: str,
        url: str | None = None,
        *,
        max_requests: int | None = None,
        concurrency: int = 8,
        retries: int = 5,
        timeout_seconds: float = 120,
        max_answer_tokens: int = 1024,
        prompt_file: Path = PROMPT_FILE,
    ):
        self.model, self.max_requests, self.concurrency = model, max_requests, concurrency
        self.prompt = read_prompt(prompt_file)
        self.options: Mapping[str, Any] = {"temperature": 0, "max_tokens": max_answer_tokens}
        self.max_answer_tokens = max_answer_tokens
        self.sent = 0  # requests, retries included
        self.errors: dict[str, str] = {}  # question's key → why it has no answer
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._client = self._connect(url, retries, timeout_seconds)
        self.cache = ResultCache(cache_folder() / "judgements" / f"{digest(model)}.jsonl")

    def __call__(self, contests: Sequence[Contest]) -> list[Verdict]:
        asked = [[(order, *self._question(contest, order)) for order in ORDERS] for contest in contests]
        questions = {key: text for orders in asked for _, key, text in orders}
        wanted = self._ask_what_is_new(questions)
        verdicts = [combine_orders([self._judgement(order, key) for order, key, _ in orders]) for orders in asked]
        self._say(questions, wanted, verdicts)
        return verdicts

    def answer(self, texts: Sequence[str]) -> list[str | None]:
        """What the model writes to each text; none where the question failed, or the budget was spent before it."""
        questions = {self._key(text): text for text in texts}
        self._ask_what_is_new(questions)
        return [self.cache.values.get(self._key(text)) for text in texts]

    def announce(self, contests: Sequence[Contest]) -> None:
        """Says before anything is sent how much will be, of all that is to be judged."""
        unequal = [contest for contest in contests if contest.differs]
        keys = {self._question(contest, order)[0] for contest in unequal for order in ORDERS}
        log.info(
            "judge %s: %d requests to send, with answers of at most %d tokens (%d pairs of replies in two orders, "
            "%d answered before)%s",
            self.model,
            len(keys - self.cache.values.keys()),
            self.max_answer_tokens,
            len(unequal),
            len(keys & self.cache.values.keys()),
            f"; --max-requests stops at {self.max_requests}" if self.max_requests is not None else "",
        )

    def _connect(self, url: str | None, retries: int, timeout_seconds: float) -> openai.OpenAI:
        key = os.environ.get(KEY)
        if not key and not (url or os.environ.get("OPENAI_BASE_URL")):
            raise MachineError(f"{KEY} is not set; set it to your key, or name the URL of an endpoint of your own")
        return openai.OpenAI(
            api_key=key or "none",
            base_url=url,
            max_retries=retries,
            timeout=timeout_seconds,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [self._count]}),
        )

    # Questions

    def _question(self, contest: Contest, order: str) -> tuple[str, str]:
        """The key and the text of one question; the code on its markers follows from what stands between them."""
        first, second = (contest.reply_a, contest.reply_b) if order == "ab" else (contest.reply_b, contest.reply_a)
        conversation = "\n\n".join(f"{m['role'].title()}: {m['content']}" for m in contest.messages())
        material = {"conversation": conversation, "first": first.strip(), "second": second.strip()}
        fence = hashlib.sha256(json.dumps(material).encode()).hexdigest()[:16]
        text = self.prompt.substitute(material, fence=fence)
        return self._key(text), text

    def _key(self, text: str) -> str:
        return digest({"model": self.model, "text": text})

    def _judgement(self, order: str, key: str) -> Judgement:
        if key not in self.cache.values:
            return Judgement(order, None, error=self.errors.get(key))
        answer = self.cache.values[key]
        if (said := read_answer(answer)) is None:
            return Judgement(order, None, text=answer)
        preference, first, second = said
        names = {"first": order[0], "second": order[1], TIE: TIE}
        return Judgement(order, names[preference], {order[0]: first, order[1]: second}, answer)

    # Requests

    def _ask_what_is_new(self, questions: Mapping[str, str]) -> dict[str, str]:
        """Asks what is not in the cache, and returns it."""
        wanted = {key: text for key, text in questions.items() if key not in self.cache.values}
        if wanted and self.max_requests != 0:
            self._check_endpoint()
            self._ask_all(wanted)
        return wanted

    def _ask_all(self, questions: Mapping[str, str]) -> None:
        """Asks until all are answered, the budget is spent or the endpoint is given up; every answer is kept."""
        from huggingface_hub.utils import tqdm

        self._stop.clear()
        in_a_row = 0
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._ask, key, text) for key, text in questions.items()]
            try:
                for future in tqdm(as_completed(futures), "judging", len(futures), leave=False, disable=None):
                    error = future.result()
                    in_a_row = in_a_row + 1 if error and self._tells_of_endpoint(error) else 0
                    if error and in_a_row == min(FAILURES_IN_A_ROW, len(futures)):
                        raise self._fault(error)
            except BaseException:
                self._stop.set()  # what is on its way comes home, nothing more is sent
                pool.shutdown(cancel_futures=True)
                raise

    def _ask(self, key: str, text: str) -> openai.OpenAIError | None:
        """Asks one question and keeps the answer; returns the error that may belong to this question alone."""
        try:
            answer, tokens = self._complete(text)
        except _NotSent:
            return None
        except openai.OpenAIError as e:
            if not isinstance(e, OF_ONE_QUESTION) or "chat template" in str(e).lower():
                raise self._fault(e) from None
            self.errors[key] = self._without_key(str(e))
            return e
        self.cache.add(key, self._without_key(answer), model=self.model, tokens=tokens)
        return None

    def _tells_of_endpoint(self, error: openai.OpenAIError) -> bool:
        """Whether a failure may be everybody's: a model that has answered before refuses a question for what it is."""
        of_itself = openai.BadRequestError | openai.UnprocessableEntityError | _Unfinished
        return not (self.cache.values and isinstance(error, of_itself))

    def _complete(self, text: str) -> tuple[str, int | None]:
        """The model's answer and the tokens it took; what is no chat completion is asked for again."""
        for _ in range(self._client.max_retries + 1):
            done = self._create(text)
            if isinstance(done, ChatCompletion) and done.choices:
                return self._said(done.choices[0]), done.usage.total_tokens if done.usage else None
        raise _NoCompletion("it answers with something that is no chat completion")

    def _said(self, choice: Choice) -> str:
        """What stands behind the model's thoughts."""
        said = behind_thoughts(choice.message.content or choice.message.refusal or "")
        if choice.finish_reason == "length":
            raise _Unfinished(f"its answer was cut at {self.max_answer_tokens} tokens; --judge-tokens allows more")
        if not said:
            raise _Unfinished("its answer was empty, or thoughts alone")
        return said

    def _create(self, text: str) -> Any:
        """What the endpoint returns, none where it is not JSON; an option that it refuses is left out from then on."""
        while True:
            options, question = self.options, [{"role": "user", "content": text}]
            try:
                return self._client.chat.completions.create(model=self.model, messages=question, **options)
            except openai.BadRequestError as e:
                if e.code not in ("unsupported_parameter", "unsupported_value") or e.param not in options:
                    raise
                self._leave_out(e.param)
            except ValueError:
                return None

    def _leave_out(self, option: str) -> None:
        with self._lock:
            if option not in self.options:
                return
            kept = {name: value for name, value in self.options.items() if name != option}
            if option == "max_tokens":  # its newer name
                kept["max_completion_tokens"] = self.max_answer_tokens
            else:
                log.warning("judge %s takes no %s of ours: its answers may vary", self.model, option)
            self.options = kept

    def _count(self, request: Any) -> None:
        """Before each request that the client sends; refuses it where the budget is spent or all is to end."""
        if request.method != "POST":
            return
        with self._lock:
            if self._stop.is_set() or (self.max_requests is not None and self.sent >= self.max_requests):
                raise _NotSent
            self.sent += 1

    # What can be wrong

    def _check_endpoint(self) -> None:
        """Says at once that nobody listens, or that a local model is not made for chats."""
        if _lacks_chat_template(Path(self.model)):
            raise ModelError(
                f"{self.model} has no chat template, so no endpoint can ask it; name a chat model as judge"
            )
        try:
            self._client.with_options(max_retries=0, timeout=10).models.list()
        except openai.APITimeoutError:
            pass
        except openai.APIConnectionError as e:
            raise self._fault(e) from None
        except openai.APIError:
            pass  # not every endpoint lists its models

    def _fault(self, error: openai.OpenAIError) -> AlignlabError:
        where = f"the judge at {_shown(str(self._client.base_url))}"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            given = "refuses the key in" if os.environ.get(KEY) else "wants a key, and there is none in"
            return MachineError(f"{where} {given} {KEY} ({error.status_code}); set it to one that is valid there")
        if isinstance(error, openai.NotFoundError):
            return ModelError(f"{where} has no model {self.model!r}{self._models()}; check the name and the URL")
        if isinstance(error, _Unfinished):
            return ModelError(f"{where} gives no answer with model {self.model!r}: {error}")
        if isinstance(error, openai.APIStatusError | _NoCompletion):
            said = self._without_key(" ".join(str(error).split()))[:300]
            hint = "; name a chat model as judge" if "chat template" in said.lower() else "; its own log may say more"
            return ModelError(f"{where} cannot be asked with model {self.model!r}: {said}{hint}")
        cause = str(error.__cause__ or error).splitlines()[0]
        return MachineError(f"{where} does not answer ({self._without_key(cause)}); start it, or check the URL")

    def _models(self) -> str:
        try:
            names = [model.id for model in self._client.with_options(max_retries=0, timeout=10).models.list()]
        except openai.APIError:
            return ""
        return f" (it has {', '.join(names[:8])}{', …' if len(names) > 8 else ''})" if names else ""

    def _without_key(self, text: str) -> str:
        key = os.environ.get(KEY, "")
        return text.replace(key, "[key]") if len(key) >= 8 else text

    def _say(self, questions: Mapping[str, str], wanted: Mapping[str, str], verdicts: Sequence[Verdict]) -> None:
        log.info(
            "judge %s: %d questions, %d answered before, %d requests sent",
            self.model,
            len(questions),
            len(questions) - len(wanted),
            self.sent,
        )
        if unfinished := [why for key, why in self.errors.items() if key in questions and why.startswith("its answer")]:
            log.warning("judge %s: %d answers are not kept: %s", self.model, len(unfinished), unfinished[0])
        if missing := sum(verdict.how == "not asked" for verdict in verdicts):
            log.warning(
                "judge %s: the budget of %d requests is spent; %d of %d pairs are not judged: run again to go on",
                self.model,
                self.max_requests,
                missing,
                len(verdicts),
            )


class _Unfinished(openai.OpenAIError):
    """Raised where an answer is empty, cut, or thoughts alone."""


class _NoCompletion(openai.OpenAIError):
    """Raised where an endpoint answers, and not with a chat completion."""


class _NotSent(openai.OpenAIError):
    """Raised in place of a request; the client passes its own errors on without another try."""


# Errors after which the next question may fare better; any other ends the judging
OF_ONE_QUESTION = (
    openai.BadRequestError,
    openai.UnprocessableEntityError,
    openai.RateLimitError,
    openai.ConflictError,
    openai.InternalServerError,
    openai.APIConnectionError,  # dropped, or too slow: whether anybody listens was asked before
    _NoCompletion,
    _Unfinished,
)


def read_prompt(file: Path) -> Template:
    """The judge's prompt; raises `RecipeError` where it has no place for one of the things to judge."""
    try:
        prompt = Template(file.read_text(encoding="utf-8"))
        places = {name: f"<{name}>" for name in ("conversation", "first", "second")}
        written = prompt.substitute(places, fence="")
    except (OSError, ValueError, KeyError) as e:
        raise RecipeError(
            f"{file} cannot be used as the judge's prompt ({e}); it may name $conversation, $first, $second and $fence,"
            " and writes any other $ as $$"
        ) from None
    if absent := [name for name, place in places.items() if place not in written]:
        raise RecipeError(f"{file} does not show the judge ${' and $'.join(absent)}; write it where it belongs")
    return prompt


def behind_thoughts(answer: str) -> str:
    """The answer without what was thought before it, which some endpoints leave in the text.

    >>> behind_thoughts("<think>The first is kind.</think> {}"), behind_thoughts("<think>The first is")
    ('{}', '')
    """
    said = re.split(r"</think(?:ing)?>", answer)[-1].strip()
    return "" if re.match(r"<think(?:ing)?>", said) else said


def read_answer(answer: str) -> tuple[str, Scores, Scores] | None:
    """The preference (first, second, tie) and the scores of the first and second reply; none unless all are there.

    The answer must hold exactly one JSON object with a preference; words around it do not matter.
    """
    found = [value for value in _objects(answer) if "preference" in value]
    if len(found) != 1 or found[0]["preference"] not in ("first", "second", TIE):
        return None
    scores = [_scores(found[0].get(name)) for name in ("first", "second")]
    return None if None in scores else (found[0]["preference"], *scores)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decode, position = json.JSONDecoder().raw_decode, 0
    while (start := text.find("{", position)) >= 0:
        try:
            value, position = decode(text, start)
            yield value
        except (ValueError, RecursionError):
            position = start + 1


def _scores(value: Any) -> Scores | None:
    if not isinstance(value, dict):
        return None
    scores = {name: value.get(name) for name in SCORES}
    return scores if all(type(score) is int and 1 <= score <= 5 for score in scores.values()) else None


def _lacks_chat_template(folder: Path) -> bool:
    """Whether this is a folder of a model whose tokenizer has no chat template."""
    settings = folder / "tokenizer_config.json"
    if (
        not settings.is_file()
        or (folder / "chat_template.jinja").is_file()
        or (folder / "chat_template.json").is_file()
    ):
        return False
    return not json.loads(settings.read_text(encoding="utf-8")).get("chat_template")


def _shown(url: str) -> str:
    """A URL without what may be secret in it: a user, a password, a query."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}".rstrip("/")
