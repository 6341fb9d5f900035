"""WebDataset shards as `datasets` reads them, but with every part of a sample as the bytes that it is.

`datasets` decodes text while it reads, so that one caption in another encoding would refuse the whole set; here
`columns` decodes a caption when its row is asked for, and what cannot be decoded is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from datasets.packaged_modules.webdataset.webdataset import WebDataset


class RawWebDataset(WebDataset):
    """WebDataset without decoders."""

    DECODERS: ClassVar[dict[str, Callable[[Any], Any]]] = {}
