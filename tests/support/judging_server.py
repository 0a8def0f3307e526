"""A chat server that judges by a simple rule, the longer answer being the better one, and records what it was asked."""

import contextlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ARENA_HARD = re.compile(
    r"<\|The Start of Assistant A's Answer\|>\n(.*)\n<\|The End of Assistant A's Answer\|>\n\n"
    r"<\|The Start of Assistant B's Answer\|>\n(.*)\n<\|The End of Assistant B's Answer\|>",
    re.DOTALL,
)
ALPACA_EVAL = re.compile(
    r'"model(?:_identifier)?": "m",\s+"output": """(.*)"""\s+\},\s+\{\s+'
    r'"model(?:_identifier)?": "M",\s+"output": """(.*)"""',
    re.DOTALL,
)


def shown(request: dict) -> tuple[str, str]:
    """The two answers in the order in which a request shows them."""
    text = request["messages"][-1]["content"]
    found = ARENA_HARD.search(text) or ALPACA_EVAL.search(text)
    assert found, f"neither judge's prompt: {text[:500]}"
    return found[1], found[2]


def probability(first: str, second: str) -> float:
    """The rule: the share of the first answer in the characters of both."""
    return len(first) / (len(first) + len(second))


def verdict(first: str, second: str) -> str:
    """The rule as one of Arena-Hard's verdicts; twice as long is significantly better."""
    if len(first) == len(second):
        return "A=B"
    if len(first) > len(second):
        return "A>>B" if len(first) >= 2 * len(second) else "A>B"
    return "B>>A" if len(second) >= 2 * len(first) else "B>A"


def completion(request: dict) -> dict:
    """The rule as a chat completion in the form that the request asks for."""
    first, second = shown(request)
    choice: dict = {"index": 0, "finish_reason": "stop"}
    if request.get("logprobs"):
        likely = probability(first, second)
        tokens = [{"token": "m", "logprob": math.log(likely)}, {"token": "M", "logprob": math.log(1 - likely)}]
        content = max(tokens, key=lambda token: token["logprob"])
        top = [{**token, "bytes": None} for token in tokens]
        choice["logprobs"] = {"content": [{**content, "bytes": None, "top_logprobs": top}], "refusal": None}
        text = content["token"]
    elif request.get("tools"):
        text = None
        better, worse = "mM" if probability(first, second) > 0.5 else "Mm"
        ordered = [{"model": better, "rank": 1}, {"model": worse, "rank": 2}]
        function = {"name": "make_partial_leaderboard", "arguments": json.dumps({"ordered_models": ordered})}
        calls = [{"id": "call", "type": "function", "function": function}]
    else:
        text = f"My own answer would be short.\n\nMy final verdict is: [[{verdict(first, second)}]]."
    choice["message"] = {"role": "assistant", "content": text, **({"tool_calls": calls} if text is None else {})}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [choice],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


class JudgingServer:
    """A running server.

    Attributes:
        asked: bodies of the requests that were answered by ``answer``, in order; ``keys``: their API keys.
        answer: from a request to (status, content); a test may put its own in place.
        pause: seconds before each answer.
    """

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.answer: Callable[[dict], tuple[int, dict]] = lambda request: (200, completion(request))
        self.pause = 0.0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions", self.path
                time.sleep(server.pause)
                with server._lock:
                    status, content = server.answer(body)
                    server.asked.append(body)
                    server.keys.append(self.headers.get("Authorization"))
                with contextlib.suppress(ConnectionError):  # the client has been killed
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(json.dumps(content).encode())

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

        self.http = Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@contextlib.contextmanager
def judging_server() -> Iterator[JudgingServer]:
    """A server that ends with the block."""
    server = JudgingServer()
    try:
        yield server
    finally:
        server.close()


def alpaca_eval_file(name: str, words: list[int]) -> list[dict]:
    """Answers in AlpacaEval's form: one per prompt, of so many words."""
    return [
        {
            "instruction": f"Explain thing {number} in a few words.",
            "output": " ".join([f"{name}{number}"] + ["word"] * count),
            "generator": name,
            "dataset": "helpful_base",
        }
        for number, count in enumerate(words)
    ]
