"""What config files share: the argument after the colon, models, when to give up."""

import ml_collections

# An update is skipped if its loss or gradient is no number, or (with a window of losses
# to tell by) its loss a spike; so many in a row end the run.
GUARD = dict(max_skips=10, spike_window=0, spike_deviations=6.0)

# Seconds of a single stay in each phase of a run, after which it hangs and is ended.
LIMITS = dict(
    setup=86_400.0,
    compile=7_200.0,
    data=1_800.0,
    step=1_800.0,
    save=3_600.0,
    eval=7_200.0,
)

# The most that a media file of the data may be; the kinds that are read stand with
# `timeviper_jax.data.media.MediaLimits`.
MEDIA = dict(
    max_bytes=64 << 30,
    max_pixels=1 << 26,
    max_frames=20_000_000,
    max_seconds=604_800,
    max_fps=1_000,
)

# Processes that decode, and what one may take for a file; a count of 0 decodes in the
# threads of the input itself, for data that are trusted.
WORKERS = dict(count=0, memory_bytes=4 << 30, cpu_seconds=120, wall_seconds=1_200)

# From where media may be fetched that a manifest names by URL, each as the beginning of
# URLs ("https://host/clips/"); to where, and how much at most.
URLS = dict(
    allow=(),
    folder="data/fetched",
    max_bytes=1 << 30,
    max_folder_bytes=1 << 40,
    seconds=600,
    threads=8,
)

# What goes with a language model: the tokenizer that its checkpoint comes with, its
# template, and where TransV stands. The 9B's layers are the paper's, which names none
# for the others. Theirs are ours, at the same depth: 1/8 and 7/10 of the layers, the
# second one of attention. A transformer's layer is two of these, and is not cut in two.
MODELS = {
    "nano_9b": dict(
        tokenizer="data/nano/tokenizer.json", template="nano", transv_layers=(7, 39)
    ),
    "nano_12b": dict(
        tokenizer="data/nano/tokenizer.json", template="nano", transv_layers=(7, 43)
    ),
    "qwen2_7b": dict(
        tokenizer="data/qwen2.5/tokenizer.json",
        template="chatml",
        transv_layers=(8, 40),
    ),
}

_BOOLS = {"": True, "true": True, "false": False}


def find_model(name: str) -> ml_collections.ConfigDict:
    """What goes with the language model of this name."""
    if name not in MODELS:
        raise ValueError(f"model={name!r} is not one of {sorted(MODELS)}.")
    return ml_collections.ConfigDict(MODELS[name])


def parse_arg(
    arg: str, **defaults: bool | int | float | str
) -> ml_collections.ConfigDict:
    """Reads `frames=512,smoke` into a ConfigDict shaped like `defaults`.

    Each value takes the type of its default; a bare name means true; a name that
    is not in `defaults` is an error, so a typo never trains the wrong model.
    """
    values = ml_collections.ConfigDict(defaults)
    for item in filter(None, arg.split(",")):
        name, _, text = item.partition("=")
        if name not in defaults:
            raise ValueError(f"{name!r} is not one of {sorted(defaults)} (in {arg!r}).")
        kind = type(defaults[name])
        if kind is bool and text.lower() not in _BOOLS:
            raise ValueError(f"{name}={text!r} is neither true nor false.")
        values[name] = _BOOLS[text.lower()] if kind is bool else kind(text)
    return values
