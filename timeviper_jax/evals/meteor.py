"""METEOR (https://www.cs.cmu.edu/~alavie/METEOR/), as its authors' program computes it.

The program is a Java archive, `meteor-1.5.jar`, with its tables in `data/` beside it;
pycocoevalcap, among others, carries both. It is spoken to line by line.
"""

import pathlib
import shutil
import subprocess
from collections.abc import Sequence
from types import TracebackType


class Meteor:
    """The program, running; a context manager that ends it.

    Raises:
      FileNotFoundError: Java or the archive is not there; the message says which.
    """

    def __init__(self, jar: str | pathlib.Path):
        jar = pathlib.Path(jar)
        if not jar.is_file():
            raise FileNotFoundError(
                f"{jar}: no such file; --meteor_jar names meteor-1.5.jar."
            )
        if not (java := shutil.which("java")):
            raise FileNotFoundError("METEOR needs Java, and no `java` is on the PATH.")
        command = [java, "-jar", "-Xmx2G", str(jar.resolve()), "-", "-", "-stdio"]
        self._program = subprocess.Popen(
            [*command, "-l", "en", "-norm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __enter__(self) -> "Meteor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._program.stdin.close()
        self._program.wait()
        self._program.stdout.close()

    def __call__(
        self, given: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[float, list[float]]:
        """The score of all captions together, which is not the mean, and of each.

        Captions are words apart (`cider.words`).
        """
        counts = [
            self._ask(" ||| ".join(["SCORE", *map(_clean, texts), _clean(text)]))
            for text, texts in zip(given, references, strict=True)
        ]
        first = self._ask(" ||| ".join(["EVAL", *counts]))
        each = [float(first), *(float(self._line()) for _ in counts[1:])]
        return float(self._line()), each

    def _ask(self, line: str) -> str:
        self._program.stdin.write(line + "\n")
        return self._line()

    def _line(self) -> str:
        line = self._program.stdout.readline()
        if not line:
            raise ValueError("METEOR's program ended; run it by hand to see why.")
        return line.strip()


def _clean(text: str) -> str:
    return text.replace("|||", "").replace("  ", " ")
