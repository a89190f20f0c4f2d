"""The judge of captions: asked over HTTP, remembered, and its replies read."""

import http.server
import json
import sys
import threading

import pytest

from timeviper_jax.evals.judge import (
    HttpJudge,
    RecordedJudge,
    parse_grade,
    score_caption,
)


@pytest.fixture
def server():
    """A chat completion server of its own, which repeats what it is asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        seen = []
        reply = staticmethod(lambda user: {"choices": [{"message": {"content": user}}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.seen.append((self.path, self.headers["Authorization"], body))
            content = json.dumps(self.reply(body["messages"][-1]["content"])).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running, Handler
        running.shutdown()


def test_any_chat_completions_address_can_judge(server, monkeypatch):
    running, handler = server
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    judge = HttpJudge(f"http://127.0.0.1:{running.server_port}/v1/", "llama")
    assert judge("Be fair.", "Is it?") == "Is it?"
    ((path, key, body),) = handler.seen
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["model"] == "llama" and body["temperature"] == 0
    assert body["messages"][0] == {"role": "system", "content": "Be fair."}


def test_a_judge_that_does_not_answer_is_one_clear_line(server):
    running, handler = server
    address = f"http://127.0.0.1:{running.server_port}/v1"
    handler.reply = staticmethod(lambda user: {"error": "busy"})
    with pytest.raises(ValueError, match="does not speak chat completions"):
        HttpJudge(address, "llama")("", "")
    silent = {"choices": [{"message": {"content": None}}]}
    handler.reply = staticmethod(lambda user: silent)
    with pytest.raises(ValueError, match="replied with None in place of text"):
        HttpJudge(address, "llama")("", "")
    handler.reply = staticmethod(lambda user: sys.exit())  # It hangs up.
    with pytest.raises(ValueError, match="does not answer.*goes on from here"):
        HttpJudge(address, "llama")("", "")
    with pytest.raises(ValueError, match="does not answer.*goes on from here"):
        HttpJudge("http://127.0.0.1:9/v1", "llama", timeout=2.0)("", "")


def test_a_judge_is_asked_once_and_then_remembered(tmp_path):
    asked = []

    def judge(system: str, user: str) -> str:
        asked.append(user)
        return user.upper()

    path = tmp_path / "judge.jsonl"
    assert RecordedJudge(path, judge)("s", "why") == "WHY"
    assert RecordedJudge(path, judge)("s", "why") == "WHY"
    assert asked == ["why"]
    with pytest.raises(ValueError, match="holds no reply to 'what'.*--judge"):
        RecordedJudge(path)("s", "what")


@pytest.mark.parametrize(
    "reply, grade",
    [
        ("{'pred': 'yes', 'score': 4.8}", (1, 4.8)),
        ("Sure!\n{'pred': 'No', 'score': 0}", (0, 0)),
        ('{"pred": "yes", "score": "3"}', (1, 3)),
        ("{'pred': 'yes', 'score': 99}", (1, 5)),
        ("yes, 5", (0, 0)),
        ("{'pred': yes}", (0, 0)),
        ("{'pred', 'score'}", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_what_cannot_be_read_is_no_match(reply, grade):
    assert parse_grade(reply) == grade


def test_a_caption_nothing_is_asked_about_scores_nothing():
    assert score_caption("A dog.", [], lambda *_: "") == {"accuracy": 0, "score": 0}
