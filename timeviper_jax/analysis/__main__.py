r"""What a model looks at in a video while it answers a question, as one HTML page.

python -m timeviper_jax.analysis holiday.mp4 --workdir runs/demo/transv \
    --ask "When is the cat shown?" --out runs/demo/transv/look

`DIR/index.html` shows attention maps and the implicit attention of Mamba-2 layers by
regions of the prompt, which frames the last tokens of the question and of the answer
read, layer by layer, and what TransV keeps; `--picture` adds pictures made elsewhere
(the curves of `timeviper_jax.analysis.flow`, a needle map). The page needs no other
file. `DIR/maps.npz` holds its numbers. Seconds, on the clock and of all
processors, and peak memory are printed.
"""

import argparse
import pathlib
import resource
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float64

from timeviper_jax.analysis import page
from timeviper_jax.analysis.plots import Thumbnails
from timeviper_jax.analysis.reading import Reading, read
from timeviper_jax.data.conversation import Media, Turn, encode_prompt
from timeviper_jax.data.examples import Example
from timeviper_jax.data.images import Fit
from timeviper_jax.data.video import VideoError, read_frames
from timeviper_jax.evals import run as runs
from timeviper_jax.evals.watched import Asking, watch
from timeviper_jax.inference.sampling import Decoding

_THUMBNAILS, _PIXELS = 12, 64
_AT_ONCE = 256  # Frames read at a time.


def look(args: argparse.Namespace) -> Reading:
    """Asks, reads every layer, and writes the page."""
    times = runs.watch_times(args.video, args.max_frames)
    run_ = runs.load(args.workdir)
    answer = args.answer or _ask(run_, args, times)
    example = _example(run_, args, times, answer)
    reading = read(run_.model, example, num_groups=args.groups)
    cfg = run_.model.cfg
    about = page.About(
        video=str(args.video),
        question=args.ask,
        answer=answer,
        workdir=str(args.workdir),
        pattern=cfg.llm.pattern,
        tokens_per_frame=cfg.tokens_per_frame,
        times=times,
        thumbnails=_thumbnails(args.video, times),
    )
    page.write(args.out / "index.html", about, reading, args.picture)
    _write_numbers(args.out / "maps.npz", reading)
    return reading


def _ask(
    run_: runs.Run, args: argparse.Namespace, times: Float64[np.ndarray, "F"]
) -> str:
    stops = run_.template.stop_ids(run_.tokenizer)
    asking = Asking(decoding=Decoding(max_tokens=args.max_tokens, stop_ids=stops))
    return watch(run_, args.video, times, asking).ask(args.ask)


def _example(
    run_: runs.Run,
    args: argparse.Namespace,
    times: Float64[np.ndarray, "F"],
    answer: str,
) -> Example:
    """The prompt with the answer, and all the frames."""
    with runs.encoded(run_, args.video, times) as features:
        parts = [
            np.asarray(features[start : start + _AT_ONCE])
            for start in range(0, len(times), _AT_ONCE)
        ]
    text = encode_prompt(
        [Turn("user", (Media(len(times)), args.ask))],
        run_.tokenizer,
        run_.template,
        tokens_per_frame=run_.model.cfg.tokens_per_frame,
        answer_prefix=answer,
    )
    return Example(
        tokens=text.tokens,
        roles=text.roles,
        loss_mask=text.loss_mask,
        frame_times=times.astype(np.float32),
        features=np.concatenate(parts).astype(np.float32),
    )


def _thumbnails(video: pathlib.Path, times: Float64[np.ndarray, "F"]) -> Thumbnails:
    """A few frames, evenly over the video, by their number."""
    count = min(_THUMBNAILS, len(times))
    middles = (np.arange(count) + 0.5) * len(times) / count
    index = middles.astype(int)
    frames = read_frames(video, times[index], Fit(size=_PIXELS, resize="letterbox"))
    return {int(i): frame for i, frame in zip(index, frames, strict=True)}


def _write_numbers(path: pathlib.Path, reading: Reading) -> None:
    arrays = {"names": np.array(reading.regions.names)}
    for layer in reading.layers:
        for name in ("regions", "sizes", "undriven", "readers"):
            values = getattr(layer, name)
            if values is not None:
                arrays[f"{layer.layer}.{layer.kind}.{name}"] = values
    arrays |= {f"kept {name}": counts for name, counts in reading.kept.items()}
    np.savez_compressed(path, **arrays)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    if not args.ask.strip():
        sys.exit("error: The question is empty; ask something.")
    start = time.perf_counter()
    try:
        look(args)
    except (FileNotFoundError, ValueError, VideoError) as error:
        sys.exit(f"error: {error}")
    seconds, used = (
        time.perf_counter() - start,
        resource.getrusage(resource.RUSAGE_SELF),
    )
    print(
        f"Written: {args.out}/index.html, maps.npz"
        f" ({seconds:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of processor time,"
        f" peak {used.ru_maxrss / 1024:.0f} MiB, {jax.default_backend()})"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("video", type=pathlib.Path, help="a video, an image, or a folder of images")
    add("--workdir", required=True, help="the run whose latest checkpoint is meant")
    add("--ask", required=True, help="a question about the video")
    add("--answer", default="", help="look at this answer instead of the model's own")
    add("--out", type=pathlib.Path, required=True, help="where to write")
    add("--groups", type=int, default=64, help="of frames, that maps tell apart")
    add("--max_frames", type=int, default=10_240, help="of a longer video, evenly")
    add("--max_tokens", type=int, default=64, help="an answer's most tokens")
    add(
        "--picture",
        type=pathlib.Path,
        action="append",
        default=[],
        help="a PNG to show too",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
