"""Several processes that train one model together, as typed configuration."""

from __future__ import annotations

import dataclasses

ALONE, AUTO = "alone", "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """The processes of a run, one on each host; each is started with the same command.

    Attributes:
        coordinator: where the processes meet, HOST:PORT on the host of process 0; ``auto``: where the cluster says
            (SLURM, Open MPI, Cloud TPU); ``alone``: there is one process; null: ``auto`` where the environment tells of
            several processes or has TPU chips, else ``alone``.
        processes: how many there are; needed with HOST:PORT alone.
        process: the number of this one, from 0; needed with HOST:PORT alone.
        timeout_seconds: how long a process waits for one that is missing, at the start and while the run lasts.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    timeout_seconds: int = 60

    def __post_init__(self) -> None:
        given = (self.processes is not None, self.process is not None)
        if self.address is None:
            if any(given):
                raise ValueError("processes and process go with coordinator=HOST:PORT")
        else:
            host, colon, port = self.address.rpartition(":")
            if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
                raise ValueError(f"coordinator must be HOST:PORT, auto or alone, not {self.coordinator}")
            if not all(given):
                raise ValueError("coordinator=HOST:PORT needs processes and process")
            count, number = self.processes or 0, self.process or 0
            if count < 1:
                raise ValueError(f"processes must be at least 1, not {count}")
            if not 0 <= number < count:
                raise ValueError(f"process must be from 0 to {count - 1}, not {number}")
        if self.timeout_seconds < 1:
            raise ValueError(f"timeout_seconds must be at least 1, not {self.timeout_seconds}")

    @property
    def address(self) -> str | None:
        """HOST:PORT where it is given."""
        return None if self.coordinator in (None, AUTO, ALONE) else self.coordinator
