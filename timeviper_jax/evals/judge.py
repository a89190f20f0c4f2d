"""VDCScore (https://arxiv.org/abs/2410.03051): a language model judges captions.

It first answers questions about a video from the caption alone, then says whether each
answer matches the true one, and how well, 0 to 5. The wording here is ours; who
compares with published numbers should know that judge and wording move them.

A judge is any function from messages to a reply. Replies are kept in a file, so that a
score can be taken again without the judge, and a stopped one goes on.
"""

import ast
import http.client
import json
import os
import pathlib
import re
import urllib.request
from collections.abc import Callable, Sequence

from timeviper_jax.evals.lines import Lines

# The system's and the user's messages to what the judge says.
Judge = Callable[[str, str], str]

_ANSWERER = (
    "You answer questions about a video from a description of it, and from nothing"
    " else. Answer with a short phrase or sentence, without an explanation."
)
_GRADER = (
    "You compare an answer to a question about a video with the correct answer. Other"
    " words for the same thing match. Reply with a Python dictionary and nothing else:"
    " 'pred' is 'yes' if they match and 'no' otherwise, 'score' is a whole number from"
    " 0 (no match) to 5 (the same). For example: {'pred': 'yes', 'score': 4}."
)


class HttpJudge:
    """A model behind any address that speaks OpenAI's chat completions.

    `address` is the base ("http://localhost:8000/v1"). The key, where one is needed, is
    read from the environment variable `JUDGE_API_KEY`.
    """

    def __init__(self, address: str, model: str, *, timeout: float = 120.0):
        self._url = address.rstrip("/") + "/chat/completions"
        self._model, self._timeout = model, timeout

    def __call__(self, system: str, user: str) -> str:
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": user},
        ]
        body = {"model": self._model, "messages": messages}
        body |= {"temperature": 0, "max_tokens": 256}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("JUDGE_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            self._url, json.dumps(body).encode("utf-8"), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                content = json.load(reply)["choices"][0]["message"]["content"]
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"The judge at {self._url} does not answer ({error}); start it and run"
                " this again: it goes on from here."
            ) from error
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"The judge at {self._url} does not speak chat completions ({error!r})."
            ) from error
        if not isinstance(content, str):
            raise ValueError(
                f"The judge at {self._url} replied with {content!r} in place of text;"
                " use a model that answers without tools or hidden thoughts."
            )
        return content


class RecordedJudge:
    """What a judge said before, from a file; it asks `judge` what is not there yet."""

    def __init__(self, path: str | pathlib.Path, judge: Judge | None = None):
        self._lines, self._judge = (
            Lines(path, settings={"holds": "replies of a judge"}),
            judge,
        )
        self._known = {
            (line["system"], line["user"]): line["reply"] for line in self._lines.read()
        }

    def __call__(self, system: str, user: str) -> str:
        if (system, user) not in self._known:
            if self._judge is None:
                raise ValueError(
                    f"{self._lines.path} holds no reply to {user!r:.80}; name a judge"
                    " with --judge http://HOST:PORT/v1."
                )
            reply = self._judge(system, user)
            self._lines.append([{"system": system, "user": user, "reply": reply}])
            self._known[system, user] = reply
        return self._known[system, user]


def score_caption(
    caption: str, facts: Sequence[tuple[str, str]], judge: Judge
) -> dict[str, float]:
    """VDCScore of a caption: the share of questions it answers, and the mean grade."""
    grades = []
    for question, answer in facts:
        found = judge(_ANSWERER, f"Description: {caption}\n\nQuestion: {question}")
        reply = judge(
            _GRADER,
            f"Question: {question}\nCorrect answer: {answer}\nGiven answer: {found}",
        )
        grades.append(parse_grade(reply))
    right, points = map(sum, zip(*grades, strict=True)) if grades else (0.0, 0.0)
    count = max(1, len(grades))
    return {"accuracy": right / count, "score": points / count}


def parse_grade(reply: str) -> tuple[float, float]:
    """(1 if they match, the grade) of a reply; one that cannot be read is (0, 0)."""
    found = re.search(r"\{.*?\}", reply, re.DOTALL)
    try:
        grade = ast.literal_eval(found[0]) if found else {}
        score = float(grade.get("score", 0))
        return float(str(grade.get("pred")).lower() == "yes"), min(max(score, 0.0), 5.0)
    except (SyntaxError, TypeError, ValueError, AttributeError):
        return 0.0, 0.0
