"""The share of a change of weights that a LoRA of limited rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypersd_jax.errors import UserError
from hypersd_jax.weights.lora.match import listing


@dataclass(frozen=True, kw_only=True)
class EnergyReport:
    """The share that a written LoRA keeps, in squared Frobenius norms of changes of kernels.

    Attributes:
        file: what was written.
        modules: ``{component: {module: (kept, of)}}``.
        left_out: parameters that changed and are no module of a LoRA.
    """

    file: str
    modules: Mapping[str, Mapping[str, tuple[float, float]]]
    left_out: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share of the squared norm of all modules together, from 0 to 1."""
        pairs = [pair for modules in self.modules.values() for pair in modules.values()]
        return _share(sum(kept for kept, _ in pairs), sum(total for _, total in pairs))

    @property
    def worst(self) -> tuple[str, float]:
        """(module, its share) of the module that lost most."""
        shares = {f"{name}.{path}": _share(*pair) for name, part in self.modules.items() for path, pair in part.items()}
        return min(shares.items(), key=lambda item: item[1])

    def __str__(self) -> str:
        module, least = self.worst
        count = sum(len(part) for part in self.modules.values())
        rest = f"; changed and left out: {listing(list(self.left_out))}" if self.left_out else ""
        return (
            f"{self.file}: {count} modules, {self.share:.2%} of the squared change kept (least {least:.2%} in {module})"
            f"{rest}"
        )


def check_rank(rank: int | None) -> None:
    """Require a rank to be None or a positive whole number; raises UserError."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise UserError(f"rank={rank!r} must be a whole number from 1 on")


def _share(kept: float, total: float) -> float:
    return 1.0 if total == 0 else min(kept / total, 1.0)
