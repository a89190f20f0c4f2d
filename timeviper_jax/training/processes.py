"""How the processes of one run find each other: JAX's own clusters, or three values.

On a TPU pod, under Slurm, Open MPI and on Kubernetes JAX finds out by itself. Elsewhere
each process is told, by flags or by its environment: where the first one listens, how
many there are, and which one it is.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

import jax

# JAX itself reads only the first of them.
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


class Place(NamedTuple):
    """A process among those of a run; None where nobody said."""

    coordinator: str | None = None  # HOST:PORT, of process 0.
    num_processes: int | None = None
    process_id: int | None = None

    @property
    def unsaid(self) -> list[str]:
        return [name for name, value in self._asdict().items() if value is None]


def find(flags: Place, environment: Mapping[str, str] = os.environ) -> Place:
    """What the flags say, and of the rest what the environment does.

    Raises:
      ValueError: A number is none.
    """
    told = {name: environment.get(key) for name, key in VARIABLES.items()}
    for name in ("num_processes", "process_id"):
        if told[name] is not None and not told[name].isdecimal():
            raise ValueError(f"{VARIABLES[name]}={told[name]!r} is not a number.")
        told[name] = None if told[name] is None else int(told[name])
    return Place(*(told[x] if y is None else y for x, y in flags._asdict().items()))


def check(place: Place, *, cluster: bool) -> None:
    """Raises unless these say all that must be said, and agree.

    `cluster` leaves what nobody said to JAX.

    Raises:
      ValueError: Says in one line what is missing or wrong.
    """
    coordinator, number, me = place
    if place.unsaid and not cluster:
        raise ValueError(
            f"It is not said what {' and '.join(place.unsaid)} should be; give"
            " --coordinator=HOST:PORT, --num_processes and --process_id (or"
            f" {', '.join(VARIABLES.values())}), or --multihost where a cluster knows."
        )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator={coordinator!r} names no port: give HOST:PORT.")
    if number is not None and number < 1:
        raise ValueError(f"num_processes={number} is not at least 1.")
    if None not in (number, me) and not 0 <= me < number:
        raise ValueError(f"process_id={me} is outside 0..{number - 1}.")


def join(place: Place, *, cluster: bool) -> None:
    """Waits for the other processes of a run; alone where nothing says that it is not.

    Must come before anything that asks JAX for its devices.

    Raises:
      ValueError: It is not said, or not known to the cluster, who the others are.
    """
    if len(place.unsaid) == len(place) and not cluster:
        return
    check(place, cluster=cluster)
    try:
        jax.distributed.initialize(*place)
    except ValueError as error:
        why = str(error).rstrip(".")
        raise ValueError(
            f"JAX knows no cluster that says {', '.join(place.unsaid)} ({why}); give"
            " --coordinator=HOST:PORT, --num_processes and --process_id."
        ) from None
