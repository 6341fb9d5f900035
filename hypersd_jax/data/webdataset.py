"""WebDataset shards as `datasets` reads them, with two differences that lose no sample.

Every part of a sample stays the bytes that it is: `datasets` decodes text while it reads, so that one caption in
another encoding would refuse the whole set; here `columns` decodes a caption when its row is asked for, and what cannot
be decoded is counted. And a sample's image is in one column, whichever ending it has: `datasets` takes the columns of
the first samples for those of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import datasets
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from hypersd_jax.data.columns import ENDING_COLUMNS, IMAGE


class RawWebDataset(WebDataset):
    """WebDataset without decoders, and with a column ``image`` for the first image of each sample."""

    DECODERS: ClassVar[dict[str, Callable[[Any], Any]]] = {}

    @classmethod
    def _get_pipeline_from_tar(cls, tar_path: Any, tar_iterator: Any) -> Iterator[dict[str, Any]]:
        for example in super()._get_pipeline_from_tar(tar_path, tar_iterator):
            name = next((name for name in ENDING_COLUMNS if name in example), None)
            if name is None or IMAGE in example:
                yield example
            else:
                yield {IMAGE: example[name], **{key: value for key, value in example.items() if key != name}}

    def _split_generators(self, dl_manager: Any) -> Any:
        found = super()._split_generators(dl_manager)
        if IMAGE in self.info.features:
            self.info.features[IMAGE] = datasets.Image()
        return found
