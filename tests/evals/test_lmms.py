"""The plugin of lmms-eval, against the interface that lmms-eval 0.7.3 documents.

lmms-eval itself wants a virtual environment of its own (docs/evaluation.md): what
stands in for it here has just the names and arguments that its models are written to.
"""

import abc
import dataclasses
import importlib
import pathlib
import sys
import tomllib
import types

import numpy as np
import published_fixtures as fixtures
import pytest
from PIL import Image

from timeviper_jax.evals import run, runner

ROOT = pathlib.Path(__file__).parent.parent.parent


class Lmms(abc.ABC):
    """`lmms_eval.api.model.lmms`: what a model has to answer."""

    is_simple = True

    def __init__(self):
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclasses.dataclass
class Instance:
    """`lmms_eval.api.instance.Instance`: a request; `args` hold all of it."""

    args: tuple


@dataclasses.dataclass
class ModelManifest:
    """`lmms_eval.models.registry_v2.ModelManifest`."""

    model_id: str
    simple_class_path: str


class FakeAsker:
    """Says how many frames a question has and what was asked."""

    def __init__(self, run_, *, features, sizes, max_tokens):
        self._features, self._most = features, max_tokens

    def __call__(self, group):
        return [(q, self._say(q)) for same in group for q in same]

    def loss(self, question, continuation):
        return float(len(continuation)), continuation == "yes"

    def _say(self, question):
        media, text = question.turns[0].content
        return f" {text}: {media.num_frames} of {self._most}\n\nAnd more."


@pytest.fixture
def lmms_eval(monkeypatch):
    stubs = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"Instance": Instance},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, members in stubs.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    yield
    sys.modules.pop("timeviper_jax.evals.lmms", None)


@pytest.fixture
def model(lmms_eval, monkeypatch, tmp_path):
    """The plugin as its entry point names it, with a model that needs no weights."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    place = entry["entry-points"]["lmms_eval.models"]["timeviper_jax"]
    module, function = place.split(":")
    manifest = getattr(importlib.import_module(module), function)()
    assert manifest.model_id == "timeviper_jax"
    module, name = manifest.simple_class_path.rsplit(".", 1)
    monkeypatch.setattr(run, "load", lambda workdir: object.__new__(run.Run))
    monkeypatch.setattr(runner, "sampled", lambda run_: lambda question: None)
    monkeypatch.setattr(runner, "roomy", lambda sizes, *_: sizes)
    monkeypatch.setattr(runner, "Asker", FakeAsker)
    plugin = getattr(importlib.import_module(module), name)
    model = plugin(
        workdir="runs/x", max_frames="8", min_frames="4", batch_size="1", device="cuda"
    )
    video = str(fixtures.write_video(tmp_path / "v.mp4", 6))
    pictures = [Image.new("RGB", (8, 8))] * 3
    docs = [
        {"q": "one", "shown": [video], "says": "yes"},
        {"q": "two", "shown": pictures, "says": "no way"},
        {"q": "none", "shown": []},
        {"q": "both", "shown": [video, video]},
    ]
    model.task_dict = {"task": {"test": docs}}
    return model


def request(doc_id: int, argument: object) -> Instance:
    place = (lambda doc: doc["shown"], doc_id, "task", "test")
    return Instance((("one", "two", "none", "both")[doc_id], argument, *place))


def test_answers_come_in_the_order_of_requests_and_end_where_asked(model):
    kwargs = [{"max_new_tokens": 16, "until": ["\n\n"]}, {"until": "more"}]
    found = model.generate_until(
        [request(1, kwargs[0]), request(0, kwargs[1]), request(0, kwargs[0])]
    )
    # A video of six seconds, at a frame a second; images as they are.
    assert found == ["two: 3 of 16", "one: 6 of 128\n\nAnd", "one: 6 of 16"]


def test_continuations_are_texts_or_made_of_the_document(model):
    requests = [request(0, "yes"), request(1, lambda doc: doc["says"])]
    assert model.loglikelihood(requests) == [(3.0, True), (6.0, False)]


@pytest.mark.parametrize("doc_id, says", [(2, "0 things"), (3, "2 of them videos")])
def test_what_cannot_be_shown_is_named(model, doc_id, says):
    with pytest.raises(ValueError, match=f"task/{doc_id} shows.*{says}"):
        model.generate_until([request(doc_id, {})])


def test_several_rounds_are_refused(model):
    with pytest.raises(NotImplementedError, match="a task of its own"):
        model.generate_until_multi_round([])


def test_images_are_fitted_as_the_encoder_wants_them(model, monkeypatch):
    seen = []
    cfg = types.SimpleNamespace(fit=lambda pixels: pixels[:4, :4])
    object.__setattr__(model._run, "model", types.SimpleNamespace(cfg=cfg))
    encode = lambda frames: seen.append(frames) or np.zeros((len(frames), 1, 2), "f2")
    monkeypatch.setattr(run.Run, "encoder", lambda self: encode)
    question = model._question(0, "two", *request(1, {}).args[2:])
    assert model._features(question).shape == (3, 1, 2)
    assert seen[0].shape == (3, 4, 4, 3)
