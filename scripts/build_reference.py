"""Sample and measure the embedded teacher once, into hypersd_jax/assets/reference/teacher.npz.

python scripts/build_reference.py      # about twelve minutes on two cores
"""

from __future__ import annotations

from hypersd_jax.config import load_config
from hypersd_jax.evaluation.comparison import embedded_evaluator, embedded_teacher
from hypersd_jax.evaluation.reference import SHIPPED, compute_reference, reference_identity, save_reference
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.recipes import find_recipe
from hypersd_jax.weights.fingerprints import fingerprint


def main() -> None:
    """Compute the reference of the default recipe's list and guidance."""
    config = load_config(find_recipe("emoji/hyper"))
    pipe = Pipeline.from_pretrained("embedded")
    base, guidance = fingerprint(pipe.base.params[pipe.base.denoiser]), config.evaluation.guidance or 0.0
    evaluator = embedded_evaluator(pipe, config.compared_samples, config.data.groups)
    teacher = embedded_teacher(pipe, base, guidance, batch_size=32)
    reference = compute_reference(teacher, evaluator)
    # Seconds are those of whoever compares: of no device, they are not read.
    save_reference(SHIPPED, reference, reference_identity(teacher, evaluator), device="")
    for each in reference.rows:
        print(
            {
                key: each.row.get(key)
                for key in ("model", "steps", "guidance", "distance", "kid", "clip_gain", "diversity")
            }
        )


if __name__ == "__main__":
    main()
