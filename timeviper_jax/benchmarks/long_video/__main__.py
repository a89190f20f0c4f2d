r"""Hours of video on one small machine: memory, seconds a frame, second questions.

python -m timeviper_jax.benchmarks.long_video --json
python -m timeviper_jax.benchmarks.long_video --workdir runs/demo/transv --out \
    timeviper_jax/benchmarks/results

Makes a film once (640 × 360, a frame a second, from real clips), then measures each
length of it in a process of its own: peak resident memory, the bytes that are kept,
and seconds by part. Without `--workdir` the weights are random, which costs the same.
An open-ended video is fed the film over and over, through the real encoder. Linux only.

`seconds_per_frame` is that of watching: decoding, encoding and the language model at
work together, without start-up and compilation; the seconds of each part overlap, so
that they do not add up. `--resume` takes what an interrupted run has measured.
"""

import argparse
import datetime
import hashlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from timeviper_jax.benchmarks.long_video import film
from timeviper_jax.data.needle_sources import SourceError

MIB = 1 << 20
# What the project asks for (see docs/long_video.md).
ROOM_MIB = 300
FLAT, CONSTANT = 0.15, 0.05
SAME_PROCESS, NEW_PROCESS = 0.02, 0.25


def measure(args: argparse.Namespace, name: str, part: str, *lengths: int) -> dict:
    """What a process of its own measures of lengths of video."""
    kept = args.data / "parts" / f"{_key(args)}-{name}.json"
    if args.resume and kept.exists():
        return json.loads(kept.read_text())
    print(f"== {name}", file=sys.stderr, flush=True)
    # The Makefile's settings keep freed memory, which would count as the model's.
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    env |= {
        "JAX_COMPILATION_CACHE_DIR": str(args.data / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "timeviper_jax.benchmarks.long_video.measure"]
    command += [part, *map(str, lengths), "--workdir", args.workdir]
    command += ["--preset", args.preset, "--store", str(args.data / "store")]
    command += ["--film", str(_film(args)), "--film_frames", str(args.film_frames)]
    start = time.perf_counter()
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"error: {name!r} failed; its own words are above.")
    result = json.loads(done.stdout) | {"process_seconds": time.perf_counter() - start}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(result))
    return result


def _key(args: argparse.Namespace) -> str:
    said = repr((args.workdir, args.preset, args.film_frames))
    return hashlib.blake2b(said.encode(), digest_size=4).hexdigest()


def _film(args: argparse.Namespace) -> pathlib.Path:
    return args.data / f"film_{args.film_frames}.mp4"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, as it is written."""
    if not _film(args).exists():
        try:
            film.make(_film(args), args.film_frames)
        except SourceError as error:
            raise SystemExit(f"error: {error}") from error
    # Compiling takes more memory than watching: it is done before, and kept.
    measure(args, "programs", "compile", *args.frames)
    started = measure(args, "start-up", "start_up")
    watched = {length: _watch(args, length) for length in args.frames}
    longest = args.frames[-1]  # Whose encoded frames are still there.
    again = measure(args, f"{longest} frames again", "watch", longest)
    shutil.rmtree(args.data / "store", ignore_errors=True)
    fed = measure(args, f"open end {args.open_frames}", "open_ended", args.open_frames)
    results = {
        **_circumstances(args),
        "start_up": {
            "peak_rss_mib": _mib(started["peak_bytes"]),
            "seconds": round(started["process_seconds"], 2),
        },
        **by_frames(watched),
        "second_question": second_question(watched[longest], again, longest),
        "open_ended": open_ended(fed),
    }
    return results | {"goals": goals(results)}


def _watch(args: argparse.Namespace, length: int) -> dict:
    """The first `length` frames of the film, none of them encoded before."""
    shutil.rmtree(args.data / "store", ignore_errors=True)
    return measure(args, f"{length} frames", "watch", length)


def _circumstances(args: argparse.Namespace) -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    git = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always"]
    commit = subprocess.run([*git, "--dirty"], capture_output=True, text=True).stdout
    weights = f"trained: {args.workdir}" if args.workdir else f"random: {args.preset}"
    return {
        "command": "python -m timeviper_jax.benchmarks.long_video",
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip() or "unknown",
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), "
        f"{pages / (1 << 30):.0f} GiB, load {os.getloadavg()[0]:.1f}",
        "weights": weights,
        "video": f"{film.WIDTH}x{film.HEIGHT}, 1 frame a second, H.264, "
        f"{args.film_frames} frames, {_film(args).stat().st_size >> 20} MiB",
    }


def by_frames(watched: Mapping[int, dict]) -> dict[str, dict[int, Any]]:
    """The measures of each length, by the number of its frames."""
    return {
        "peak_rss_mib": {n: _mib(w["peak_bytes"]) for n, w in watched.items()},
        "kept_mib": {n: _mib(sum(_kept(w).values())) for n, w in watched.items()},
        "kept_parts_mib": {
            n: {part: _mib(size) for part, size in _kept(w).items()}
            for n, w in watched.items()
        },
        "kept_bytes_per_frame": {
            n: round((sum(w["filled_bytes"].values()) + w["encoded_bytes"]) / n)
            for n, w in watched.items()
        },
        "seconds_per_frame": {
            n: _round(w["seconds"]["watch"] / n) for n, w in watched.items()
        },
        "seconds_by_part": {
            n: {part: _round(took) for part, took in w["seconds"].items()}
            for n, w in watched.items()
        },
        "answer": {n: w["answer"] for n, w in watched.items()},
    }


def _kept(measured: dict) -> dict[str, int]:
    """Bytes of caches at their capacity, and of the encoded tokens in their file."""
    names = dict(attention="kv_cache", transfer="dropped_keys_values")
    parts = {names.get(k, k): size for k, size in measured["kept_bytes"].items()}
    return parts | {"encoded_tokens": measured["encoded_bytes"]}


def second_question(first: dict, again: dict, frames: int) -> dict[str, Any]:
    """Seconds of questions about a video: the first, the next, one in a new process."""
    total = lambda seconds: seconds["watch"] + seconds["answer"]
    whole, new = total(first["seconds"]), total(again["seconds"])
    same = first["seconds"]["second answer"]
    return {
        "frames": frames,
        "first_seconds": _round(whole),
        "same_process_seconds": _round(same),
        "same_process_share": _round(same / whole),
        "new_process_seconds": _round(new),
        "new_process_share": _round(new / whole),
    }


def open_ended(fed: dict) -> dict[str, Any]:
    """How memory and seconds went while frames came; a tenth of them to settle."""
    samples = fed["samples"]
    frames = samples[-1]["frames"]
    settled = [s for s in samples if s["frames"] >= frames / 10]
    apart = [s["resident_bytes"] - s["cache_bytes"] for s in settled]
    mean = sum(apart) / len(apart)
    seconds = settled[-1]["seconds"] - settled[0]["seconds"]
    return {
        "frames": frames,
        "source": "the film over and over, decoded and encoded each time",
        "selection": f"{fed['policy']}, within {fed['block_frames']} frames",
        "peak_rss_mib": _mib(fed["peak_bytes"]),
        "rss_mib": {s["frames"]: _mib(s["resident_bytes"]) for s in samples},
        "cache_mib": _mib(samples[-1]["cache_bytes"]),
        "apart_from_caches_mib": _mib(mean),
        "apart_from_caches_varies": _round(max(abs(a - mean) for a in apart) / mean),
        "cache_bytes_per_frame": {
            "kv_cache": round(fed["filled_bytes"]["attention"] / frames),
            "dropped_keys_values": round(fed["filled_bytes"]["transfer"] / frames),
        },
        "seconds_per_frame": _round(seconds / (frames - settled[0]["frames"])),
        "answer_seconds": {n: _round(took) for n, took in fed["answers"]},
    }


def goals(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was asked for, what came, and whether it is met."""
    peak, kept = results["peak_rss_mib"], results["kept_mib"]
    shortest, *_, longest = sorted(peak)
    pace = [s for n, s in results["seconds_per_frame"].items() if 1024 <= n <= 10_240]
    rise = peak[longest] - peak[shortest] - kept[longest]
    second, ended = results["second_question"], results["open_ended"]
    found = {
        f"peak of {longest} frames - of {shortest} - kept, MiB": (rise, ROOM_MIB),
        "open end: memory apart from caches varies by": (
            ended["apart_from_caches_varies"],
            CONSTANT,
        ),
        "second question, same process": (second["same_process_share"], SAME_PROCESS),
        "second question, new process": (second["new_process_share"], NEW_PROCESS),
    }
    if pace:
        name = "seconds a frame, 1,024 to 10,240 frames, vary by"
        found[name] = (_round(max(pace) / min(pace) - 1), FLAT)
    return {
        name: {"measured": value, "at most": most, "met": bool(value <= most)}
        for name, (value, most) in found.items()
    }


def _mib(size: int | float) -> float:
    return round(size / MIB, 2)


def _round(value: int | float) -> float:
    return float(f"{value:.4g}")


def table(results: dict[str, Any]) -> str:
    """The same to be read by people."""
    lines = [f"{results['machine']}; weights {results['weights']}", ""]
    lines += ["    frames  peak MiB  kept MiB  ms/frame  first answer s"]
    for n, peak in results["peak_rss_mib"].items():
        ms = 1000 * results["seconds_per_frame"][n]
        answer = results["seconds_by_part"][n]["answer"]
        kept = results["kept_mib"][n]
        lines += [f"{n:10,} {peak:9.1f} {kept:9.2f} {ms:9.3f} {answer:15.3f}"]
    lines += ["", *(f"{k}: {v}" for k, v in results["open_ended"].items())]
    lines += ["", *(f"{k}: {v}" for k, v in results["second_question"].items()), ""]
    for name, goal in results["goals"].items():
        met = "met" if goal["met"] else "MISSED"
        lines += [f"{met:6}  {name}: {goal['measured']} (at most {goal['at most']})"]
    return "\n".join(lines)


def _lengths(text: str) -> list[int]:
    lengths = sorted({int(part) for part in text.split(",")})
    if lengths[0] < 1 or len(lengths) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not two or more lengths.")
    return lengths


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, folder = parser.add_argument, pathlib.Path
    add("--workdir", default="", help="a trained run; random weights without")
    add("--preset", default="small", help="the sizes of random weights")
    add("--data", type=folder, default=folder("data/long_video"), help="film and cache")
    add("--frames", type=_lengths, default=_lengths("256,1024,4096,10240,10800"))
    add("--film_frames", type=int, default=10_800)
    add("--open_frames", type=int, default=100_000)
    add("--resume", action="store_true", help="take what is measured already")
    add("--json", action="store_true", help="print JSON, not a table")
    add("--out", type=folder, default=None, help="a folder for the JSON, too")
    args = parser.parse_args(argv)
    if args.frames[-1] > args.film_frames:
        parser.error(
            f"--frames {args.frames[-1]} of a film of {args.film_frames}; make it"
            " longer with --film_frames."
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if not args.workdir:
        print("No --workdir: random weights, wrong answers.", file=sys.stderr)
    results = run(args)
    text = json.dumps(results, indent=1)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"long_video_{results['date']}.json").write_text(text + "\n")
    print(text if args.json else table(results))


if __name__ == "__main__":
    main()
