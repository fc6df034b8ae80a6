"""How images are prepared: the same pixels as torchvision's, and in every order and form."""

import json

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from moodistill.data.datasets import from_datasets
from moodistill.data.folders import load_image_folder
from moodistill.data.pixels import TURNS, read_picture
from moodistill.data.preparation import Preparation
from moodistill.errors import UserError

SHAPES = [(32, 32), (31, 97), (97, 31), (45, 46), (500, 333), (9, 200), (20, 21)]


def noise(shape, seed=0, channels=3):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(2, shape[0] // 4), max(2, shape[1] // 4), channels), np.uint8)
    return Image.fromarray(small.squeeze()).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)


def pixels(picture, path, **settings):
    picture.save(path)
    return read_picture(path, settings.pop("channels", 3), Preparation(**settings).settings())[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
@pytest.mark.parametrize("shorter_side", [None, 36])
def test_squash_and_crop_are_torchvisions(tmp_path, shape, interpolation, shorter_side):
    picture, mode = noise(shape), InterpolationMode(interpolation)
    squashed = transforms.Resize((28, 28), mode)(picture)
    found = pixels(picture, tmp_path / "a.png", size=(28, 28), interpolation=interpolation)
    assert np.array_equal(found, np.asarray(squashed))
    cut = transforms.Compose(
        [transforms.Resize(shorter_side or 28, mode), transforms.CenterCrop(28)]
    )(picture)
    found = pixels(
        picture, tmp_path / "a.png", resize="crop", size=(28, 28), interpolation=interpolation,
        shorter_side=shorter_side,
    )  # fmt: skip
    assert np.array_equal(found, np.asarray(cut))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(28, 28), (24, 40), (40, 24)])
@pytest.mark.parametrize("resize", ["squash", "crop", "letterbox"])
def test_sizes_that_are_no_square(tmp_path, shape, size, resize):
    found = pixels(noise(shape), tmp_path / "a.png", resize=resize, size=size)
    assert found.shape == (*size, 3) and found.dtype == np.uint8
    # An image of one colour keeps it, but for a letterbox's borders.
    plain = Image.new("RGB", (shape[1], shape[0]), (200, 100, 50))
    found = pixels(plain, tmp_path / "a.png", resize=resize, size=size)
    inside = (found == (200, 100, 50)).all(2)
    assert inside.all() if resize != "letterbox" else inside.any()
    if resize == "letterbox":
        scale = min(size[0] / shape[0], size[1] / shape[1])
        rows, columns = inside.any(1).sum(), inside.any(0).sum()
        assert (rows, columns) == (round(shape[0] * scale), round(shape[1] * scale))
        assert (found[~inside] == 0).all()


def test_a_letterbox_has_the_smaller_border_first(tmp_path):
    picture = noise((30, 75))
    found = pixels(picture, tmp_path / "a.png", resize="letterbox", size=(32, 32), fill=114)
    inner = np.asarray(picture.resize((32, 13), Image.Resampling.BILINEAR))
    assert np.array_equal(found[9:22], inner)
    assert (found[:9] == 114).all() and (found[22:] == 114).all()


def test_channels_and_their_order(tmp_path):
    picture = noise((32, 32))
    rgb = pixels(picture, tmp_path / "a.png")
    assert np.array_equal(rgb, np.asarray(picture))
    bgr = pixels(picture, tmp_path / "a.png", channel_order="BGR")
    assert np.array_equal(bgr, rgb[..., ::-1])
    grey = pixels(picture, tmp_path / "a.png", channels=1)
    assert np.array_equal(grey[..., 0], np.asarray(picture.convert("L")))
    rgba = pixels(picture, tmp_path / "a.png", channels=4)
    assert rgba.shape == (32, 32, 4) and (rgba[..., 3] == 255).all()


@pytest.mark.parametrize("tag", [*TURNS])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_pictures_are_turned_as_viewers_show_them(tmp_path, tag, suffix):
    picture, exif = noise((20, 36)), Image.Exif()
    exif[0x0112] = tag
    picture.save(tmp_path / f"a.{suffix}", exif=exif, lossless=True, quality=95)
    with Image.open(tmp_path / f"a.{suffix}") as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    settings = Preparation(size=(upright.height, upright.width))
    found, seen = read_picture(tmp_path / f"a.{suffix}", 3, settings.settings())
    assert np.array_equal(found, np.asarray(upright)) and seen["tagged"]
    assert seen["size"] == (upright.height, upright.width) != (20, 36) or tag < 5
    if suffix != "tif":  # Pillow itself turns those
        flat = Preparation(size=(20, 36), exif=False).settings()
        found, seen = read_picture(tmp_path / f"a.{suffix}", 3, flat)
        with Image.open(tmp_path / f"a.{suffix}") as opened:
            assert np.array_equal(found, np.asarray(opened.convert("RGB"))) and seen["tagged"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"resize": "stretch"}, "squash, crop, letterbox"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"channel_order": "GBR"}, "RGB, BGR"),
        ({"size": (0, 3)}, "at least 1 pixel"),
        ({"shorter_side": 256}, "resize 'crop' alone"),
        ({"resize": "crop", "shorter_side": 20}, "less than the size 32"),
        ({"fill": 114}, "only a letterbox has borders"),
        ({"resize": "letterbox", "fill": 300}, "0 to 255"),
    ],
)
def test_preparations_that_cannot_be(settings, words):
    with pytest.raises(UserError, match=words):
        Preparation(**settings)


def test_a_preparation_survives_json():
    one = Preparation("crop", (24, 40), "bicubic", "BGR", False, 64)
    assert Preparation.from_dict(json.loads(json.dumps(one.settings()))) == one
    words = one.describe()
    for part in ("24 x 40", "64", "bicubic", "BGR", "not turned"):
        assert part in words


def folder_of(root, shapes, count=10):
    for label, name in enumerate(("left", "right")):
        for part in ("train", "val", "test"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                seed = 1000 * label + 100 * len(part) + i
                noise(shapes[i % len(shapes)], seed).save(root / part / name / f"{i}.png")
    return root


def test_a_folder_says_how_it_was_prepared(tmp_path):
    root = folder_of(tmp_path / "p", [(30, 60), (40, 40)])
    squashed, cut = (load_image_folder(root, (20, 20), resize=how) for how in ("squash", "crop"))
    assert squashed.preparation == Preparation(size=(20, 20))
    assert cut.preparation == Preparation("crop", (20, 20)) and cut.digest != squashed.digest
    assert cut.table.reshaped == 30
    for data, words in ((squashed, "30 of another aspect ratio: squashed"),
                        (cut, "30 of another aspect ratio: cut")):  # fmt: skip
        assert any(words in line for line in data.table.lines())
    with pytest.raises(UserError, match="channel_order is BGR, the images have 1"):
        load_image_folder(root, (20, 20), channels=1, channel_order="BGR")
    # Each image stands beside its own file.
    for index in (0, 7, 19):
        again, _ = read_picture(cut.test.files[index], 3, cut.preparation.settings())
        assert np.array_equal(again, cut.test.images[index])


def image_folders(root, transform, training=None):
    parts = ((root / part, training if part == "train" else transform) for part in
             ("train", "val", "test"))  # fmt: skip
    return [datasets.ImageFolder(str(place), how or transform) for place, how in parts]


@pytest.mark.parametrize("form", ["crop", "squash", "bicubic", "tensor", "v2"])
def test_torchvisions_transforms_are_recognised(tmp_path, form):
    from torchvision.transforms import v2

    root = folder_of(tmp_path / "p", [(30, 60), (50, 40)])
    steps, expected = {
        "crop": ([transforms.Resize(24), transforms.CenterCrop(20)],
                 Preparation("crop", (20, 20), exif=False, shorter_side=24)),
        "squash": ([transforms.Resize((20, 28))], Preparation(size=(20, 28), exif=False)),
        "bicubic": ([transforms.Resize((20, 20), InterpolationMode.BICUBIC)],
                    Preparation(size=(20, 20), interpolation="bicubic", exif=False)),
        "tensor": ([transforms.Resize(20), transforms.CenterCrop(20), transforms.ToTensor()],
                   Preparation("crop", (20, 20), exif=False, shorter_side=20)),
        "v2": ([v2.Resize(20), v2.CenterCrop(20)],
               Preparation("crop", (20, 20), exif=False, shorter_side=20)),
    }[form]  # fmt: skip
    transform = transforms.Compose(steps)
    train = transforms.Compose([transforms.RandomHorizontalFlip(), *steps])  # of no account
    data = from_datasets(*image_folders(root, transform, train))
    assert data.preparation == expected and len(data.test.files) == 20
    assert "20 x 2" in next(line for line in data.table.lines() if "prepared" in line)


@pytest.mark.parametrize("form", ["unknown", "other order", "own loader", "no transform"])
def test_what_is_not_recognised_is_not_claimed(tmp_path, form):
    root = folder_of(tmp_path / "p", [(30, 60)] if form != "no transform" else [(20, 20)])
    steps = {
        "unknown": [transforms.Resize((20, 20)), transforms.RandomInvert(1.0)],
        "other order": [transforms.CenterCrop(30), transforms.Resize((20, 20))],
        "own loader": [transforms.Resize((20, 20))],
        "no transform": [],
    }[form]
    sets = image_folders(root, transforms.Compose(steps))
    if form == "own loader":
        for one in sets:
            one.loader = lambda path: Image.open(path).convert("L").convert("RGB")
    data = from_datasets(*sets)
    assert data.preparation is None and data.test.files == ()
    assert "prepared: not known" in "\n".join(data.table.lines())


def test_a_preparation_that_is_given_is_compared_with_the_files(tmp_path):
    root = folder_of(tmp_path / "p", [(30, 60)])
    steps = transforms.Compose([transforms.Resize(30), transforms.CenterCrop(20)])
    sets = image_folders(root, steps)
    right = Preparation("crop", (20, 20), exif=False, shorter_side=30)
    assert from_datasets(*sets, preparation=right).preparation == right
    with pytest.raises(UserError, match=r"gives other pixels of .*\.png than the dataset"):
        from_datasets(*sets, preparation=Preparation(size=(20, 20), exif=False))
    plain = [[one[i] for i in range(len(one))] for one in sets]  # no files: it is believed
    assert from_datasets(*plain, preparation=right).preparation == right
    with pytest.raises(UserError, match=r"size \(24, 24\), the data are \(20, 20\)"):
        from_datasets(*plain, preparation=Preparation("crop", (24, 24)))


def test_subsets_keep_their_files(tmp_path):
    from torch.utils.data import Subset

    root = folder_of(tmp_path / "p", [(30, 60)])
    steps = transforms.Compose([transforms.Resize(20), transforms.CenterCrop(20)])
    train, val, _ = image_folders(root, steps)
    inner = Subset(Subset(val, range(1, 20)), [0, 4, 10, 17])
    data = from_datasets(train, inner, inner)
    assert data.preparation is not None
    names = {f"{path.split('/')[-2]}/{path.split('/')[-1]}" for path in data.test.files}
    assert names == {"left/1.png", "left/5.png", "right/1.png", "right/8.png"}
