r"""Scores a trained TimeViper on the needle questions, or asks it about a video.

python eval.py --workdir runs/needles --data data/needles
python eval.py --workdir runs/needles --data data/needles --frames 32,512 --kinds when
python eval.py --workdir runs/video --benchmark videomme --data data/videomme
python eval.py --workdir runs/needles --video holiday.mp4 --ask "When is the cat shown?"
python eval.py --workdir runs/needles --video holiday.mp4 --interactive

Scores go to the run's directory: `eval/results.json`, `eval/records.json` (every
answer) and `eval/needles.png`. A video is any file that PyAV opens, an image, or a
folder of images; it is watched once, whatever the number of questions, while it is
being decoded, and its encoded frames are kept for the next time (docs/long_video.md).
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import app, flags, logging

from timeviper_jax.data.needle_questions import KINDS
from timeviper_jax.data.redundancy import changed_times
from timeviper_jax.data.tokenizer import Tokenizer
from timeviper_jax.data.video import VideoError
from timeviper_jax.evals import report, run, runner, scoring
from timeviper_jax.evals.needles import FRAMES, NeedleBenchmark
from timeviper_jax.evals.published import SPECS, PublishedBenchmark
from timeviper_jax.evals.watched import Asking, Watched, watch
from timeviper_jax.inference.sampling import Decoding


class Answer:
    """An answer on its way to the terminal: what is new of its text, as it comes."""

    def __init__(self, run_: run.Run):
        self._tokenizer = run_.tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def __call__(self, _: int, ids: list[int]) -> None:
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        # Bytes that are not a character yet may become one.
        self._print(text.rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self, truth: str | None) -> None:
        text = self._tokenizer.decode(self._ids)
        self._print(text + (f"    (true: {truth})\n" if truth else "\n"))

    def _print(self, text: str) -> None:
        print(text[self._shown :], end="", flush=True)
        self._shown = len(text)


def ask(values: flags.FlagValues) -> None:
    """Answers questions about one video, word by word."""
    if values.truth and len(values.truth) != len(values.ask):
        raise ValueError(
            f"{len(values.truth)} --truth for {len(values.ask)} --ask; give each one."
        )
    if empty := [question for question in values.ask if not question.strip()]:
        raise ValueError(f"The question {empty[0]!r} is empty; ask something.")
    times = run.watch_times(values.video, values.max_frames)
    run_ = run.load(values.workdir)
    if values.repeats == "merge":
        run_ = run_.merging(values.redundancy)
    elif values.redundancy:
        fit = run_.model.cfg.fit
        times = changed_times(values.video, times, fit, values.redundancy)
    asking = Asking(
        decoding=Decoding(
            max_tokens=values.max_tokens,
            stop_ids=run_.template.stop_ids(run_.tokenizer),
            temperature=values.temperature,
            top_k=values.top_k,
            top_p=values.top_p,
        ),
        question_tokens=_room(run_.tokenizer, values.ask),
        answer_prefix=values.answer_prefix,
        seed=values.seed,
    )
    video = watch(run_, values.video, times, asking)
    truths = values.truth or [None] * len(values.ask)
    for question, truth in zip(values.ask, truths, strict=True):
        print(f"{question}\n  ", end="")
        answer(video, question, truth)
    if values.interactive:
        ask_typed(video)


def _room(tokenizer: Tokenizer, questions: Sequence[str]) -> int:
    """Tokens for the longest question with its template, and for any usual one."""
    longest = max(
        (len(tokenizer.encode(question)) for question in questions), default=0
    )
    return longest + 256


def ask_typed(video: Watched) -> None:
    """Answers the questions that are typed, a line each, until there are no more."""
    while question := _typed():
        try:
            answer(video, question)
        except ValueError as error:
            print(f"error: {error}")


def _typed() -> str:
    try:
        return input("Question: " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def answer(video: Watched, question: str, truth: str | None = None) -> None:
    print(video.asking.answer_prefix, end="", flush=True)
    text = Answer(video.run)
    video.ask(question, on_tokens=text)
    text.end(truth)


def score(values: flags.FlagValues) -> None:
    """Asks the benchmark's questions and writes what came of it."""
    benchmark = NeedleBenchmark(
        data=values.data,
        split=values.split,
        frames=tuple(map(int, values.frames)),
        kinds=tuple(values.kinds),
        max_questions=values.max_questions,
        seed=values.seed,
    )
    questions = benchmark.questions()
    run_ = run.load(values.workdir)
    out = pathlib.Path(values.out or pathlib.Path(values.workdir) / "eval")
    run.encode_missing(run_, [question.video for question in questions])

    # First, for they may say that there is too little to compare.
    controls = run_controls(run_, benchmark) if values.controls else {}
    records = runner.run(run_, benchmark)
    results = report.summarise(records, run_.compression, seed=values.seed)
    report.write_records(out / "records.json", records)
    report.write_json(
        out / "results.json",
        {
            "results": [dataclasses.asdict(result) for result in results],
            "controls": controls,
        },
    )
    report.plot({run_.compression: records}, out / "needles.png")
    print(report.table(results))
    for name, control in controls.items():
        print(f"{name}: {report.percent(control)} ({control['count']} questions)")
    print(f"Written: {out}/results.json, records.json, needles.png")


def run_controls(run_: run.Run, benchmark: NeedleBenchmark) -> dict[str, dict]:
    """Choices among four at the shortest length, without the right thing to see."""
    easy = dataclasses.replace(
        benchmark, kinds=("mcq",), frames=(min(benchmark.frames),)
    )
    questions = easy.questions()
    controls = {
        "text_only": runner.zeroed(run_),
        "vision_shuffled": runner.shuffled(run_, questions),
    }
    found = {}
    for name, features in controls.items():
        records = runner.run(run_, easy, features=features)
        (result,) = report.summarise(records, run_.compression)
        found[name] = dataclasses.asdict(result) | {"chance": 0.25}
    return found


def score_published(values: flags.FlagValues) -> None:
    """Asks a published benchmark's questions; stopped at any moment, it goes on."""
    if not values["data"].present:
        raise ValueError(f"Name the folder of {values.benchmark}: --data DIR.")
    name, workdir = values.benchmark, pathlib.Path(values.workdir)
    out = pathlib.Path(values.out or workdir / "eval" / name)
    plan = scoring.Plan(
        out=out,
        likeliest=values.form == "likelihood",
        shard=scoring.parse_shard(values.shard),
        replicas=values.replicas,
        worst=values.worst,
    )
    with scoring.tools(
        name,
        out,
        judge=values.judge,
        judge_model=values.judge_model,
        meteor_jar=values.meteor_jar,
    ) as tools:
        benchmark = PublishedBenchmark(
            name=name,
            data=values.data,
            max_frames=values.benchmark_frames,
            subtitles=values.subtitles,
            only=tuple(values.only),
            limit=values.limit,
            seed=values.seed,
            skip_missing=values.skip_missing,
            tools=tools,
        )
        # What the folder lacks should be known before a model is loaded.
        logging.info("%d questions of %s.", len(benchmark.entries), name)
        print(scoring.score(run.load(workdir), benchmark, plan))


def define_flags(values: flags.FlagValues) -> None:
    """The command line; the model's own settings come with its checkpoint."""
    here = dict(flag_values=values)
    text, integer = flags.DEFINE_string, flags.DEFINE_integer
    text("workdir", None, "The run whose latest checkpoint is meant.", **here)
    text("compilation_cache", "", "A folder to keep compiled programs in.", **here)
    integer("seed", 0, "Decides what is drawn: questions, videos, tokens.", **here)
    # Scores.
    text("data", "data/needles", "The needle data.", **here)
    text("split", "heldout", "Which of its splits.", **here)
    flags.DEFINE_list("frames", [*map(str, FRAMES)], "Lengths of videos.", **here)
    flags.DEFINE_list("kinds", [*KINDS], "Kinds of questions.", **here)
    integer("max_questions", 0, "Of each length and kind; 0 for all.", **here)
    flags.DEFINE_bool("controls", False, "Also ask without the right video.", **here)
    text("out", "", "Where to write; WORKDIR/eval by default.", **here)
    # Published benchmarks: docs/evaluation.md.
    names = ["needles", *SPECS]
    flags.DEFINE_enum("benchmark", "needles", names, "What is asked.", **here)
    flags.DEFINE_bool("subtitles", False, "Also show what is said.", **here)
    flags.DEFINE_multi_string("only", [], "Ids or groups (task=count, *).", **here)
    integer("limit", 0, "Draw so many questions by --seed; 0: all.", **here)
    integer("benchmark_frames", 256, "A video's most frames.", **here)
    forms = ["generate", "likelihood"]
    flags.DEFINE_enum("form", "generate", forms, "How options are chosen.", **here)
    text("shard", "0/1", "This host's part of the questions, as 2/8.", **here)
    integer("replicas", 1, "Copies of the model on this host's devices.", **here)
    integer("worst", 20, "Answers shown in worst.html.", **here)
    flags.DEFINE_bool("skip_missing", False, "Leave out lost videos.", **here)
    text("judge", "", "Who judges captions: http://HOST:PORT/v1.", **here)
    text("judge_model", "", "The judge's name for its model.", **here)
    text("meteor_jar", "", "Where meteor-1.5.jar is.", **here)
    # Questions.
    text("video", None, "A video, an image, or a folder of images.", **here)
    flags.DEFINE_multi_string("ask", [], "A question about --video.", **here)
    flags.DEFINE_bool("interactive", False, "Then read questions, a line each.", **here)
    flags.DEFINE_multi_string("truth", [], "Shown beside the answer.", **here)
    integer("max_frames", 10_240, "Of a longer video, so many evenly.", **here)
    flags.DEFINE_float(
        "redundancy", 0.0, "Encode no frame that differs less (0 to 1).", **here
    )
    flags.DEFINE_enum(
        "repeats", "merge", ["merge", "skip"], "What becomes of such frames.", **here
    )
    integer("max_tokens", 64, "An answer's most tokens.", **here)
    text("answer_prefix", "", 'How answers begin ("Best Option: (").', **here)
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", **here)
    integer("top_k", 0, "Draw among so many tokens; 0: all.", **here)
    flags.DEFINE_float("top_p", 1.0, "Draw among the likeliest this share.", **here)
    flags.mark_flags_as_required(["workdir"], values)


def execute(values: flags.FlagValues) -> None:
    """Does what the flags say; what it cannot do it says in one line."""
    try:
        if bool(values.video) != bool(values.ask or values.interactive):
            raise ValueError(
                "Give --video together with --ask or --interactive, or none of them."
            )
        if values.video:
            ask(values)
        elif values.benchmark == "needles":
            score(values)
        else:
            score_published(values)
    except (BlockingIOError, FileNotFoundError, ValueError, VideoError) as error:
        sys.exit(f"error: {error}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1:]} are no flags; flags begin with --.")
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    if values.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", values.compilation_cache)
    execute(values)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
