"""The one thread that owns the device: it takes what waits at the desk, draws it, and hands it over."""

from __future__ import annotations

import dataclasses
import math
import sys
import threading
import traceback
from functools import partial

from hypersd_jax.errors import UserError
from hypersd_jax.serving.desk import Client, Desk
from hypersd_jax.serving.engine import Abandoned, Drawn, Engine
from hypersd_jax.serving.limits import Limits
from hypersd_jax.serving.request import STUDENT, TEACHER, Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A request, and who is to draw it."""

    request: Request
    role: str = STUDENT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed:
    """Why a request was not drawn, in one line."""

    request: Request
    reason: str


Outcome = Drawn | Failed


class Worker(threading.Thread):
    """Draws for the clients of a desk until that is closed.

    Args:
        desk: what waits.
        engine: what draws; no other thread may use it.
        limits: what a student's turn may hold.
    """

    def __init__(self, desk: Desk[Work], engine: Engine, limits: Limits) -> None:
        super().__init__(name="hypersd-worker", daemon=True)
        self._desk, self._engine, self._limits = desk, engine, limits

    def run(self) -> None:
        """Take, draw, hand over."""
        while (taken := self._desk.take()) is not None:
            client, work = taken
            try:
                drawn = self._engine.draw(work.request, work.role, wanted=partial(self._wanted, client, work))
            except Abandoned:
                continue
            except UserError as error:
                client.deliver(Failed(request=work.request, reason=" ".join(str(error).split())))
                continue
            except Exception:  # a defect of ours must not end the server for everybody
                traceback.print_exc(file=sys.stderr)
                client.deliver(
                    Failed(request=work.request, reason="this could not be drawn; the server's log says why")
                )
                continue
            client.deliver(drawn)
            if work.request.compare and work.role == STUDENT:
                self._desk.follow(client, Work(request=work.request, role=TEACHER), self._teacher_turns())

    def _wanted(self, client: Client[Work], work: Work) -> bool:
        """Whether to go on: not for who has left, nor with a teacher's many steps once something newer is asked for."""
        return client.present and not self._desk.closed and not (work.role == TEACHER and client.slot is not None)

    def _teacher_turns(self) -> int:
        """What the teacher's image is worth, in the longest images of a student."""
        teacher = self._engine.teacher
        calls = teacher["steps"] * (2 if teacher["guidance"] > 1 else 1)
        return math.ceil(calls / (2 * self._limits.steps))
