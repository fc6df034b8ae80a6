"""An image file as the pixels that a network takes; needs numpy and Pillow alone.

The text of this module stands in every bundle's `run.py`: a device prepares images by the same
code as the search. So it imports nothing of ours and keeps to what old Pythons understand.
"""

import numpy as np

RESIZES = ("squash", "crop", "letterbox")
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by channels
ORIENTATION = 0x0112  # tag of EXIF
TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip


def read_picture(path, channels, settings):
    """Pixels of a file, and what was seen on the way.

    Args:
        path: of an image in any format that Pillow reads; of several frames the first counts.
        channels: 1 (grey), 3 (RGB or BGR) or 4 (RGBA).
        settings: keywords of `prepare`; None neither turns nor resizes.

    Returns:
        uint8 `(H, W, C)` and a dict: `size` (height, width; upright), `tagged` (whether EXIF says
        to turn it), `frames`, and `transparent` (whether it has an alpha channel that is dropped).

    Raises:
        ValueError: if its pixels are no bytes; Pillow raises others for damaged files.
    """
    from PIL import Image

    with Image.open(path) as opened:
        tag = orientation(opened)
        opened.load()  # of a TIFF file Pillow turns the image here, and drops the tag
        picture, left = opened, orientation(opened)
        if left in TURNS and settings is not None and settings["exif"]:
            picture = picture.transpose(getattr(Image, TURNS[left]))
        transparent = channels != 4 and (
            opened.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in opened.info
        )
        seen = {
            "size": (picture.height, picture.width),
            "tagged": tag in TURNS,
            "frames": getattr(opened, "n_frames", 1),
            "transparent": transparent,
        }
        picture = eight_bits(picture).convert(MODES[channels])
        if settings is None:
            pixels = np.asarray(picture, np.uint8).reshape(picture.height, picture.width, channels)
        else:
            pixels = prepare(picture, **settings)
    return np.ascontiguousarray(pixels), seen


def orientation(picture):
    """The EXIF tag that says how an image is to be turned; 1 is upright."""
    try:
        return picture.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged tag: viewers show such images as they are
        return 1


def eight_bits(picture):
    """Grey images of 16 bits as bytes: Pillow itself would make white of all above 255."""
    from PIL import Image

    if picture.mode == "F":
        raise ValueError("floating-point pixels; expected 8 or 16 bits: convert it")
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels of more than 16 bits; expected 8 or 16: convert it")
    return Image.fromarray((values / 257.0).round().astype(np.uint8))


def prepare(picture, resize, size, interpolation, channel_order, exif, shorter_side, fill):
    """uint8 `(H, W, C)` of an upright Pillow image of mode L, RGB or RGBA.

    The keywords are the fields of `Preparation`. Squash and crop give what torchvision's `Resize`
    and `CenterCrop` give of a Pillow image, pixel by pixel.
    """
    from PIL import Image

    height, width = size
    across, down = picture.size
    if resize == "squash":
        new = (width, height)
    elif resize == "letterbox":
        scale = min(width / across, height / down)
        new = (max(1, round(across * scale)), max(1, round(down * scale)))
    elif (down >= across) if shorter_side else (width * down >= height * across):
        short = shorter_side or width
        new = (short, int(short * down / across))
    else:
        short = shorter_side or height
        new = (int(short * across / down), short)
    if new != picture.size:
        picture = picture.resize(new, getattr(Image, interpolation.upper()))
    if resize == "crop":
        left, top = (int(round((a - b) / 2.0)) for a, b in zip(new, (width, height)))  # noqa: B905
        picture = picture.crop((left, top, left + width, top + height))
    elif resize == "letterbox":
        borders = Image.new(picture.mode, (width, height), (fill,) * len(picture.getbands()))
        borders.paste(picture, ((width - new[0]) // 2, (height - new[1]) // 2))
        picture = borders
    pixels = np.asarray(picture, np.uint8).reshape(height, width, -1)
    return pixels[:, :, ::-1] if channel_order == "BGR" else pixels
