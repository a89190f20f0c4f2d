"""Virtual environments of a command's own, under .bench/ where the command is run."""

import pathlib
import subprocess
import sys
import venv
from collections.abc import Sequence


def python_with(name: str, packages: Sequence[str]) -> pathlib.Path:
    """The Python of the venv `name`, after installing `packages` if it is new."""
    folder = pathlib.Path(".bench") / name
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"Making {folder} ...", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        (folder.parent / ".gitignore").write_text("*\n")
        install = [str(python), "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(install, check=True, stdout=sys.stderr)
        ready.touch()
    return python
