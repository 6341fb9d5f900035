"""How much any client may ask for: every bound of the server, each in one place."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one server.

    Attributes:
        clients: connections that may draw at a time.
        message_bytes: of one message, pictures included.
        header_bytes: of a message's JSON.
        prompt_characters: of a prompt, and of a negative one.
        picture_side: pixels of a picture's longer side.
        messages_per_second, burst: how many messages of one client are read, lasting and at once.
        refusals: messages that may be refused before the connection is closed; one that is taken forgives one.
        steps: sampling steps.
        guidance, lora_scale, control_scale: the largest values; LoRA scales may be as far below 0.
    """

    clients: int = 64
    message_bytes: int = 8 * 2**20
    header_bytes: int = 16 * 2**10
    prompt_characters: int = 1000
    picture_side: int = 2048
    messages_per_second: float = 30.0
    burst: int = 60
    refusals: int = 20
    steps: int = 8
    guidance: float = 20.0
    lora_scale: float = 2.0
    control_scale: float = 2.0


class Rate:
    """A token bucket: so many messages at once, and so many a second after that.

    Args:
        per_second, burst: see `Limits`.
        now: seconds on a clock that never goes back.
    """

    def __init__(self, per_second: float, burst: int, now: float) -> None:
        self._per_second, self._burst = per_second, burst
        self._left, self._then = float(burst), now

    def allows(self, now: float) -> bool:
        """Whether one more message may be read; it counts if so."""
        self._left = min(self._burst, self._left + (now - self._then) * self._per_second)
        self._then = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
