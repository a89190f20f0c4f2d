"""How a run is asked to stop: by a signal, heard at once, agreed upon by all hosts."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

STOPPED = 75  # The status of a run that saved and can go on; sysexits.h's EX_TEMPFAIL.
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal came where it may break off what is going on."""


class StopRequest:
    """True once a signal asked the run to stop; a second one ends the process.

    A thread listens, because Python's own handlers wait until a compilation or another
    long call is over. A process that a second signal ends has status 128 + its number.
    """

    def __init__(self):
        self._asked = threading.Event()
        self._breaks = False
        self._heard, self._heard_by = os.pipe()
        os.set_blocking(self._heard_by, False)
        self._before = {n: signal.signal(n, self._handle) for n in SIGNALS}
        self._fd = signal.set_wakeup_fd(self._heard_by)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _listen(self) -> None:
        count = 0
        while number := os.read(self._heard, 1):
            count += number[0] in SIGNALS
            if count > 1:
                os._exit(128 + number[0])
            if count:
                self._asked.set()
        os.close(self._heard)

    def _handle(self, *_) -> None:
        self._asked.set()  # The listener may not have come to it yet.
        if self._breaks:
            raise Interrupted

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within it a signal raises `Interrupted`, also one that came before."""
        self._breaks = True
        try:
            if self:
                raise Interrupted
            yield
        finally:
            self._breaks = False

    def __bool__(self) -> bool:
        return self._asked.is_set()

    def close(self) -> None:
        """Leaves the signals as they were."""
        signal.set_wakeup_fd(self._fd)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._heard_by)


def exit_within(seconds: float, status: int) -> None:
    """Ends the process so soon, whatever thread it would still wait for."""
    timer = threading.Timer(seconds, os._exit, (status,))
    timer.daemon = True
    timer.start()


class Votes:
    """One number a device, by which each host says in a step whether it was asked.

    A step that returns their maximum tells every host the same about the same step.
    """

    def __init__(self, mesh: Mesh):
        self._place = NamedSharding(mesh, P(mesh.axis_names))
        self._votes = {asked: self._make(mesh.size, asked) for asked in (False, True)}

    def _make(self, count: int, asked: bool) -> jax.Array:
        here = len(self._place.addressable_devices)
        values = np.full((here,), asked, np.int32)
        return jax.make_array_from_process_local_data(self._place, values, (count,))

    def of(self, stop: StopRequest) -> jax.Array:
        """This host's vote, as an argument of the step."""
        return self._votes[bool(stop)]

    @staticmethod
    def counted(votes: jax.Array) -> jax.Array:
        """Whether anyone was asked; to be computed within the step."""
        return jnp.max(votes)
