"""Published results that one's own are read against: Hyper-SD (arXiv 2404.13686), Table 2, the figures as printed."""

from __future__ import annotations

from typing import NamedTuple

CITATION = "Ren et al., Hyper-SD (arXiv 2404.13686), Table 2"


class PaperRow(NamedTuple):
    """A row of the table, on the paper's COCO-5k.

    Attributes:
        model: as the paper calls it.
        steps: sampling steps.
        type: what was published: a LoRA, or a whole UNet.
        clip: 100 times the cosine by a CLIP ViT-B/32.
        aesthetic: by LAION's predictor.
        image_reward: ImageReward.
        pickscore: PickScore / 100.
    """

    model: str
    steps: int
    type: str
    clip: float
    aesthetic: float
    image_reward: float
    pickscore: float


class Family(NamedTuple):
    """The rows of one family of base models, and the side of its images in pixels."""

    name: str
    side: int
    rows: tuple[PaperRow, ...]


FAMILIES = {
    "sd_v1": Family(
        "SD 1.5",
        512,
        (
            PaperRow("SD15-Base", 25, "UNet", 31.88, 5.26, 0.18, 0.217),
            PaperRow("SD15-LCM", 4, "LoRA", 30.36, 5.66, -0.37, 0.212),
            PaperRow("SD15-TCD", 4, "LoRA", 30.62, 5.45, -0.15, 0.214),
            PaperRow("PeRFlow", 4, "UNet", 30.77, 5.64, -0.35, 0.208),
            PaperRow("Hyper-SD15", 1, "LoRA", 30.87, 5.79, 0.29, 0.215),
        ),
    ),
    "sdxl_base_v1-0": Family(
        "SDXL",
        1024,
        (
            PaperRow("SDXL-Base", 25, "UNet", 33.16, 5.54, 0.87, 0.229),
            PaperRow("SDXL-LCM", 4, "LoRA", 32.43, 5.42, 0.48, 0.224),
            PaperRow("SDXL-TCD", 4, "LoRA", 32.45, 5.42, 0.67, 0.226),
            PaperRow("SDXL-Lightning", 4, "LoRA", 32.40, 5.63, 0.72, 0.229),
            PaperRow("Hyper-SDXL", 4, "LoRA", 32.56, 5.74, 0.93, 0.232),
            PaperRow("SDXL-Turbo (512 px)", 1, "UNet", 32.33, 5.33, 0.78, 0.228),
            PaperRow("SDXL-Lightning", 1, "UNet", 32.17, 5.34, 0.54, 0.223),
            PaperRow("Hyper-SDXL", 1, "UNet", 32.85, 5.85, 1.19, 0.231),
        ),
    ),
}
"""By `TextToImage.kohya_family`."""
