"""Folders of images as people have them: every file is read, passed over or named."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moodistill.data.cut import Cut, cut_class
from moodistill.data.folders import load_image_folder
from moodistill.errors import UserError

CLASSES = ("cat", "dog", "emu")


def picture(seed, size=(8, 8), mode="RGB"):
    """Noise; another seed is another image."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)


def fill(folder, count=10, classes=CLASSES, start=0):
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(1000 * label + start + i).save(folder / name / f"{start + i}.png")
    return folder


def split_folder(root, names=("train", "val", "test"), counts=(8, 4, 4)):
    for part, (name, count) in enumerate(zip(names, counts, strict=True)):
        fill(root / name, count, start=100 * part)
    return root


def load(folder, **settings):
    return load_image_folder(folder, (8, 8), **settings)


def refused(folder, **settings):
    with pytest.raises(UserError) as caught:
        load(folder, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sizes(data):
    return [len(s) for s in (data.train, data.validation, data.test)]


def every_file(folder):
    return sum(len(files) for _, _, files in os.walk(folder, followlinks=True))


@pytest.mark.parametrize("count", [3, 4, 11, 20, 37, 100])
def test_flat_folders_are_cut_class_by_class(tmp_path, count):
    data = load(fill(tmp_path / "p", count))
    share = max(1, round(count / 10))
    for split, each in ((data.train, count - 2 * share), (data.validation, share),
                        (data.test, share)):  # fmt: skip
        assert np.bincount(split.labels).tolist() == [each] * 3
    assert data.table.pictures["test"] == (share,) * 3
    again = load(tmp_path / "p")
    assert again.cut == data.cut and again.digest == data.digest


def test_two_pictures_of_a_class_are_too_few(tmp_path):
    fill(tmp_path, 9)
    for i in range(7):
        (tmp_path / "dog" / f"{i}.png").unlink()
    for i in range(8):
        (tmp_path / "emu" / f"{i}.png").unlink()
    message = refused(tmp_path)
    assert "'dog' has 2 image(s)" in message and "'emu' has 1 image(s)" in message
    assert "at least 3" in message and "cat" not in message


def test_a_cut_goes_by_the_rank_of_names_and_moves_one_at_each_border():
    files = [f"cat/{i}.png" for i in range(54)]
    parts = cut_class(files)
    assert {k: len(v) for k, v in parts.items()} == {"train": 44, "validation": 5, "test": 5}
    assert cut_class(files[::-1]) == parts
    more = cut_class([*files, "cat/new.png"])  # 55: six of each
    assert set(parts["validation"]) - set(more["validation"]) <= set(more["train"])
    assert len(set(parts["test"]) - set(more["test"])) <= 1
    assert set(cut_class(files[:2], ("test",))) == {"train", "test"}


def test_a_run_keeps_its_own_cut(tmp_path):
    data = load(fill(tmp_path / "p", 20))
    data.cut.write(tmp_path / "cut.json")
    fill(tmp_path / "p", 5, start=50)
    assert load(tmp_path / "p").digest != data.digest
    kept = load(tmp_path / "p", cut=Cut.read(tmp_path / "cut.json"))
    assert kept.digest == data.digest and kept.cut == data.cut
    assert len(kept.table.passed_over["not there when the run began"]) == 15
    assert kept.table.files == every_file(tmp_path / "p")
    (tmp_path / "p" / "dog" / "7.png").unlink()
    assert "lacks 1 of the 60 images" in refused(tmp_path / "p", cut=data.cut)
    (tmp_path / "cut.json").write_text('{"train": [1]}')
    with pytest.raises(UserError, match=r"cut\.json does not say which image"):
        Cut.read(tmp_path / "cut.json")


def test_a_cut_of_moved_pictures_is_the_same(tmp_path):
    data = load(fill(tmp_path / "p", 20))
    (tmp_path / "p").rename(tmp_path / "q")
    moved = load(tmp_path / "q", cut=data.cut)
    assert moved.digest == data.digest and moved.folder == tmp_path / "q"


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Train", "Valid", "TEST"), ("Training", "dev", "testing")]
)
def test_folders_of_splits_have_many_names(tmp_path, names):
    data = load(split_folder(tmp_path, names))
    assert sizes(data) == [24, 12, 12] and data.labels == CLASSES


@pytest.mark.parametrize("absent", ["val", "test", "both"])
def test_splits_that_are_absent_are_cut_from_train(tmp_path, absent):
    names = {"val": ("train", "test"), "test": ("train", "val"), "both": ("train",)}[absent]
    data = load(split_folder(tmp_path, names, (20, 4)[: len(names)]))
    expected = {"val": [54, 6, 12], "test": [54, 12, 6], "both": [48, 6, 6]}[absent]
    assert sizes(data) == expected
    assert not data.table.between_splits


def test_classes_of_one_split_alone_are_all_named(tmp_path):
    split_folder(tmp_path)
    fill(tmp_path / "val", 5, ["zebra"])
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "Dog")
    (tmp_path / "train" / "empty").mkdir()
    message = refused(tmp_path)
    assert "class 'zebra' has 5 in val and none in train, test" in message
    assert "class 'Dog' has 4 in test and none in train, val (is it 'dog'?)" in message
    assert "class 'dog' has 8 in train, 4 in val and none in test" in message
    assert "class 'empty' has no image" in message and "'cat'" not in message


def test_a_split_without_classes_is_named(tmp_path):
    split_folder(tmp_path)
    for folder in list((tmp_path / "test").iterdir()):
        for path in folder.iterdir():
            path.rename(tmp_path / "test" / f"{folder.name}-{path.name}")
        folder.rmdir()
    assert f"{tmp_path / 'test'} has no folders of classes" in refused(tmp_path)


def test_a_class_may_be_called_like_a_split(tmp_path):
    assert load(fill(tmp_path / "p", 10, ["invalid", "valid"])).labels == ("invalid", "valid")
    fill(tmp_path / "p" / "valid", 3, ["invalid"])
    assert "no folder train" in refused(tmp_path / "p")
    split_folder(tmp_path / "q", ("val", "test"), (4, 4))
    assert "no folder train" in refused(tmp_path / "q")
    split_folder(tmp_path / "r", ("train", "val", "valid"))
    assert "both for validation" in refused(tmp_path / "r")


def test_the_folder_around_the_data_is_told_from_the_data(tmp_path):
    fill(tmp_path / "outer" / "PetImages")
    assert f"or name {tmp_path / 'outer' / 'PetImages'}" in refused(tmp_path / "outer")


SAVED = {
    "a.JPG": "JPEG", "a.JPEG": "JPEG", "a.jfif": "JPEG", "a.jpe": "JPEG", "a.gif": "GIF",
    "a.pgm": "PPM", "a.avif": "AVIF", "a.webp": "WEBP", "a.tif": "TIFF", "a.bmp": "BMP",
    "a.jp2": "JPEG2000", "a.tga": "TGA", "a.qoi": "QOI", "none": "PNG", "a.jpeg_large": "JPEG",
    "png called.jpg": "PNG", "deeper/and deeper/a.png": "PNG", "ä ö 猫.png": "PNG",
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_kinds_of_files(tmp_path, name):
    fill(tmp_path)
    path = tmp_path / "dog" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if SAVED[name] not in Image.SAVE and (Image.init() or SAVED[name] not in Image.SAVE):
        pytest.skip(f"this Pillow writes no {SAVED[name]}")
    picture(77, mode="L" if SAVED[name] == "PPM" else "RGB").save(path, SAVED[name])
    data = load(tmp_path)
    assert sum(sizes(data)) == 31 and not data.table.passed_over


@pytest.mark.parametrize("mode", ["CMYK", "P", "1", "L", "LA", "RGBA", "YCbCr"])
def test_modes_of_pixels(tmp_path, mode):
    fill(tmp_path)
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    picture(7, mode=mode).save(tmp_path / "cat" / f"a.{suffix}")
    data = load(tmp_path)
    assert data.table.total == 31 and data.table.transparent == (mode in ("LA", "RGBA"))


def test_every_file_is_accounted_for(tmp_path):
    fill(tmp_path, 10)
    frames = [picture(s) for s in (500, 501, 502)]
    frames[0].save(tmp_path / "cat" / "moving.gif", save_all=True, append_images=frames[1:])
    frames[1].save(tmp_path / "emu" / "pages.tiff", save_all=True, append_images=frames[2:])
    others = [
        "README.txt", "labels.csv", "cat/notes.txt", "dog/._3.png", "dog/.DS_Store",
        "dog/Thumbs.db", "__MACOSX/dog/3.png", "__MACOSX/._dog", ".cache/x.png", "cat/no suffix",
        "emu/.ipynb_checkpoints/1.png", "@eaDir/1.png", "emu/film.mp4",
    ]  # fmt: skip
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"nothing that is an image")
    picture(9).save(tmp_path / "loose.png")
    table = load(tmp_path).table
    assert table.total == 32 and table.files == every_file(tmp_path) == 32 + len(others) + 1
    counts = {reason: len(files) for reason, files in table.passed_over.items()}
    assert counts == {
        "hidden, with a dot in front": 4, "left by a system or tool": 4,
        "no image that Pillow reads: .txt": 2, "no image that Pillow reads: .csv": 1,
        "no image that Pillow reads: .mp4": 1, "no image that Pillow reads: no suffix": 1,
        "in no folder of a class": 1,
    }  # fmt: skip
    assert table.more_frames == 2
    text = "\n".join(table.lines())
    for words in ("32 images of 3 classes", "loose.png", "2 of several frames", "  all"):
        assert words in text


def test_damaged_files_are_named_at_once(tmp_path):
    fill(tmp_path)
    whole = (tmp_path / "cat" / "0.png").read_bytes()
    for name, content in (("cat/0.png", whole[:60]), ("dog/1.png", b""),
                          ("emu/2.png", b"<html>404</html>")):  # fmt: skip
        (tmp_path / name).write_bytes(content)
    (tmp_path / "emu" / "link.png").symlink_to(tmp_path / "nowhere.png")
    message = refused(tmp_path)
    assert "4 file(s)" in message
    for name in ("cat/0.png (", "dog/1.png (", "emu/2.png (", "emu/link.png ("):
        assert name in message


def test_links_are_followed_and_circles_are_not(tmp_path):
    fill(tmp_path / "real")
    (tmp_path / "p").mkdir()
    for name in CLASSES:
        (tmp_path / "p" / name).symlink_to(tmp_path / "real" / name, target_is_directory=True)
    (tmp_path / "real" / "cat" / "round").symlink_to(tmp_path / "real" / "cat")
    assert load(tmp_path / "p").table.total == 30


def test_equal_pictures_are_found_whatever_their_format(tmp_path):
    split_folder(tmp_path)
    Image.open(tmp_path / "train" / "cat" / "3.png").save(tmp_path / "test" / "cat" / "again.bmp")
    Image.open(tmp_path / "val" / "emu" / "101.png").save(tmp_path / "val" / "dog" / "wrong.png")
    table = load(tmp_path).table
    pair = (os.path.join("test", "cat", "again.bmp"), os.path.join("train", "cat", "3.png"))
    assert table.between_splits == (pair,)
    assert len(table.between_classes) == 1
    text = "\n".join(table.lines())
    assert "1 equal images in several splits" in text and "again.bmp" in text


def test_a_table_of_many_classes_shows_the_smallest(tmp_path):
    fill(tmp_path, 4, [f"c{i:03d}" for i in range(60)])
    (tmp_path / "c037" / "1.png").unlink()
    lines = load(tmp_path).table.lines()
    assert len(lines) < 32 and "c037" in lines[2] and any("36 larger" in line for line in lines)


def test_a_table_is_plain_data(tmp_path):
    from dataclasses import asdict

    table = load(fill(tmp_path)).table
    assert json.loads(json.dumps(asdict(table)))["pictures"]["train"] == [8, 8, 8]


def test_names_that_are_no_text(tmp_path):
    fill(tmp_path)
    strange = os.fsencode(tmp_path / "cat") + b"/\xff\xfe.png"
    try:
        Path(os.fsdecode(strange)).write_bytes((tmp_path / "cat" / "1.png").read_bytes())
        Path(os.fsdecode(strange + b".txt")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes text alone")
    data = load(tmp_path)
    "\n".join(data.table.lines()).encode()
    data.cut.write(tmp_path / "cut.json")
    assert Cut.read(tmp_path / "cut.json") == data.cut


def test_a_class_whose_name_only_looks_the_same_is_named(tmp_path):
    """macOS writes an accent as a letter of its own."""
    for part in ("train", "val", "test"):
        fill(tmp_path / part, 4, ("cat", "caf\u00e9" if part == "train" else "cafe\u0301"))
    message = refused(tmp_path)
    assert "is it 'cafe\\u0301', which looks the same" in message


@pytest.mark.parametrize("name", ["a\nb", "a\tb", b"\xe9t\xe9"])
def test_a_class_whose_name_cannot_be_written_is_refused(tmp_path, name):
    fill(tmp_path, 4)
    try:
        (tmp_path / "cat").rename(tmp_path / os.fsdecode(name))
    except OSError:
        pytest.skip("no such name on this file system")
    assert "rename its folder" in refused(tmp_path)
