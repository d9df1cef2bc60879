"""The page for blind votes: pairs shown without names, votes collected, and what came of them behind a key."""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from alignlab.evaluation.judge import Contest
from alignlab.people.ballots import AGAIN_EVERY, CHOICES, SCORES, Ballots, Refused
from alignlab.people.results import count
from alignlab.text.safe import harmless, one_line
from alignlab.text.tables import percent

log = logging.getLogger(__name__)

MOST_BYTES = 4096  # of a form
SECONDS = 90 * 24 * 3600  # that a browser remembers its voter
ASSETS = {"vote.css": "text/css", "vote.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
SPEAKERS = {"system": "System", "user": "Person", "assistant": "Assistant"}


def vote_app(ballots: Ballots, hosts: Sequence[str]) -> FastAPI:
    """The server of one file of votes; requests to other hosts than these are refused."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    pages = _Pages(ballots)
    cookie = f"voter-{ballots.name[:8]}"  # several servers on one host have one jar of cookies

    def voter_of(request: Request) -> int | None:
        return ballots.voter(request.cookies.get(cookie))

    def known(request: Request) -> int:
        if (voter := voter_of(request)) is None:
            raise Refused("This browser has no voter yet; begin with your name.", 403)
        return voter

    @app.middleware("http")
    async def guard(request: Request, answer: Any) -> Response:
        host = request.headers.get("host", "")
        if host.rpartition(":")[0] not in hosts and host not in hosts:
            response: Response = pages.refusal(request, "This server does not answer to that name.", 421)
        elif request.method == "POST" and request.headers.get("origin", f"http://{host}").partition("://")[2] != host:
            response = pages.refusal(request, "This form was sent by another page.", 403)
        else:
            response = await answer(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(Refused)
    async def refuse(request: Request, error: Refused) -> Response:
        return pages.refusal(request, str(error), error.status)

    @app.exception_handler(HTTPException)
    async def refuse_unknown(request: Request, error: HTTPException) -> Response:
        return pages.refusal(request, str(error.detail), error.status_code)

    @app.get("/")
    @app.get("/pair")
    async def show(request: Request) -> Response:
        voter = voter_of(request)
        return HTMLResponse(pages.welcome() if voter is None else pages.pair(voter))

    @app.post("/voter")
    async def enter(request: Request) -> Response:
        token = ballots.enter((await _read_form(request)).get("name", ""))
        response = RedirectResponse("/pair", 303)
        response.set_cookie(cookie, token, max_age=SECONDS, httponly=True, samesite="lax")
        return response

    @app.post("/vote")
    async def vote(request: Request) -> Response:
        voter, form = known(request), await _read_form(request)
        scores = {f"{name}_{side}": _score(form, f"{name}_{side}") for name in SCORES for side in ("left", "right")}
        ballots.vote(voter, form.get("ballot", ""), form.get("choice", ""), scores)
        return RedirectResponse("/pair", 303)

    @app.post("/undo")
    async def undo(request: Request) -> Response:
        ballots.undo(known(request))
        return RedirectResponse("/pair", 303)

    @app.get("/results")
    async def results(request: Request) -> Response:
        if not hmac.compare_digest(request.query_params.get("key", "").encode(), ballots.key.encode()):
            raise Refused("The results need the key that was printed when the server started.", 403)
        votes, repeated = ballots.votes(), ballots.repeated()
        return HTMLResponse(await run_in_threadpool(pages.results, votes, repeated))

    @app.get("/{name}")
    async def asset(name: str) -> Response:
        if name not in ASSETS:
            raise HTTPException(404, "There is no such page.")
        return Response(_read(name), media_type=ASSETS[name])

    return app


async def _read_form(request: Request) -> Mapping[str, str]:
    """The fields of a form, each once."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise Refused(f"A form has at most {MOST_BYTES} bytes.", 413)
    try:
        fields = parse_qs(body.decode(), strict_parsing=bool(body), max_num_fields=20, errors="strict")
    except ValueError:
        raise Refused("This is no form.") from None
    return {name: values[-1] for name, values in fields.items()}


def _score(form: Mapping[str, str], name: str) -> int | None:
    if not (given := form.get(name)):
        return None
    if given not in ("1", "2", "3", "4", "5"):
        raise Refused("A score is a whole number from 1 to 5.")
    return int(given)


def _read(name: str) -> str:
    return (files("alignlab.people") / name).read_text(encoding="utf-8")


class _Pages:
    """What the server writes; text of models and of voters is text and never HTML."""

    def __init__(self, ballots: Ballots):
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        environment.filters.update(harmless=harmless, percent=percent)
        self.ballots, self.template = ballots, environment.from_string(_read("vote.html.jinja"))

    def welcome(self) -> str:
        return self.template.render(page="welcome", title="Which reply is better?")

    def pair(self, voter: int) -> str:
        ballot, (cast, total) = self.ballots.ballot(voter), self.ballots.progress(voter)
        if ballot is None:
            return self.template.render(page="end", title="Thank you", cast=cast, total=total)
        turns = [(SPEAKERS[m["role"]], m["content"]) for m in Contest(ballot.prompt, "", "").messages()]
        facts = {"ballot": ballot, "turns": turns, "choices": CHOICES, "cast": cast, "total": total}
        return self.template.render(page="pair", title=f"Pair {cast + 1} of {total}", **facts)

    def results(self, votes: Sequence[Any], repeated: Sequence[Any]) -> str:
        found = count(votes, repeated)
        return self.template.render(page="results", title="Results of the vote", found=found, again_every=AGAIN_EVERY)

    def refusal(self, request: Request, message: str, status: int) -> HTMLResponse:
        who = request.client.host if request.client else "?"
        asked = one_line(f"{request.method} {request.url.path}")[:80]
        log.warning("refused: %s from %s: %s (%d)", asked, who, message, status)
        return HTMLResponse(self.template.render(page="refusal", title="Not accepted", message=message), status)


def own_hosts(address: str, named: Sequence[str]) -> list[str]:
    """The names under which a server on this address is asked for."""
    return [
        "127.0.0.1",
        "localhost",
        "[::1]",
        address,
        *named,
        *([socket.gethostname()] if address == "0.0.0.0" else []),
    ]


def serve_votes(ballots: Ballots, address: str, port: int, named: Sequence[str] = ()) -> None:
    """Serves until it is told to stop."""
    import uvicorn

    app = vote_app(ballots, own_hosts(address, named))
    limits: dict[str, Any] = {"limit_concurrency": 500, "timeout_keep_alive": 30, "server_header": False}
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when it has shut down
        uvicorn.run(app, host=address, port=port, log_level="warning", access_log=False, **limits)
