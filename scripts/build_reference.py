"""Draw and measure the embedded teacher once, into hypersd_jax/assets/reference/teacher.npz.

python scripts/build_reference.py      # about twelve minutes on two cores
"""

from __future__ import annotations

from typing import Any

from hypersd_jax.config import load_config
from hypersd_jax.data import evaluation_list
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.recipes import find_recipe
from hypersd_jax.stages.reference import compute_reference, reference_identity, save_reference
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.diffusers.component import fingerprint


def main() -> None:
    """Compute the reference of the default recipe's list and guidance."""
    config = load_config(find_recipe("emoji"))
    pipe = Pipeline.from_pretrained("embedded")
    items = evaluation_list(config.compared_samples, groups=config.data.groups)
    belonging: dict[str, Any] = {"groups": config.data.groups, "guidance": config.evaluation.guidance}
    reference = compute_reference(pipe, items, batch_size=32, **belonging)
    base = fingerprint(pipe.components.params["unet"])
    identity = reference_identity(items, base=base, **belonging)
    save_reference(assets() / "reference" / "teacher.npz", reference, identity)
    for row in (reference.floor, *reference.teachers):
        measured = f"fid {row.fid:.1f} kid {row.kid.mean:.4f} distance {row.distance.mean:.4f}"
        own = " ".join(f"{key} {row.values[key]:.2f}" for key in ("clip_gain", "fid_train", "diversity"))
        print(row.steps, row.guidance, measured, own)


if __name__ == "__main__":
    main()
