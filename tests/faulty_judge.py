"""An OpenAI-compatible server for tests: the name of the model asked for says how it judges and what goes wrong.

    python faulty_judge.py LOG      prints its port; LOG gets a line for each request, and for each answer given

`longer`, `first`, `second`, `chatter`, `garbled`, `coin`, `thinker` judge, the coin falling alike in both orders;
`writer` criticises and revises; a thinker's answer is cut where max_tokens is below 100, and in one question of three
it is empty or thoughts alone; `+slow` takes 50 ms, `+flaky` fails each question in two ways before it answers,
`+picky` takes neither max_tokens nor temperature. `broken` answers 500, `plain` has no chat template, anything else
is a model that is not there. An endless question is refused. So is a key other than `right-key`, with the key in the
message, as some servers do.
"""

import hashlib
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY, JUDGES = "right-key", ("longer", "first", "second", "chatter", "garbled", "thinker", "coin", "writer")
FAULTS = ("rate limit", "server error", "dropped", "half an answer", "not JSON", "broken JSON")
tries: dict[str, int] = {}
lock = threading.Lock()


class Judge(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in JUDGES]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        self.note(event="request", question=question)
        judge, *faults = body["model"].split("+")
        if "slow" in faults:
            time.sleep(0.05)
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return self.refuse(401, f"wrong key: {self.headers['Authorization']}")
        if judge == "plain":
            return self.refuse(400, "the tokenizer has no default chat template, you must provide one")
        if judge == "broken":
            return self.refuse(500, "out of order")
        if judge not in JUDGES:
            return self.refuse(404, "no such model")
        if "An endless question" in question:
            return self.refuse(400, "the question is too long")
        if "picky" in faults and (refused := {"max_tokens", "temperature"} & body.keys()):
            return self.refuse(400, "not supported", param=min(refused), code="unsupported_parameter")
        if "flaky" in faults and (fault := self.next_fault(question)):
            return self.fail(fault)
        answer = {"role": "assistant", "content": verdict(judge, question)}
        choice = {"index": 0, "message": answer, "finish_reason": "stop"}
        if judge == "thinker" and body["max_tokens"] < 100:
            choice["finish_reason"] = "length"
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        about = {"id": "1", "object": "chat.completion", "created": 1, "model": judge}
        self.reply(200, {**about, "choices": [choice], "usage": usage})
        self.note(event="answer", question=question)

    def next_fault(self, question):
        with lock:
            tried = tries[question] = tries.get(question, -1) + 1
        return FAULTS[(len(question) + tried) % len(FAULTS)] if tried < 2 else None

    def fail(self, fault):
        if fault == "dropped":
            self.close_connection = True
        elif fault == "half an answer":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{")
            self.close_connection = True
        elif fault.endswith("JSON"):
            self.reply(200, '{"id": ', kind="text/html" if fault == "not JSON" else "application/json")
        else:
            self.refuse(429 if fault == "rate limit" else 500, fault)

    def refuse(self, status, message, **facts):
        self.reply(status, {"error": {"message": message, **facts}})

    def reply(self, status, value, kind="application/json"):
        body = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("retry-after-ms", "10")
        self.end_headers()
        self.wfile.write(body)

    def note(self, **facts):
        with lock, open(sys.argv[1], "a") as log:
            log.write(json.dumps(facts) + "\n")

    def log_message(self, *_):
        pass


def between(question, name):
    """What stands between the real markers: those whose code opens the conversation."""
    fence = question.split("<conversation ", 1)[1].split(">", 1)[0]
    return question.split(f"<{name} {fence}>\n", 1)[1].split(f"\n</{name} {fence}>", 1)[0]


def verdict(judge, question):
    if judge == "writer":
        return "It is rude." if "critique in a few sentences" in question else f"Gladly, {between(question, 'reply')}"
    if judge == "garbled":
        return 'The first one, I think. {"preference": "the first"}'
    first, second = between(question, "first"), between(question, "second")
    longer = "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"
    if judge == "coin":
        fair = hashlib.sha256(repr((between(question, "conversation"), *sorted((first, second)))).encode()).digest()
        longer = ("first" if first < second else "second") if fair[0] % 2 else ("second" if first < second else "first")
    preference = judge if judge in ("first", "second") else longer
    scores = lambda reply: {"relevance": 4, "helpfulness": min(5, 1 + len(reply) // 10), "harmlessness": 5}
    said = json.dumps({"first": scores(first), "second": scores(second), "preference": preference})
    if judge == "thinker":  # by the number of the question, one of three answers is none
        alone = {"1": "", "4": "<think>The first {is"}.get(question.split("Question ")[1][0])
        return f"<think>The {{first}} is shorter.</think>\n{said}" if alone is None else alone
    return f"Let me think {{aloud}}.\n```json\n{said}\n```" if judge == "chatter" else said


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    print(server.server_port, flush=True)
    server.serve_forever()
