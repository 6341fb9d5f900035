"""One of two processes that agree; run by test_agreement.py. Prints what it hears at each of five calls."""

from __future__ import annotations

import sys

import jax

from hypersd_jax.training import Agreement

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")


def main(process: int, port: int) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    agreement = Agreement()
    # A signal comes to the second process at the second call, the first one's clock rings at the third.
    for call in range(1, 6):
        print(*agreement.largest(15 if process == 1 and call >= 2 else 0, int(process == 0 and call == 3)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
