"""TimeViper as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval).

    lmms-eval --model timeviper_jax --model_args workdir=runs/video --tasks videomme

lmms-eval knows it by the entry point that `lmms_entry` describes, and brings its own
prompts; what of a video is watched, and how, is as in `published`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float16
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from timeviper_jax.data.conversation import Media, Turn
from timeviper_jax.data.items import Sampling
from timeviper_jax.data.video import probe
from timeviper_jax.evals import run, runner
from timeviper_jax.evals.base import Question


class TimeViperJax(lmms):
    """A run's latest checkpoint, asked by lmms-eval.

    Its arguments are strings: `workdir`, and the most and the fewest frames of a video.
    """

    is_simple = True

    def __init__(
        self,
        workdir: str,
        max_frames: int | str = 256,
        min_frames: int | str = 32,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        device: str | None = None,
    ):
        super().__init__()
        # lmms-eval always gives these; a run's config has its devices and its batches.
        del batch_size, max_batch_size, device
        self._run = run.load(workdir)
        self._frames = {"max_frames": int(max_frames), "min_frames": int(min_frames)}
        self._sampled = runner.sampled(self._run)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, cut before the first of a request's `until`."""
        args = [request.args for request in requests]
        asked = [self._question(i, a[0], *a[2:]) for i, a in enumerate(args)]
        limits = [int(a[1].get("max_new_tokens", 128)) for a in args]
        given = {}
        for most in sorted(set(limits)):
            some = [q for q, limit in zip(asked, limits, strict=True) if limit == most]
            given |= {question.id: text for question, text in self._answers(some, most)}
        return [_cut(given[q.id], a[1]) for q, a in zip(asked, args, strict=True)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The mean loss of each continuation, as lmms-eval's own models give it.

        And whether every token of it is the likeliest.
        """
        args = [request.args for request in requests]
        asked = [self._question(i, a[0], *a[2:]) for i, a in enumerate(args)]
        targets = [self._target(a[1], *a[3:]) for a in args]
        asker = self._asker(asked, max(len(target.encode()) for target in targets))
        pairs = tqdm(
            zip(asked, targets, strict=True), total=len(asked), unit="question"
        )
        return [asker.loss(question, target) for question, target in pairs]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            "lmms-eval's tasks of several rounds are not for this model; ask each round"
            " as a task of its own."
        )

    def _answers(self, questions: Sequence[Question], most: int) -> runner.Answered:
        asker = self._asker(questions, most)
        groups = runner.groups(questions, runner.SIZES.video_rows)
        bar = tqdm(groups, desc="timeviper_jax", unit="group")
        return [pair for group in bar for pair in asker(group)]

    def _asker(self, questions: Sequence[Question], most: int) -> runner.Asker:
        return runner.Asker(
            self._run,
            features=self._features,
            sizes=runner.roomy(runner.SIZES, self._run, questions, most),
            max_tokens=most,
        )

    def _target(self, target: str | Callable[[Any], str], *place: Any) -> str:
        return target if isinstance(target, str) else target(self._doc(*place))

    def _doc(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _question(
        self,
        number: int,
        context: str,
        doc_to_visual: Callable[[Any], list],
        doc_id: int,
        task: str,
        split: str,
    ) -> Question:
        """A request as a question; what it shows is one video, or images."""
        shown = doc_to_visual(self._doc(doc_id, task, split)) or []
        videos = [path for path in shown if isinstance(path, str)]
        if not shown or len(videos) > 1:
            raise ValueError(
                f"{task}/{doc_id} shows {len(shown)} things, {len(videos)} of them"
                " videos; this model looks at one video or at images."
            )
        video = videos[0] if videos else f"{task}/{doc_id}"
        times = self._times(video) if videos else np.arange(len(shown)) + 0.5
        return Question(
            id=str(number),
            video=video,
            times=times,
            turns=(Turn("user", (Media(len(times)), context)),),
            answer="",
            notes={"kind": task, "shown": shown},
        )

    def _times(self, video: str) -> np.ndarray:
        sampling = Sampling(**self._frames)
        rng = np.random.default_rng(0)
        most = self._frames["max_frames"]
        return sampling.times(0.0, probe(video).duration, rng, capacity=most)

    def _features(self, question: Question) -> Float16[np.ndarray, "F V E"]:
        shown = question.notes["shown"]
        if not isinstance(shown[0], Image.Image):
            return self._sampled(question)
        fit = self._run.model.cfg.fit
        pixels = [fit(np.asarray(image.convert("RGB"))) for image in shown]
        return self._encode(np.stack(pixels))

    @functools.cached_property
    def _encode(self) -> Callable:
        return self._run.encoder()


def _cut(text: str, options: Mapping[str, Any]) -> str:
    """What comes before the first of the texts that a request is asked `until`."""
    until = options.get("until") or []
    for end in [until] if isinstance(until, str) else until:
        text = text.split(end)[0]
    return text.strip()
