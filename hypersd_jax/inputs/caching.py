"""``hypersd cache``: encode every example of a dataset once, so that training need not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from hypersd_jax.bases import TextToImage, load_base
from hypersd_jax.compilation import use_compilation_cache
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import Config
from hypersd_jax.data import open_source, signed
from hypersd_jax.data.cache import Cache, CacheWriter
from hypersd_jax.errors import UserError
from hypersd_jax.inputs.batches import warn_about_cut_captions
from hypersd_jax.inputs.cache_metadata import cache_metadata
from hypersd_jax.pipeline import parse_dtype
from hypersd_jax.training import StopSignals, batch_sharding, make_mesh
from hypersd_jax.training.lock import FolderLock


def write_cache(
    config: Config, folder: Path, *, batch_size: int = 32, shard_rows: int = 1024, alone: bool = False
) -> int:
    """Write the moments of the latents, the text embeddings, the token ids and the sizes of every example.

    An interrupted call is resumed. At the end all is read once more and compared with its checksums, so that the same
    command on a finished cache finds what has been damaged since.

    Args:
        config: of the run that will read the cache; its ``model`` and ``data`` count.
        folder: where the cache goes.
        batch_size: examples encoded at a time, as many more as the devices (the configuration's ``mesh``) ask for.
        shard_rows: examples a file.
        alone: the process is for this alone, as the command line's is: a signal ends it even while it compiles.

    Returns:
        Number of examples in the cache.

    Raises:
        UserError: naming the key or file at fault, or another process that writes to the folder.
        Interrupted, Terminated: a signal came; the finished shards are kept.
    """
    if config.log.compilation_cache:
        use_compilation_cache()
    lock = FolderLock(folder, "--output")
    with lock, StopSignals(alone=alone, leave=lock.release) as stop:
        return _write(config, folder, batch_size, shard_rows, stop)


def _write(config: Config, folder: Path, batch_size: int, shard_rows: int, stop: StopSignals) -> int:
    dtype = parse_dtype(config.model.dtype)
    own: dict[str, Any] = {"fresh": config.model.fresh, "seed": config.seed, "resolution": config.data.resolution}
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    base = load_base(config.model.source, dtype=dtype, mesh=mesh, **own)
    batch_size += -batch_size % mesh.size  # so that all devices have equally many
    source = open_source(
        config.data,
        resolution=base.image_side,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    if source.uncacheable:
        raise UserError(f"this data cannot be encoded once: {source.uncacheable}")
    keys = source.variants()
    writer = CacheWriter(folder, cache_metadata(config.data, source, base), keys, shard_rows)

    def where() -> str:
        return f"at {writer.done} of {len(keys)} rows; the same command resumes there"

    stop.where = where()
    encode = _make_encode(base, mesh)
    with tqdm(total=len(keys), initial=writer.done, unit="row", desc="encoding") as bar:
        for shard in writer.missing():
            parts = []
            for start in range(0, len(shard), batch_size):
                part = shard[start : start + batch_size]
                # The last batch is filled up, so that one program serves all.
                full = np.concatenate([part, np.repeat(part[-1:], batch_size - len(part))])
                batch = source.variant_batch(full)
                ids = base.prompts.tokenize_captions(batch.captions)
                mean, logvar, cond = jax.device_get(encode(batch.images, ids))
                arrays = {"mean": mean, "logvar": logvar, "context": cond.context, "sizes": batch.sizes}
                arrays |= {f"ids_{i}": tokens for i, tokens in enumerate(ids)}
                if cond.pooled is not None:
                    arrays["pooled"] = cond.pooled
                parts.append({name: np.asarray(array)[: len(part)] for name, array in arrays.items()})
                bar.update(len(part))
            rows = {name: np.concatenate([each[name] for each in parts]) for name in parts[0]}
            stop.hold()
            writer.write(rows)
            stop.where = where()
            stop.release()
    stop.where = f"while it checked the {len(keys)} rows, all of which are written"
    Cache(folder, verify=True)
    warn_about_cut_captions(base.prompts)
    return len(keys)


def _make_encode(base: TextToImage, mesh: Mesh) -> Any:
    """``(images (B, H, W, 3) uint8, token ids) -> (mean, logvar, conditioning)``, compiled once."""
    texts = {name: base.params[name] for name in base.text_encoders}
    own, bare = dict(base.params[base.autoencoder]), base.without_weights()

    def encode(text_params: Any, params: Any, images: Any, ids: Any) -> tuple[jax.Array, jax.Array, Conditioning]:
        cond = bare.encode_prompts(text_params, ids)
        return *bare.posterior(params, signed(images)), cond

    compiled, rows = jax.jit(encode), batch_sharding(mesh)
    return lambda images, ids: compiled(texts, own, *jax.device_put((images, ids), rows))
