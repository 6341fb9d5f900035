"""Load batches of prompts alone, for stages that need no images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hypersd_jax.bases import TextToImage
from hypersd_jax.conditioning import size_ids
from hypersd_jax.config import StageConfig
from hypersd_jax.data import Prompts
from hypersd_jax.inputs.batches import LoadedBatch, Reading, load_batches, nothing, split_all
from hypersd_jax.training import batch_sharding


class PromptInputs:
    """Conditioning for a run's data-free stages; sizes are of uncropped images of the run's resolution."""

    def __init__(self, source: Prompts, base: TextToImage, mesh: Mesh, *, resolution: int) -> None:
        """Prepare without compiling."""
        self._source, self._prompts, self._mesh = source, base.prompts, mesh
        self._resolution = resolution if base.reads_size else None
        self._texts = {name: base.params[name] for name in base.text_encoders}
        bare = base.without_weights()

        def encode(params: Any, ids: Any, sizes: Any) -> Any:
            cond = jax.lax.map(lambda tokens: bare.encode_prompts(params, tokens), ids)
            return bare.with_sizes(cond, sizes)

        self._encode = jax.jit(encode, out_shardings=batch_sharding(mesh, axis=1))

    def prompted(self, stage: StageConfig, *, before: int, done: int, read: Reading = nothing) -> Iterator[LoadedBatch]:
        """Load batches {"cond", "indices"} of a stage, and what ``read`` makes of the prompts, as `load_batches`."""

        def load(positions: np.ndarray) -> Any:
            prompts = self._source.prompts(positions.reshape(-1))
            tokens = self._prompts.tokenize_captions(prompts)
            sizes = None
            if self._resolution:
                sizes = size_ids(self._resolution, self._resolution, positions.size).reshape(*positions.shape, -1)
            ids = tuple(each.reshape(*positions.shape, *each.shape[1:]) for each in tokens)
            return ids, sizes, split_all(read(prompts, None), positions)

        def finish(_number: int, loaded: Any) -> dict[str, Any]:
            ids, sizes, also = loaded
            return {"cond": self._encode(self._texts, ids, sizes), **also}

        return load_batches(stage, before=before, done=done, mesh=self._mesh, load=load, finish=finish)
