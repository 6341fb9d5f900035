"""Draw and measure the embedded teacher once, into hypersd_jax/assets/reference/teacher.npz.

python scripts/build_reference.py      # about ten minutes on two cores
"""

from __future__ import annotations

from hypersd_jax.config import load_config
from hypersd_jax.data import evaluation_list
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.recipes import find_recipe
from hypersd_jax.stages.reference import compute_reference, reference_identity, save_reference
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.folder import fingerprint


def main() -> None:
    """Compute the reference of the default recipe's list and guidance."""
    config = load_config(find_recipe("emoji"))
    pipe = Pipeline.from_pretrained("embedded")
    items = evaluation_list(config.compared_samples, groups=config.data.groups)
    reference = compute_reference(pipe, items, guidance=config.evaluation.guidance, batch_size=32)
    base = fingerprint(pipe.components.params["unet"])
    path = assets() / "reference" / "teacher.npz"
    save_reference(path, reference, reference_identity(items, config.evaluation.guidance, base))
    for row in (reference.floor, *reference.teachers):
        print(row.steps, row.guidance, f"fid {row.fid:.1f} kid {row.kid.mean:.4f} distance {row.distance.mean:.4f}")


if __name__ == "__main__":
    main()
