"""Servers of wandb's on loopback: one logs `ada` in and takes her runs, one knows nobody, one never answers."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler

RUN = {"id": "1", "name": "run", "displayName": "run", "sweepName": None, "config": "{}"}
PROJECT = {"id": "2", "name": "alignlab", "entity": {"id": "3", "name": "ada"}}
ANSWERS = {
    "upsertBucket": {"bucket": {**RUN, "project": PROJECT}, "inserted": True},
    "viewer": {"id": "4", "username": "ada", "entity": "ada", "email": "", "flags": "{}", "teams": {"edges": []}},
    "model": None,  # no run to resume
    "createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []},
}


class Taking(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(errors="replace")
        data = {name: answer for name, answer in ANSWERS.items() if name in asked}
        self.answer(200, {"data": data})

    def answer(self, status: int, body: dict) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


class KnowingNobody(Taking):
    def do_POST(self):
        self.answer(401, {"errors": [{"message": "user is not logged in"}]})


class NeverAnswering(Taking):
    def do_POST(self):
        threading.Event().wait(60)
