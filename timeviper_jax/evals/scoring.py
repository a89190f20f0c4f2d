"""Scores a model on a published benchmark, and can be killed at any moment.

Answers go to `answers.jsonl`, a line a question, on disk before the next ones are
asked. Several hosts share the questions by `shard`, each with a file of its own; who
runs without one reads them all, answers what is missing and scores.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from timeviper_jax.evals import page, report, runner, scores
from timeviper_jax.evals.base import Question, Record
from timeviper_jax.evals.families import DENSE, Tools
from timeviper_jax.evals.judge import HttpJudge, RecordedJudge
from timeviper_jax.evals.lines import Lines
from timeviper_jax.evals.meteor import Meteor
from timeviper_jax.evals.published import PublishedBenchmark
from timeviper_jax.evals.run import Run, digest

_NO_METEOR = "METEOR and SODA_c are left out: --meteor_jar names METEOR's program."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a benchmark is answered and scored."""

    out: pathlib.Path
    likeliest: bool = False  # Choose an option by its likelihood instead of writing.
    shard: tuple[int, int] = (0, 1)  # This host's number, and how many there are.
    replicas: int = 1  # Copies of the model on this host.
    worst: int = 20  # Answers shown on the page.

    def __post_init__(self):
        number, count = self.shard
        if not 0 <= number < count:
            raise ValueError(f"shard={number}/{count} is none of 0/{count} and so on.")


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/8" as (2, 8)."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit()):
        raise ValueError(f"shard={text!r} is not of the form 2/8.")
    return int(number), int(count)


def score(run_: Run, benchmark: PublishedBenchmark, plan: Plan) -> str:
    """Answers and scores it; returns what there is to print."""
    family = benchmark.spec.family
    if plan.likeliest and not family.prefix:
        raise ValueError(
            f"{benchmark.name} has no options to be likely; use --form generate."
        )
    questions = benchmark.questions()
    settings = _settings(run_, benchmark, plan)
    given = _answers(plan.out, settings)
    _ask(run_, benchmark, plan, questions, given, settings)
    if waiting := [q.id for q in questions if q.id not in given]:
        return (
            f"{len(questions) - len(waiting)} of {len(questions)} questions are"
            f" answered in {plan.out}; run it without --shard when all shards are done."
        )
    records = [runner.record(q, given[q.id], benchmark) for q in questions]
    return _write(benchmark, plan, questions, records, settings)


def _settings(run_: Run, benchmark: PublishedBenchmark, plan: Plan) -> dict[str, Any]:
    """What makes answers comparable; which questions are asked does not."""
    names = ("name", "max_frames", "min_frames", "subtitles")
    own = {name: getattr(benchmark, name) for name in names}
    model = digest(run_.model)
    return {
        "checkpoint": run_.step,
        "model": model,
        **own,
        "likeliest": plan.likeliest,
    }


def _answers(out: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Those that are there, from all shards."""
    files = sorted(out.glob("answers*.jsonl"))
    lines = [line for f in files for line in Lines(f, settings=settings).read()]
    return {line["id"]: line["given"] for line in lines}


def _ask(
    run_: Run,
    benchmark: PublishedBenchmark,
    plan: Plan,
    questions: list[Question],
    given: dict[str, str],
    settings: Mapping[str, Any],
) -> None:
    """Answers this shard's questions that are not in `given`, into it and its file."""
    number, count = plan.shard
    name = "answers.jsonl" if count == 1 else f"answers-{number}-of-{count}.jsonl"
    lines = Lines(plan.out / name, settings=settings)
    # What is asked together never depends on what is answered: so neither do answers.
    mine = runner.groups(questions, runner.SIZES.video_rows)[number::count]
    todo = [g for g in mine if any(q.id not in given for same in g for q in same)]
    if not todo:
        return
    bar = tqdm(
        total=sum(len(same) for group in mine for same in group),
        initial=sum(q.id in given for group in mine for same in group for q in same),
        desc=benchmark.name,
        unit="question",
    )
    askers = _askers(run_, benchmark, plan, questions)
    with bar, contextlib.closing(runner.answer(askers, todo)) as answered:
        for some in answered:
            new = {q.id: text for q, text in some if q.id not in given}
            lines.append([{"id": id_, "given": text} for id_, text in new.items()])
            given |= new
            bar.update(len(new))


def _askers(
    run_: Run,
    benchmark: PublishedBenchmark,
    plan: Plan,
    questions: list[Question],
) -> list[runner.Ask]:
    most = benchmark.spec.family.max_tokens
    sizes = runner.roomy(runner.SIZES, run_, questions, most)
    return [
        runner.Asker(
            copy,
            features=runner.sampled(copy),
            sizes=sizes,
            max_tokens=most,
            likeliest=plan.likeliest,
        )
        for copy in runner.replicas(run_, plan.replicas)
    ]


def _write(
    benchmark: PublishedBenchmark,
    plan: Plan,
    questions: list[Question],
    records: list[Record],
    settings: Mapping[str, Any],
) -> str:
    groups = {entry.id: entry.groups for entry in benchmark.entries}
    spec, out = benchmark.spec, plan.out
    found = scores.summarise(records, groups, mean_of=spec.mean_of, seed=benchmark.seed)
    printed = scores.table(found, spec.family.main)
    printed += (
        f"\n{scores.unparsed(records)} of {len(records)} answers unparsed (wrong)"
    )
    if spec.mean_of:
        printed += f"\nall: the mean over each {spec.mean_of}"
    if spec.family is DENSE and benchmark.tools.meteor is None:
        printed += f"\n{_NO_METEOR}"
    report.write_records(out / "records.json", records)
    results = {
        "benchmark": benchmark.name,
        "settings": settings,
        "mean_of": spec.mean_of or "question",
        "unparsed": scores.unparsed(records),
        "scores": scores.as_json(found),
    }
    report.write_json(out / "results.json", results)
    page.write(
        out / "worst.html",
        benchmark.name,
        printed,
        questions,
        records,
        main=spec.family.main,
        worst=plan.worst,
    )
    return f"{printed}\nWritten: {out}/results.json, records.json, worst.html"


@contextlib.contextmanager
def tools(
    name: str, out: pathlib.Path, *, judge: str, judge_model: str, meteor_jar: str
) -> Iterator[Tools]:
    """The judge that VDC needs, the program that dense captions can use."""
    if name == "vdc":
        asked = HttpJudge(judge, judge_model) if judge else None
        yield Tools(judge=RecordedJudge(out / "judge.jsonl", asked))
    elif name == "youcook2" and meteor_jar:
        with Meteor(meteor_jar) as meteor:
            yield Tools(meteor=meteor)
    else:
        yield Tools()
