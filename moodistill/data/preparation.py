"""How an image of any size becomes the pixels that a network takes: a part of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moodistill.data.pixels import INTERPOLATIONS, RESIZES
from moodistill.errors import UserError

CHANNEL_ORDERS = ("RGB", "BGR")


@dataclass(frozen=True)
class Preparation:
    """What is done to an image before the normalisation, in this order.

    An image is turned as its EXIF tag says, made grey, RGB or RGBA, resized, and its channels are
    put in order. `pixels.prepare` does it, in a search and in a bundle's `run.py`.

    Attributes:
        resize: `squash` (the aspect ratio is lost), `crop` (scaled until `size` is covered, then
            the centre cut out) or `letterbox` (scaled until it fits, then borders added).
        size: `(height, width)` in pixels.
        interpolation: Pillow's filter: nearest, box, bilinear, hamming, bicubic or lanczos.
        channel_order: `RGB`, or `BGR` for networks trained on what OpenCV reads.
        exif: whether images are turned as their EXIF tag says, as every viewer shows them;
            torchvision's `ImageFolder` does not.
        shorter_side: of an image before its centre is cut out, in pixels (torchvision's
            `Resize(256)` before `CenterCrop(224)`); None scales just as far as `size` needs.
        fill: value of a letterbox's borders, 0 to 255.
    """

    resize: str = "squash"
    size: tuple[int, int] = (32, 32)
    interpolation: str = "bilinear"
    channel_order: str = "RGB"
    exif: bool = True
    shorter_side: int | None = None
    fill: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        for name, known in (
            ("resize", RESIZES),
            ("interpolation", INTERPOLATIONS),
            ("channel_order", CHANNEL_ORDERS),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}"
                )
        if len(self.size) != 2 or min(self.size) < 1:
            raise UserError(f"size is {self.size}; expected height and width of at least 1 pixel")
        if self.shorter_side is not None and self.resize != "crop":
            raise UserError(
                f"shorter_side is {self.shorter_side} with resize {self.resize!r}; it is of "
                "resize 'crop' alone: leave it out"
            )
        if self.shorter_side is not None and self.shorter_side < max(self.size):
            raise UserError(
                f"shorter_side is {self.shorter_side}, less than the size {max(self.size)} that "
                "is cut out; expected at least that"
            )
        if not 0 <= self.fill <= 255:
            raise UserError(f"fill is {self.fill}; expected a value from 0 to 255")
        if self.fill and self.resize != "letterbox":
            raise UserError(
                f"fill is {self.fill} with resize {self.resize!r}; only a letterbox has borders: "
                "leave it out"
            )

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Preparation:
        """The inverse of `asdict`, of values that come from JSON."""
        return Preparation(**{**stored, "size": tuple(stored["size"])})

    def settings(self) -> dict[str, Any]:
        """The keywords of `pixels.prepare`, as they are written into a manifest."""
        return {**asdict(self), "size": list(self.size)}

    def check_channels(self, channels: int) -> None:
        """Refuse an order of channels that images do not have.

        Raises:
            UserError: if it is BGR and there are not three.
        """
        if self.channel_order != "RGB" and channels != 3:
            raise UserError(
                f"channel_order is {self.channel_order}, the images have {channels} channel(s); "
                "it needs 3"
            )

    def describe(self, channels: int = 3) -> str:
        """What is done, in words: for a report and a model card."""
        height, width = self.size
        how = {
            "squash": f"squashed to {height} x {width} pixels (the aspect ratio is not kept)",
            "crop": f"scaled until {height} x {width} pixels are covered, centre-cropped",
            "letterbox": f"scaled to fit into {height} x {width} pixels, with borders of value "
            f"{self.fill}",
        }[self.resize]
        if self.shorter_side is not None:
            how = (
                f"scaled to {self.shorter_side} pixels on the shorter side, centre-cropped to "
                f"{height} x {width}"
            )
        exif = "turned as EXIF says" if self.exif else "not turned (EXIF orientation is ignored)"
        order = {1: "grey", 4: "RGBA"}.get(channels, self.channel_order)
        return f"{exif}, {how}, {self.interpolation}, {order}"
