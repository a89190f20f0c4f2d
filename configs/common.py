"""What every config file shares: reading the argument after the colon."""

import ml_collections

_BOOLS = {"": True, "true": True, "false": False}


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
