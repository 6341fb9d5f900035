"""Options of the compiler: given where they help, and known to it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.compilation import compiler_options


def test_only_half_precision_on_a_cpu_has_options() -> None:
    given = bool(compiler_options(jnp.bfloat16, "cpu"))
    assert given == (jax.__version_info__ >= (0, 12))
    assert not any(compiler_options(dtype, "cpu") for dtype in (jnp.float32, jnp.float16))
    assert not any(compiler_options(jnp.bfloat16, platform) for platform in ("gpu", "tpu"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_compiler_knows_them(dtype: object) -> None:
    x = jnp.full((8, 8), 0.5, dtype)
    found = jax.jit(lambda x: x @ x, compiler_options=compiler_options(dtype))(x)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.full((8, 8), 2.0))
