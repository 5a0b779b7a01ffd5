"""FeatureSettings: what an image or a video is turned into; `doratune train` offers them."""

from __future__ import annotations

from dataclasses import dataclass

from ...support.values import number


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """How what is looked at becomes features."""

    image_tower: str | None = None
    """Of objective vl_bart: the image model whose features are read, hub id or folder; default that of the model's own."""
    features: str = "features"
    """Folder of the files of features, which are made where they are not there."""
    cells: int = number(36, least=1, most=4096)
    """Cells of an image's grid, the largest square in it."""
    frames: int = number(64, least=1, most=1024)
    """Frames of a video, at equal distances; all of a shorter one."""
    frame_rate: float = number(3.0, above=0, most=1000)
    """Frames a second of videos that are folders of frames, for parts of them."""
