"""The pictures of a sight: an image file, frames of a video file by PyAV, or of a folder of images in the order of their names.

Of n frames in the part that counts, F are taken at equal distances: those at ⌊(i + ½) · n / F⌋; all where there are no more. A
video file is read twice: its packets for the times, then decoded up to the last frame that is taken. Names are in natural order: 2
before 10. Cost: decoding.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UserError
from ..images import is_image_name, open_image
from ..visual_tasks import Sight

if TYPE_CHECKING:
    from PIL import Image


def pictures_of(sight: Sight, frames: int, frame_rate: float) -> list[Image.Image]:
    """One picture of an image, up to `frames` of a video, in order.

    Raises:
        UserError: it is missing, broken, no image or video, or a video without a frame; named by its path.
    """
    if not sight.video:
        return [open_image(sight.path)]
    path = Path(sight.path)
    if path.is_dir():
        return [open_image(name) for name in _chosen(_frames_of_folder(path, sight.span, frame_rate), frames)]
    if not path.is_file():
        raise UserError(f"{path}: no such video, neither a file nor a folder of frames; mend the path or remove the item")
    if not path.stat().st_size:
        raise UserError(f"{path}: an empty file (0 bytes); copy the video again or remove it")
    return _frames_of_file(path, sight.span, frames)


def _chosen(items: Sequence, count: int) -> list:
    """So many of them at equal distances, all where there are no more."""
    return list(items) if len(items) <= count else [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _frames_of_folder(path: Path, span: tuple[float, float] | None, rate: float) -> list[str]:
    names = sorted((entry.name for entry in os.scandir(path) if is_image_name(entry.name)), key=_natural)
    if not names:
        raise UserError(f"{path}: a folder without an image, so a video without frames; put them there or remove the item")
    inside = [name for i, name in enumerate(names) if span is None or span[0] <= i / rate < span[1]]
    if not inside:
        raise UserError(
            f"{path}: no frame between {span[0]:g} and {span[1]:g} s: {len(names)} frames are {len(names) / rate:g} s at "
            f"{rate:g} a second; set frame_rate"
        )
    return [str(path / name) for name in inside]


def _natural(name: str) -> list:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _frames_of_file(path: Path, span: tuple[float, float] | None, count: int) -> list[Image.Image]:
    import av

    try:
        with av.open(str(path)) as container:
            times = _times(container, path, span)
        chosen = _chosen(times, count)
        with av.open(str(path)) as container:
            found = _decoded(container, set(chosen), chosen[-1])
    except (av.error.FFmpegError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: no video that can be read, or a truncated one ({reason}); copy it again or remove it") from None
    if len(found) < len(chosen):
        raise UserError(f"{path}: {len(chosen) - len(found)} of {len(chosen)} frames cannot be decoded; copy the video again")
    return [found[time] for time in chosen]


def _times(container, path: Path, span: tuple[float, float] | None) -> list[int]:
    """Time stamps of the frames in a part of the first video stream, in order.

    Raises:
        UserError: no stream of pictures, or no frame in that part.
    """
    if not container.streams.video:
        raise UserError(
            f"{path}: no video stream in it: another kind of file, or a truncated one; copy it again or remove the item"
        )
    stream = container.streams.video[0]
    times = sorted({packet.pts for packet in container.demux(stream) if packet.pts is not None and packet.size})
    if not times:
        raise UserError(f"{path}: a video without frames; copy it again or remove it")
    start, unit = times[0], float(stream.time_base)
    inside = [time for time in times if span is None or span[0] <= (time - start) * unit < span[1]]
    if not inside:
        length = (times[-1] - start) * unit
        raise UserError(f"{path}: no frame between {span[0]:g} and {span[1]:g} s; the video has {length:.1f} s")
    return inside


def _decoded(container, wanted: set[int], last: int) -> dict[int, Image.Image]:
    """Time stamp → upright picture of the frames that are wanted."""
    found = {}
    for frame in container.decode(container.streams.video[0]):
        if frame.pts in wanted:
            picture, turned = frame.to_image(), int(getattr(frame, "rotation", 0) or 0)
            found[frame.pts] = picture.rotate(turned, expand=True) if turned else picture
        if frame.pts is not None and frame.pts >= last:
            break
    return found
