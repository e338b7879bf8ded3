"""Image files, folders, CSV lists and IDX files: read as they are meant, or refused in one line."""

import gzip
import io
import os
import pickle
import random
import re
import resource
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from datasets import csv_images, image_folder
from engine.data.audit import in_two_splits, look_at
from engine.data.formats import read_idx, read_pickle
from engine.data.images import ImageFiles, Paths, read_image
from engine.data.splits import Split, fingerprint, load_splits
from engine.errors import RequestError
from engine.pictures.samples import uneven

FOLDER = {"test_fraction": 0.25, "channels": 3, "max_pixels": 10**6}
LIST = {"test_annotations_file": None, "test_fraction": 0.25, "classes": None, "channels": 3, "max_pixels": 10**6}
RED, GREEN, BLUE, WHITE = (204, 0, 0), (0, 153, 0), (0, 0, 255), (255, 255, 255)


def quarters(mode="RGB"):
    """24x16: red, green above blue, white."""
    image = Image.new("RGB", (24, 16))
    for box, colour in zip(((0, 0), (12, 0), (0, 8), (12, 8)), (RED, GREEN, BLUE, WHITE), strict=True):
        image.paste(colour, (*box, box[0] + 12, box[1] + 8))
    return image.convert(mode)


def corners(image):
    """The middle of each quarter of a uint8 [channels, height, width]."""
    height, width = image.shape[1:]
    places = [(height // 4, width // 4), (height // 4, 3 * width // 4)]
    places += [(3 * height // 4, width // 4), (3 * height // 4, 3 * width // 4)]
    return [tuple(image[:, y, x].tolist()) for y, x in places]


def near(found, expected, tolerance=6):
    return all(
        abs(a - b) <= tolerance for one, two in zip(found, expected, strict=True) for a, b in zip(one, two, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# One image


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "RGB", {"quality": 95, "subsampling": 0}),
        ("a.jpeg", "CMYK", {"quality": 95}),
        ("a.png", "RGB", {}),
        ("a.png", "P", {}),
        ("a.png", "RGBA", {}),
        ("a.webp", "RGB", {"lossless": True}),
        ("a.bmp", "RGB", {}),
        ("a.gif", "P", {}),
        ("a.tif", "RGB", {"compression": "tiff_lzw"}),
        ("a.TIFF", "CMYK", {}),
    ],
)
def test_colours_come_out_of_every_format(tmp_path, name, mode, options):
    quarters(mode).save(tmp_path / name, **options)
    image = read_image(tmp_path / name)
    assert image.dtype == torch.uint8 and list(image.shape) == [3, 16, 24]
    assert near(corners(image), [RED, GREEN, BLUE, WHITE])
    grey = read_image(tmp_path / name, channels=1)
    assert list(grey.shape) == [1, 16, 24]
    assert near(corners(grey), [(61,), (90,), (29,), (255,)])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.bmp"])
def test_grey_files_give_equal_channels(tmp_path, name):
    Image.new("L", (8, 4), 77).save(tmp_path / name)
    assert read_image(tmp_path / name).unique().tolist() == [77]
    assert list(read_image(tmp_path / name, channels=1).shape) == [1, 4, 8]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, name):
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    for channels in (1, 3):
        assert read_image(tmp_path / name, channels)[0].tolist() == [[0, 1, 128, 255]]


def test_sixteen_bits_with_the_high_byte_first(tmp_path):
    values = np.array([[0, 256, 32768, 65535]], dtype=">u2")
    Image.frombytes("I;16B", (4, 1), values.tobytes()).save(tmp_path / "a.tif")
    assert (tmp_path / "a.tif").read_bytes()[:2] == b"MM"
    for channels in (1, 3):
        assert read_image(tmp_path / "a.tif", channels)[0].tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 2), (100, 100, 100, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    image.convert(mode).save(tmp_path / "a.png")
    assert near(read_image(tmp_path / "a.png")[:, 0].T.tolist(), [[255] * 3, [127] * 3, [100] * 3, [100] * 3], 1)


def test_a_transparent_colour_of_a_palette_lies_on_white(tmp_path):
    image = quarters("P")
    image.info["transparency"] = image.getpixel((2, 2))  # red
    image.save(tmp_path / "a.png", transparency=image.getpixel((2, 2)))
    assert near(corners(read_image(tmp_path / "a.png")), [WHITE, GREEN, BLUE, WHITE])


@pytest.mark.parametrize(("mode", "key", "other"), [("RGB", (9, 8, 7), (9, 8, 6)), ("L", 9, 8)])
def test_a_transparent_colour_of_an_image_without_a_palette_lies_on_white(tmp_path, mode, key, other):
    image = Image.new(mode, (2, 1), key)
    image.putpixel((1, 0), other)
    image.save(tmp_path / "a.png", transparency=key)
    plain = list(other) if mode == "RGB" else [other] * 3
    assert read_image(tmp_path / "a.png")[:, 0].T.tolist() == [[255] * 3, plain]


def test_one_bit_files(tmp_path):
    image = Image.new("1", (4, 2), 0)
    image.putpixel((3, 1), 1)
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 1)[0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 255]]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.jpg", {"quality": 95, "subsampling": 0}),
        ("a.png", {}),
        ("a.webp", {"lossless": True}),
        ("a.tif", {}),
    ],
)
def test_exif_rotation_is_applied(tmp_path, name, how):
    exif = Image.Exif()
    exif[274] = 6  # the top is on the right-hand side
    quarters().save(tmp_path / name, exif=exif, **how)
    image = read_image(tmp_path / name)
    assert list(image.shape) == [3, 24, 16]
    assert near(corners(image), [BLUE, RED, WHITE, GREEN])


@pytest.mark.parametrize(
    ("orientation", "seen"),  # where the first row and the first column of what was written are
    [
        (1, [RED, GREEN, BLUE, WHITE]),  # top, left
        (2, [GREEN, RED, WHITE, BLUE]),  # top, right
        (3, [WHITE, BLUE, GREEN, RED]),  # bottom, right
        (4, [BLUE, WHITE, RED, GREEN]),  # bottom, left
        (5, [RED, BLUE, GREEN, WHITE]),  # left, top
        (6, [BLUE, RED, WHITE, GREEN]),  # right, top
        (7, [WHITE, GREEN, BLUE, RED]),  # right, bottom
        (8, [GREEN, WHITE, RED, BLUE]),  # left, bottom
    ],
)
def test_every_orientation_of_exif(tmp_path, orientation, seen):
    exif = Image.Exif()
    exif[274] = orientation
    quarters().save(tmp_path / "a.png", exif=exif)
    assert near(corners(read_image(tmp_path / "a.png")), seen)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    quarters().resize((960, 640)).save(tmp_path / "a.jpg", quality=95)
    small = read_image(tmp_path / "a.jpg", at_least=(40, 80))
    assert list(small.shape) == [3, 160, 240]
    assert near(corners(small), [RED, GREEN, BLUE, WHITE])
    assert list(read_image(tmp_path / "a.jpg", at_least=(40, 81)).shape) == [3, 320, 480]
    assert list(read_image(tmp_path / "a.jpg", at_least=(400, 600)).shape) == [3, 640, 960]


@pytest.mark.parametrize(
    ("size", "reduced"),
    [
        ((448, 680), (56, 85)),
        ((449, 448), (113, 112)),  # 57 eighths are 456 pixels, 0.44 of a 28th too many
        ((225, 225), (113, 113)),  # 57 quarters are 228, 0.37 too many
        ((671, 673), (168, 169)),
        ((111, 448), (111, 448)),
    ],
)
def test_a_picture_is_in_the_same_place_whether_it_was_decoded_whole_or_small(tmp_path, size, reduced):
    """Bars of two 28ths of a side are where they are in the whole picture, up to a quarter of a 28th."""
    across, down = (np.arange(side) * 14 // side % 2 * 160 + 48 for side in size)
    Image.fromarray(np.maximum(across, down[:, None]).astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    small = read_image(tmp_path / "a.jpg", 1, at_least=(28, 20))
    assert small.shape[1:] == reduced[::-1]
    with Image.open(tmp_path / "a.jpg") as whole:
        expected, found = (
            np.asarray(image.resize((28, 28), Image.Resampling.BILINEAR)).astype(int)
            for image in (whole, Image.fromarray(small[0].numpy()))
        )
    assert np.abs(found - expected).max() <= 160 / 4 + 5


@pytest.mark.parametrize("content", [b"", b"not an image\n", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_what_is_no_image_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        read_image(path)
    assert (
        str(caught.value).count(str(path)) == 1 and "\n" not in str(caught.value) and "remove it" in str(caught.value)
    )


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.gif", "a.webp", "a.bmp"])
def test_a_truncated_image_is_refused(tmp_path, name):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match=name):
        read_image(tmp_path / name)


def test_an_image_bomb_is_refused_by_its_header(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 40_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))))
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RequestError, match=r"bomb\.png: 50000x40000 pixels are more than the 64,000,000 allowed"):
            read_image(tmp_path / "bomb.png")
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"nothing\.png: no such image file"):
        read_image(tmp_path / "nothing.png")


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def make_folder(top, classes=("cat", "dog"), count=8):
    for number, name in enumerate(classes):
        (top / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (6, 5), (50 * number, 0, i)).save(top / name / f"{i}.png")
    return top


def test_one_folder_is_split_class_by_class_the_same_every_time(tmp_path):
    make_folder(tmp_path)
    data, again = (image_folder(str(tmp_path), **FOLDER) for _ in range(2))
    assert data.classes == ["cat", "dog"]
    assert data.train.targets.bincount().tolist() == [6, 6] and data.test.targets.bincount().tolist() == [2, 2]
    assert not set(data.train.paths) & set(data.test.paths)
    assert data.test.paths.tolist() == again.test.paths.tolist()
    image, label = data.train[11]
    assert label == 1 and int(image[0, 0, 0]) == 50


def test_train_and_test_folders_share_their_classes(tmp_path):
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "test", ("dog",), 3)
    data = image_folder(str(tmp_path), **FOLDER)
    assert len(data.train) == 16 and data.test.targets.tolist() == [1, 1, 1]
    make_folder(tmp_path / "test", ("emu",), 1)
    with pytest.raises(RequestError, match=r"test/emu: a class without a folder"):
        image_folder(str(tmp_path), **FOLDER)


def test_names_in_capitals_and_folders_below_count_and_other_files_are_told(tmp_path, capsys):
    make_folder(tmp_path)
    (tmp_path / "cat" / "more").mkdir()
    (tmp_path / "cat" / "0.png").rename(tmp_path / "cat" / "more" / "A.PNG")
    (tmp_path / "cat" / "1.png").rename(tmp_path / "cat" / "B.PNG")  # beside what is no image
    (tmp_path / "cat" / "papers").mkdir()
    for name in ("notes.txt", ".DS_Store", "papers/a.txt", "papers/b.txt"):
        (tmp_path / "cat" / name).write_text("none")
    data = image_folder(str(tmp_path), **FOLDER)
    assert len(data.train) + len(data.test) == 16
    assert "3 files are no images" in (told := capsys.readouterr().out) and "notes.txt" in told


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda top: (top / "emu").mkdir(), r"emu: no image in this class folder"),
        (lambda top: [p.unlink() for p in (top / "cat").iterdir()], r"cat: no image in this class folder"),
    ],
)
def test_an_empty_class_folder_is_named(tmp_path, prepare, says):
    make_folder(tmp_path)
    prepare(tmp_path)
    with pytest.raises(RequestError, match=says):
        image_folder(str(tmp_path), **FOLDER)


def test_folders_without_classes_or_not_there(tmp_path):
    with pytest.raises(RequestError, match="no folder in it"):
        image_folder(str(tmp_path), **FOLDER)
    with pytest.raises(RequestError, match=r"dataset\.root=.*nothing: no such folder"):
        image_folder(str(tmp_path / "nothing"), **FOLDER)
    make_folder(tmp_path)
    with pytest.raises(RequestError, match=r"dataset\.test_fraction=0\.0 of 16 images leaves 0 for the test"):
        image_folder(str(tmp_path), **{**FOLDER, "test_fraction": 0.0})


# ---------------------------------------------------------------------------------------------------------------------
# CSV lists


@pytest.fixture
def photos(tmp_path):
    """Eight images, img/0.png to img/7.png."""
    (tmp_path / "img").mkdir()
    for i in range(8):
        Image.new("RGB", (6, 5), (i, 0, 0)).save(tmp_path / "img" / f"{i}.png")
    return tmp_path


def listed(photos, text, **settings):
    (photos / "labels.csv").write_text(text, encoding="utf-8")
    return csv_images(str(photos / "labels.csv"), str(photos / "img"), **{**LIST, **settings})


NUMBERS = "".join(f"{i}.png,{i % 2}\n" for i in range(8))
NAMES = "".join(f"{i}.png;{'dog' if i % 2 else 'cat'}\n" for i in range(8))


@pytest.mark.parametrize("header", ["", "file,label\n", "\ufefffile,label\n"])
def test_labels_as_numbers_with_and_without_header(photos, header):
    data = listed(photos, header + NUMBERS)
    assert data.classes == ["0", "1"]
    for part, count in ((data.train, 3), (data.test, 1)):
        assert part.targets.bincount().tolist() == [count, count]
        for image, label in (part[i] for i in range(len(part))):
            assert int(image[0, 0, 0]) % 2 == label


def test_labels_as_names_and_class_names_given(photos):
    assert listed(photos, NAMES).classes == ["cat", "dog"]
    assert listed(photos, "name;animal\n" + NAMES).train.targets.bincount().tolist() == [3, 3]
    backwards = "".join(reversed(NAMES.splitlines(keepends=True)))  # which class comes first changes nothing
    assert listed(photos, backwards).classes == ["cat", "dog"]
    data = listed(photos, NAMES, classes=["dog", "cat"])
    assert data.classes == ["dog", "cat"]
    assert all(int(image[0, 0, 0]) % 2 != label for image, label in (data.train[i] for i in range(6)))
    assert listed(photos, NUMBERS, classes=["even", "odd"]).classes == ["even", "odd"]
    data = listed(photos, NUMBERS, classes=["1", "0"])  # names, not numbers of classes
    assert all(int(image[0, 0, 0]) % 2 != label for image, label in (data.train[i] for i in range(6)))


def test_blanks_around_names_and_labels_do_not_count(photos):
    data = listed(photos, "".join(f" {i}.png , {'dog' if i % 2 else 'cat '}\n" for i in range(8)))
    assert data.classes == ["cat", "dog"] and len(data.train) + len(data.test) == 8


def test_the_limit_of_pixels_that_was_set_is_that_of_every_image(tmp_path, photos):
    make_folder(tmp_path / "folders")
    one = image_folder(str(tmp_path / "folders"), **{**FOLDER, "max_pixels": 4})
    for data in (one, listed(photos, NUMBERS, max_pixels=4)):
        for part in (data.train, data.test):
            with pytest.raises(RequestError, match="pixels are more than the 4 allowed"):
                part[0]


def test_a_test_list_of_its_own(photos):
    (photos / "test.csv").write_text("7.png,1\n")
    data = listed(photos, NUMBERS, test_annotations_file=str(photos / "test.csv"))
    assert len(data.train) == 8 and data.test.targets.tolist() == [1]
    (photos / "test.csv").write_text("7.png,1\n6.png,2\n")
    with pytest.raises(RequestError, match=r"test\.csv, row 2: label '2'; expected 0 to 1, as there are 2 classes"):
        listed(photos, NUMBERS, test_annotations_file=str(photos / "test.csv"))


def test_a_validation_list_of_its_own(photos, capsys):
    val, test = str(photos / "val.csv"), str(photos / "test.csv")
    (photos / "val.csv").write_text("file,kind\n6.png,1\n7.png,0\n")
    (photos / "test.csv").write_text("5.png,1\n")
    settings = {"annotations_file": str(photos / "labels.csv"), "img_dir": str(photos / "img"), **LIST}
    (photos / "labels.csv").write_text("".join(f"{i}.png,{i % 2}\n" for i in range(5)))
    given = {"_target_": "datasets.csv_images", "val_fraction": 0.5, "limit": None, **settings}
    splits, _ = load_splits({**given, "val_annotations_file": val, "test_annotations_file": test})
    found = {name: [path[-5:] for path in split.part.paths[split.indices.numpy()]] for name, split in splits.items()}
    assert found == {"train": [f"{i}.png" for i in range(5)], "val": ["6.png", "7.png"], "test": ["5.png"]}
    assert splits["val"].part.targets.tolist() == [1, 0]
    told = f"{val} is the validation part, and dataset.val_fraction is not used\n"
    assert capsys.readouterr().out == told
    data = csv_images(**settings, val_annotations_file=val)  # no list for the test
    assert (len(data.train), len(data.test), len(data.val)) == (4, 1, 2)
    assert not set(data.test.paths) & {*data.train.paths, *data.val.paths}
    said = capsys.readouterr().out.removeprefix(told)
    assert said.startswith("no dataset.test_annotations_file: dataset.test_fraction=0.25 of") and said.count("\n") == 1
    assert "labels.csv is the test (1 image, not trained on)" in said and "val.csv stays the validation part" in said
    for other in ("test_", ""):
        files = {**settings, f"{other}annotations_file": val, "val_annotations_file": f"{photos}/img/../val.csv"}
        with pytest.raises(RequestError, match=rf"val\.csv: the same file as dataset\.{other}annotations_file; valid"):
            csv_images(**files)
    (photos / "val.csv").write_text("6.png,1\n7.png,2\n")
    with pytest.raises(RequestError, match=r"val\.csv, row 2: label '2'; expected 0 to 1, as there are 2 classes"):
        csv_images(**settings, val_annotations_file=val)


def test_a_file_is_there_or_not_however_its_name_is_written(photos, monkeypatch):
    """Held against a question for each file; of a folder only so much is listed."""
    monkeypatch.setattr("engine.data.annotations.LISTED", 2)
    img, far = photos / "img", photos / "far"
    for folder in (img / "a" / "b", far):
        folder.mkdir(parents=True)
    for number in range(9):
        (img / "a" / f"{number}.png").touch()
    (img / "a" / "b" / "1.png").touch()
    (img / "a" / "folder.png").mkdir()
    (img / "link.png").symlink_to("a/0.png")
    (img / "gone.png").symlink_to("nowhere")
    (img / "round.png").symlink_to("round.png")
    (img / "far").symlink_to(far)
    (far / "x.png").touch()
    os.mkfifo(img / "fifo.png")
    there = [
        "0.png",
        "a/3.png",
        "a/b/1.png",
        "a/../1.png",
        "./2.png",
        "a//4.png",
        "link.png",
        "far/x.png",
        f"{far}/x.png",
    ]
    missing = [
        "8.png",
        "a/folder.png",
        "gone.png",
        "round.png",
        "fifo.png",
        "a/b/2.png",
        "b/1.png",
        "/0.png",
        "0.png/1.png",
    ]
    for name in missing:
        assert not os.path.isfile(os.path.join(img, name))
        with pytest.raises(
            RequestError, match=re.escape(f"labels.csv, row 10: {os.path.join(img, name)} is not there; ")
        ):
            listed(photos, "".join(f"{one},{place % 2}\n" for place, one in enumerate([*there, name])))
    data = listed(photos, "".join(f"{one},{place % 2}\n" for place, one in enumerate([*there, "0.png"])))
    assert sorted([*data.train.paths, *data.test.paths]) == sorted(os.path.join(img, one) for one in [*there, "0.png"])


@pytest.mark.parametrize(
    ("text", "settings", "says"),
    [
        ("\nfile,label\n\n" + NUMBERS + '"8\n.png",1\n', {}, r"row 13: .*8\\n\.png is not there"),
        (NUMBERS + "\n , \nnine.png,1\n7.png,0\nten.png,1\n", {}, r"row 11: .*nine.*, nor are those of 1 other row;"),
        ("nine.png,1\n" * 1000 + NUMBERS + "7.png\n", {}, r"row 1: .*nine.*, nor are those of 999 other rows"),
        (NUMBERS + "nine.png,1\n", {}, r"labels\.csv, row 9: .*nine\.png is not there"),
        ("file,label\n" + NUMBERS + "nine.png,1\n", {}, r"row 10: .*nine\.png is not there"),
        (NUMBERS + "7.png,5\n", {"classes": ["a", "b"]}, r"row 9: label '5'; expected 0 to 1, as there are 2 classes"),
        (NUMBERS + "7.png,-1\n", {"classes": ["a", "b"]}, r"row 9: label '-1'"),
        (NAMES + "7.png;cow\n", {"classes": ["cat", "dog"]}, r"row 9: label 'cow'; expected one of cat, dog"),
        (NUMBERS + "7.png,1000000\n", {}, r"row 9: label 1000000 would make"),
        ("file,label\n" + NUMBERS + "7.png,1000000\n", {}, r"row 10: label 1000000 would make"),
        (NUMBERS + "7.png\n", {}, r"row 9: .*expected a file name and a label"),
        (NUMBERS + "7.png,\n", {}, r"row 9: .*expected a file name and a label"),
        ("", {}, r"labels\.csv: lists no image"),
        ("file,label\n", {}, r"labels\.csv: lists no image"),
        (NUMBERS, {"test_fraction": 0.0}, r"dataset\.test_fraction=0\.0 of 8 images leaves 0 for the test"),
    ],
)
def test_bad_rows_are_told_with_their_number(photos, text, settings, says):
    with pytest.raises(RequestError, match=says) as caught:
        listed(photos, text, **settings)
    assert "\n" not in str(caught.value)


def test_a_list_or_image_folder_that_is_not_there(photos):
    with pytest.raises(RequestError, match=r"none\.csv: cannot be read as a CSV file"):
        csv_images(str(photos / "none.csv"), str(photos / "img"), **LIST)
    with pytest.raises(RequestError, match=r"dataset\.img_dir=.*none: no such folder"):
        csv_images(str(photos / "labels.csv"), str(photos / "none"), **LIST)


# ---------------------------------------------------------------------------------------------------------------------
# IDX files


def test_a_truncated_idx_or_gzip_file_is_told(tmp_path):
    content = b"\0\0\x08\x01" + struct.pack(">I", 5) + b"abcde"
    (tmp_path / "whole").write_bytes(content)
    assert read_idx(tmp_path / "whole").tolist() == list(b"abcde")
    (tmp_path / "short").write_bytes(content[:-2])
    with pytest.raises(RequestError, match=r"short: damaged: expected 5 bytes .* found 3"):
        read_idx(tmp_path / "short")
    (tmp_path / "short.gz").write_bytes(gzip.compress(content)[:-6])
    with pytest.raises(RequestError, match=r"short\.gz: cannot be read"):
        read_idx(tmp_path / "short.gz")


def test_the_bundled_digits_are_whole():
    data = datasets.digits()
    assert len(data.train[0]) + len(data.test[0]) == 1797
    assert data.test[1].bincount().min() >= 34


# ---------------------------------------------------------------------------------------------------------------------
# What is not what it seems: refused at once, in one line, with little memory


def png_of(*chunks):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    parts = [(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in parts)


def tiff_of(**more):
    """A grey TIFF of 16x16; `t273=(type, count)` replaces a tag, its values eights behind the directory."""
    tags = {256: (3, 1, 16), 257: (3, 1, 16), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8)}
    tags |= {277: (3, 1, 1), 278: (3, 1, 16), 279: (4, 1, 256)}
    tags |= {int(name[1:]): value for name, value in more.items()}
    entries = b"".join(struct.pack("<HHII", tag, *value) for tag, value in sorted(tags.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + bytes([8]) * 600_000


def gif_of(extension):
    file = io.BytesIO()
    Image.new("P", (4, 4)).save(file, "GIF")
    start = 13 + (3 << ((file.getvalue()[10] & 7) + 1) if file.getvalue()[10] & 128 else 0)
    return file.getvalue()[:start] + extension + file.getvalue()[start:]


def jpeg_of(segment, **options):
    file = io.BytesIO()
    Image.new("L", (2000, 2000)).save(file, "JPEG", **options)
    whole = file.getvalue()
    if options:  # the last scan over and over
        last = whole.rfind(b"\xff\xda")
        return whole[:-2] + whole[last:-2] * 300 + b"\xff\xd9"
    return whole[:2] + segment + whole[2:]


PIXELS = (b"IDAT", zlib.compress(bytes(14)))
BOMBS = {
    "eps.png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no JPEG, PNG, WebP, BMP, GIF or TIFF"),
    "pcx.jpg": (lambda: b"\x0a\x05\x01\x08" + bytes(200), "no JPEG, PNG, WebP, BMP, GIF or TIFF"),
    "before.png": (lambda: png_of(*[(b"abCd", b"")] * 100_000, PIXELS), "more than 50,000 parts"),
    "behind.png": (lambda: png_of(PIXELS, *[(b"abCd", b"")] * 100_000), "more than 50,000 parts"),
    "large.png": (lambda: png_of((b"abCd", bytes(17_000_000)), PIXELS), "bytes before its pixels"),
    "comments.gif": (lambda: gif_of(b"!\xfe" + b"\1a" * 600_000 + b"\0"), "more than 50,000 parts"),
    "empty.jpg": (lambda: jpeg_of(b"\xff\xe5\0\2" * 300_000), "more than 50,000 parts"),
    "scans.jpg": (lambda: jpeg_of(b"", progressive=True), r"\d+ scans of 2000x2000 pixels"),
    "strips.tif": (lambda: tiff_of(t273=(1, 600_000, 200)), "600,000 strips or tiles"),
    "tiles.tif": (lambda: tiff_of(t322=(3, 1, 20000), t323=(3, 1, 20000)), "tiles of 20000x20000 pixels"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_takes_long_or_another_format_is_refused(tmp_path, name):
    content, says = BOMBS[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(RequestError, match=f"{name}: cannot be read as an image .*{says}"):
        read_image(tmp_path / name)


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    with pytest.raises(RequestError, match=r"a\.png"):
        read_image(tmp_path / "a.png")
    assert not tmp_path.joinpath("out").exists()


def test_a_progressive_jpeg_and_a_large_file_are_read(tmp_path):
    noise = Image.effect_noise((1500, 1200), 90)
    noise.convert("RGB").save(tmp_path / "a.png")
    noise.save(tmp_path / "a.jpg", quality=100, progressive=True)
    assert min((tmp_path / name).stat().st_size for name in ("a.png", "a.jpg")) > 1 << 20
    assert read_image(tmp_path / "a.png")[1].numpy().tobytes() == noise.tobytes()
    with Image.open(tmp_path / "a.jpg") as image:
        assert read_image(tmp_path / "a.jpg", 1).numpy().tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "LA"])
def test_an_image_in_strips_is_the_whole_image(tmp_path, mode, monkeypatch):
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (40, 30), dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (40, 30, 4), dtype=np.uint8), "RGBA").convert(mode)
    image.save(tmp_path / "a.png", **({"transparency": 3} if mode == "P" else {}))
    for channels in (1, 3):
        whole = read_image(tmp_path / "a.png", channels)
        with monkeypatch.context() as patch:
            patch.setattr("engine.data.images.STRIP", 30 * 7)
            assert torch.equal(read_image(tmp_path / "a.png", channels), whole)


def test_only_regular_files_are_opened(tmp_path, photos):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("fifo.png", "device.png"):
        with pytest.raises(RequestError, match=rf"{name}: cannot be read as an image \(not a regular file\)"):
            read_image(tmp_path / name)
        with pytest.raises(RequestError, match=rf"{name}: cannot be read \(.*not a regular file"):
            read_idx(tmp_path / name)
        with pytest.raises(
            RequestError, match=rf"{name}: cannot be read as a CSV file in UTF-8 \(not a regular file\)"
        ):
            csv_images(str(tmp_path / name), str(photos / "img"), **LIST)


def test_an_idx_bomb_is_read_only_as_far_as_its_header_says(tmp_path):
    pack = zlib.compressobj(9, wbits=31)
    start = pack.compress(b"\0\0\x08\x03" + struct.pack(">III", 10, 28, 28)) + pack.flush(zlib.Z_FULL_FLUSH)
    zeros = pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)
    (tmp_path / "long.gz").write_bytes(start + zeros * 4000)  # 4 GB
    (tmp_path / "huge.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">III", 2**31, 2**31, 2**31)))
    (tmp_path / "honest.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">III", 4000, 1024, 1024)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError, match=r"long\.gz: damaged: expected 7840 bytes .*, found more"):
        read_idx(tmp_path / "long.gz")
    for name in ("huge", "honest"):
        with pytest.raises(RequestError, match=rf"{name}\.gz: its header says shape .* bytes"):
            read_idx(tmp_path / f"{name}.gz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("header", [b"\0\0\x08\0", b"\0\0\x08\xff" + bytes(1020), b"\0\0\x09\x01\0\0\0\1a", b"\0\0"])
def test_headers_of_no_idx_file(tmp_path, header):
    (tmp_path / "a").write_bytes(header)
    with pytest.raises(RequestError, match="not an IDX file of bytes"):
        read_idx(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"\0\0\x08\x02" + bytes(4) + b"\0\0\0\x1c")
    assert list(read_idx(tmp_path / "b").shape) == [0, 28]


def cifar_folder(top, protocol=2, **changes):
    folder = top / "cifar-10-batches-py"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3]}
        (folder / file).write_bytes(pickle.dumps(batch, protocol))
    names = {"label_names": list("abcd")}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol))
    for name, content in changes.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return folder


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_is_read_from_its_pickles(tmp_path, protocol):
    folder = cifar_folder(tmp_path, protocol)
    data = datasets.cifar10(str(tmp_path))
    expected = pickle.loads((folder / "data_batch_2").read_bytes())["data"].reshape(4, 3, 32, 32)
    assert np.array_equal(data.train[0][4:8].numpy(), expected) and data.classes == list("abcd")
    assert data.train[1].tolist() == [0, 1, 2, 3] * 5 and len(data.test[1]) == 4


def nested(depth):
    """10^depth values, of which each ten are the same."""
    value = [1] * 10
    for _ in range(depth):
        value = [value] * 10
    return value


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"


@pytest.mark.parametrize(
    "content",
    [
        ARRAY + b"(J\0\0\0\x7ftS'b'\ntR.",  # an array of 2 GB
        b"}r\xff\xff\xff\x7f.",  # a memo of as many places
        b"(" + b"]" * 1_100_000 + b"t.",
        b"cposix\nsystem\n(S'touch here'\ntR.",
        b"\x8e\xff\xff\xff\xff\xff\0\0\0.",  # bytes of a terabyte
        {"data": nested(28), "labels": nested(28)},
        {"data": np.zeros((4, 3072), np.uint8), "labels": [10**30] * 4},
        {"data": np.zeros((3, 3072), np.uint8), "labels": [1] * 4},
        {"data": np.asfortranarray(np.arange(4 * 3072).reshape(4, 3072).astype(np.uint8)), "labels": [1] * 4},
        [1],
        b"",
    ],
)
def test_a_hostile_pickle_is_refused_before_it_costs_anything(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cifar_folder(tmp_path, data_batch_1=content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError, match=r"data_batch_1: .*delete it and run again"):
        datasets.cifar10(str(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert not (tmp_path / "here").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Parts, links and what lies about


def test_no_way_through_links_leads_to_an_image_twice(tmp_path, capsys):
    make_folder(tmp_path / "top" / "train")
    make_folder(tmp_path / "top" / "test", count=4)
    make_folder(tmp_path / "elsewhere", ("deep",), 3)
    expected = image_folder(str(tmp_path / "top"), **FOLDER)
    train = tmp_path / "top" / "train"
    for place, target in (
        ("cat/up", ".."),
        ("cat/self", "."),
        ("dog/all", "../../../top"),
        ("dog/above", tmp_path),
        ("cat/tests", "../../test/dog"),
        ("dog/round", "round"),  # leads nowhere but to itself
    ):
        (train / place).symlink_to(target)
    data = image_folder(str(tmp_path / "top"), **FOLDER)
    assert data.train.paths.tolist() == expected.train.paths.tolist()
    assert data.test.paths.tolist() == expected.test.paths.tolist()
    assert "5 links to folders of this data set are not followed: each folder is read once" in capsys.readouterr().out

    (train / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (train / "dog" / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    data = image_folder(str(tmp_path / "top"), **FOLDER)
    assert data.train.targets.bincount().tolist() == [8 + 3, 8]
    assert "6 links" in capsys.readouterr().out


def test_class_folders_and_parts_may_be_links_to_elsewhere(tmp_path, capsys):
    make_folder(tmp_path / "elsewhere")
    (tmp_path / "top" / "train").mkdir(parents=True)
    for name in ("cat", "dog"):
        (tmp_path / "top" / "train" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert len(image_folder(str(tmp_path / "top"), **FOLDER).train) == 12
    assert "not followed" not in capsys.readouterr().out
    (tmp_path / "top" / "test").symlink_to("train")
    with pytest.raises(RequestError, match=r"test: the same folder as .*train; .* images of their own"):
        image_folder(str(tmp_path / "top"), **FOLDER)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_folder_for_validation_is_the_validation_part(tmp_path, capsys, name):
    for part, count in (("train", 8), (name, 3), ("test", 2)):
        make_folder(tmp_path / part, count=count)
    given = settings(tmp_path)
    splits, classes = load_splits(given)
    found = {part: split.part.paths[split.indices.numpy()].tolist() for part, split in splits.items()}
    assert {part: len(paths) for part, paths in found.items()} == {"train": 16, "val": 6, "test": 4}
    assert all(f"/{name}/" in path for path in found["val"]) and classes == ["cat", "dog"]
    assert f"{name} is the validation part, and dataset.val_fraction is not used" in capsys.readouterr().out
    assert fingerprint(splits).startswith("train 16") and "val 6" in fingerprint(splits)
    assert [len(split) for split in load_splits({**given, "limit": 2})[0].values()] == [2, 2, 2]
    resized = [{"Resize": {"size": [4, 4]}}]
    given |= {"cache": True, "cache_dir": str(tmp_path / "cache"), "train_transforms": resized}
    splits, _ = load_splits({**given, "eval_transforms": resized})
    assert list(splits["val"].part[0].shape) == [6, 3, 4, 4] and len(splits["train"]) == 16


def test_train_and_validation_folders_without_a_test(tmp_path, capsys):
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "val", count=2)
    make_folder(tmp_path / "papers")
    data = image_folder(str(tmp_path), **FOLDER)
    assert (len(data.train), len(data.test), len(data.val)) == (12, 4, 4)
    said = capsys.readouterr().out
    assert "has no test/: dataset.test_fraction=0.25 of train/ is the test (4 images, not trained on)" in said
    assert "val/ stays the validation part; to have that as the test, rename it to test/" in said and "papers/" in said
    parts = [set(part.paths.tolist()) for part in (data.train, data.val, data.test)]
    assert len(set.union(*parts)) == 20 and all("/val/" in path for path in parts[1])


def in_train(top):
    make_folder(top / "train" / "animals")


def both_vals(top):
    for name in ("train", "val", "valid"):
        make_folder(top / name)


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (
            lambda top: make_folder(top / "photos" / "train"),
            r"one class folder only, photos/; .*dataset\.root=.*/photos\?",
        ),
        (lambda top: make_folder(top / "photos"), r"one class folder only, photos/; .*dataset\.root=.*/photos\?"),
        (in_train, r"one class folder only, animals/; .* if cat, dog are the classes, move them one level up"),
        (lambda top: make_folder(top, ("cat",)), r"one class folder only, cat/; a classifier needs at least two$"),
        (
            lambda top: [make_folder(top / n) for n in ("Training", "Testing")],
            r"Testing: seems to hold the test images",
        ),
        (lambda top: [make_folder(top / n) for n in ("train", "Test_Set")], r"Test_Set: .* rename it to test"),
        (lambda top: [make_folder(top / "a" / n) for n in ("train", "test")] + [(top / "b").mkdir()], r"root=.*/a\?"),
        (lambda top: make_folder(top / "test"), r"test: seems to hold the test images, .* there is no train/"),
        (both_vals, r"both val/ and valid/ are there"),
    ],
)
def test_folders_that_cannot_be_meant_are_told_with_a_guess(tmp_path, prepare, says):
    prepare(tmp_path)
    with pytest.raises(RequestError, match=says):
        image_folder(str(tmp_path), **FOLDER)


def test_what_file_managers_leave_is_passed_over_silently(tmp_path, capsys):
    make_folder(tmp_path)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png"):
        (tmp_path / "cat" / name).write_text("none")
    for name in ("__MACOSX", "cat/.ipynb_checkpoints", "dog/@eaDir"):
        make_folder(tmp_path / name, ("x",), 1)
    data = image_folder(str(tmp_path), **FOLDER)
    assert data.classes == ["cat", "dog"] and len(data.train) + len(data.test) == 16
    assert capsys.readouterr().out == ""
    for name in ("a.txt", "b.txt"):
        (tmp_path / "dog" / name).write_text("none")
    image_folder(str(tmp_path), **FOLDER)
    assert capsys.readouterr().out.startswith("2 files are no images and left out of ")


def test_names_that_are_no_text_are_written_as_escapes(tmp_path, call):
    make_folder(tmp_path / "top", ("cat",))
    folder = os.fsencode(tmp_path / "top") + b"/d\xffg\x1b"
    os.mkdir(folder)
    for i in range(8):
        Image.new("RGB", (6, 5)).save(tmp_path / "a.png")
        os.rename(tmp_path / "a.png", folder + b"/\xe9%d.png" % i)
    with open(folder + b"/\xe9.txt", "w"):
        pass
    answer = call("datasets", "dataset=image_folder", "dataset.root=top", "num_workers=0")
    assert answer.code == 0 and r"d\udcffg\x1b" in answer.out and "\x1b" not in answer.out


def test_paths_in_one_block_are_those_of_a_list():
    names = ["a.png", "ä/ö.png", "\udcff.jpg", "", "x" * 300]
    paths = Paths.of(names)
    assert paths.tolist() == list(paths) == names and len(paths) == 5 and "ä/ö.png" in paths
    assert [paths[place] for place in (0, np.int64(2), -1, -5)] == [names[place] for place in (0, 2, -1, -5)]
    assert paths[np.array([3, 1, 1])].tolist() == ["", "ä/ö.png", "ä/ö.png"] and paths[1:3].tolist() == names[1:3]
    assert paths[np.arange(5) % 2 == 1].block is paths.block  # a part of them takes no more of it
    assert (paths[3:] + Paths.of(["b"]) + paths).tolist() == [*names[3:], "b", *names]
    assert Paths.of([]).tolist() == []
    for place in (5, -6):
        with pytest.raises(IndexError):
            paths[place]


def test_what_is_kept_of_an_image_is_its_name_and_a_few_bytes(tmp_path):
    """A list of Python's texts would take 49 bytes more of each."""
    names = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(500)]
    (tmp_path / "labels.csv").write_text("".join(f"{name},{name[:3]}\n" for name in names))
    for label in ("cat", "dog"):
        (tmp_path / "img" / label).mkdir(parents=True)
    for name in names:
        (tmp_path / "img" / name).touch()
    for make in (
        lambda: image_folder(str(tmp_path / "img"), **FOLDER),
        lambda: csv_images(str(tmp_path / "labels.csv"), str(tmp_path / "img"), **LIST),
    ):
        make()  # once for what is imported and kept for good
        tracemalloc.start()
        data = make()
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(data.train) + len(data.test) == len(names)
        length = max(map(len, data.train.paths))
        assert length < kept / len(names) < length + 20


def test_what_is_no_file_is_told_with_the_number_of_all(tmp_path):
    make_folder(tmp_path)
    os.mkfifo(tmp_path / "cat" / "a.png")
    (tmp_path / "cat" / "b.png").symlink_to("nowhere")
    (tmp_path / "cat" / "c.png").symlink_to("c.png")
    with pytest.raises(
        RequestError, match=r"no regular file or a link to nothing, nor .*dataset\.skip_unreadable=true"
    ):
        load_splits({**settings(tmp_path), "val_fraction": 0.0, "test_fraction": 0.1})
    splits, _ = load_splits({**settings(tmp_path), "val_fraction": 0.0, "test_fraction": 0.1, "skip_unreadable": True})
    assert len(splits["train"]) + len(splits["test"]) == 19


def test_looking_at_images_counts_those_that_cannot_be_read(tmp_path, call):
    make_folder(tmp_path / "top")
    for name in ("cat/0.png", "dog/1.png", "dog/2.png", "dog/3.png"):
        (tmp_path / "top" / name).write_bytes(b"none")
    answer = call("datasets", "dataset=image_folder", "dataset.root=top", "num_workers=0")
    assert answer.code and re.match(r"error: 4 images cannot be read \(.*\); the first: top/.*png: ", answer.err)
    assert answer.err.count("\n") == 1


def test_looking_tells_what_is_in_two_parts_what_cannot_be_read_and_uneven_classes(tmp_path, call):
    number, top = 0, tmp_path / "top"
    for part, counts in (("train", (12, 4)), ("val", (3, 2)), ("test", (3, 3))):
        for name, count in zip(("cat", "dog"), counts, strict=True):
            (top / part / name).mkdir(parents=True)
            for i in range(count):
                number += 1  # no two are the same
                Image.new("RGB", (6, 5), (number, 0, 0)).save(top / part / name / f"{i}.png")
    for i in range(5):
        (top / "test" / "dog" / f"copy{i}.png").write_bytes((top / "train" / "cat" / "3.png").read_bytes())
    (top / "test" / "dog" / "a.png").write_bytes((top / "val" / "dog" / "1.png").read_bytes())
    whole = (top / "test" / "cat" / "2.png").read_bytes()
    (top / "test" / "cat" / "2.png").write_bytes(whole[:-30])  # cut off
    for i in range(4):
        (top / "train" / "cat" / f"x{i}.jpg").write_bytes(whole[:40])
    typed = ["dataset=image_folder", "dataset.root=top", "num_workers=0", "dataset.balance=true"]
    answer = call("datasets", *typed)
    assert answer.code == 1
    found = re.fullmatch(
        r"error: 5 images cannot be read \(4 of train, 1 of test\); the first: (\S+): .*\n", answer.err
    )
    assert found and found[1] == "top/train/cat/x0.jpg"
    copies = ", ".join(f"top/test/dog/copy{i}.png = top/train/cat/3.png" for i in range(3))
    assert answer.out.splitlines()[-5:] == [
        "cannot be read: 4 of 20 train images: "
        "top/train/cat/x0.jpg, top/train/cat/x1.jpg, top/train/cat/x2.jpg and 1 more",
        "cannot be read: 1 of 12 test images: top/test/cat/2.png",
        f"the same, byte for byte: 5 of 12 test images are in train too: {copies} and 2 more",
        "the same, byte for byte: 1 of 12 test images are in val too: top/test/dog/a.png = top/val/dog/1.png",
        "what was seen in training says little about new images: take it out of one of the two",
    ]
    assert "largest class cat 12, smallest dog 4, 3.00 to 1: dataset.balance=true draws" in answer.out
    assert re.search(r"^cat +12 +3 +3$", answer.out, re.MULTILINE)  # what there is, not what is drawn
    assert (tmp_path / "samples.png").exists()
    for i in range(6):
        (top / "test" / "dog" / ("2.png" if i == 5 else f"copy{i}.png")).unlink()
    (top / "test" / "cat" / "2.png").unlink()
    (top / "test" / "dog" / "a.png").unlink()
    answer = call("datasets", *typed, "dataset.skip_unreadable=true")
    assert answer.code == 0, answer.err
    assert answer.out.endswith("\nno image is in two of train, val, test (byte for byte)\n")


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"a": 5, "b": 5}, "every class has 5 training images"),
        ({"a": 14, "b": 10, "c": 12}, "largest class a 14, smallest b 10, 1.40 to 1"),
        (
            {"a": 15, "b": 10},
            "largest class a 15, smallest b 10, 1.50 to 1: dataset.balance=true draws all equally often,",
        ),
        ({"a": 0, "b": 1200}, "largest class b 1,200, smallest a 0: no model learns a class without images"),
    ],
)
def test_how_uneven_classes_are_and_from_where_on_something_is_done(counts, says):
    assert uneven(counts).startswith(says) and uneven(counts).count(": ") == says.count(": ")


def test_large_files_are_compared_to_their_end(tmp_path):
    """A BMP begins with the lowest row: these are the same for the first megabyte."""
    picture, splits = Image.new("RGB", (640, 600), (9, 8, 7)), {}
    for name, value in (("train", 1), ("val", 2), ("test", 1)):
        picture.putpixel((0, 0), (value, 0, 0))
        picture.save(tmp_path / f"{name}.bmp")
        splits[name] = Split(ImageFiles([str(tmp_path / f"{name}.bmp")], torch.zeros(1).long(), 3), torch.arange(1), 2)
    found = in_two_splits({name: look_at(split, name, 1) for name, split in splits.items()})
    assert found == {("train", "val"): [], ("train", "test"): [(0, 0)], ("val", "test"): []}


def test_images_in_memory_are_compared_pixel_for_pixel():
    """Against a plain loop; a place is that in the split, whichever samples of the data it has."""
    generator = torch.Generator().manual_seed(0)
    splits, seen = {}, {}
    for name, count in (("train", 60), ("test", 40)):
        images = torch.randint(0, 2, (count, 1, 2, 3), generator=generator).to(torch.uint8)  # of 64 that there are
        indices = torch.randperm(count, generator=generator)[: count - 10]
        splits[name] = Split((images, torch.zeros(count, dtype=torch.int64)), indices, 2)
        seen[name] = [images[i].flatten().tolist() for i in indices]
    looked = {name: look_at(split, name, 1) for name, split in splits.items()}
    expected = [(seen["train"].index(image), b) for b, image in enumerate(seen["test"]) if image in seen["train"]]
    assert 5 < len(expected) < 30 and in_two_splits(looked) == {("train", "test"): expected}
    stream = Split([], None, 2)
    assert look_at(stream, "train", 1) is None


# ---------------------------------------------------------------------------------------------------------------------
# Lists that are not as they should be


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "name,set,kind\n" + NUMBERS.replace(",", ",train,"),
            r"is 'train' in every row; is column 3 \(kind\) the label\?",
        ),
        ("name,id,kind\n" + "".join(f"{i}.png,x{i},{i % 2}\n" for i in range(8)), r"8 values in 8 rows; is column 3"),
        ("".join(f"{i}.png,{i},{i % 2}\n" for i in range(8)), r"8 values in 8 rows; is column 3 the label"),
        (NUMBERS.replace(",1", ",0"), r"is '0' in every row; expected two or more"),
        ("nine.png,1\n" + NUMBERS, r"row 1: .*nine\.png is not there; correct"),
        ("nine.png,name\n" + NAMES.replace(";", ","), r"row 1: .*nine\.png is not there"),
        ("nine,0\n" + NUMBERS, r"row 1: .*nine is not there"),
        (NUMBERS.replace(".png", ""), r"row 1: .*0 is not there, nor are those of 7 other rows; .*ending \(\.png\)"),
        (NUMBERS + "7.png," + "9" * 5000 + "\n", r"row 9: label 9{77}\.\.\. would make [0-9,]+ classes"),
        ("".join(f"{i}.png,-{1 + i % 2}\n" for i in range(8)), r"row 1: label -1 is below 0"),
        (NUMBERS + "a\0b.png,1\n", r"row 9: .*a\\x00b\.png is not there|line contains NUL"),
        (NUMBERS + "a" * 5000 + ",1\n", r"row 9: .*aaa\.\.\.aaa.* is not there"),
        (NUMBERS + "a" * 200_000 + ",1\n", r"row 9: field larger than field limit"),
        ("\x1b[2J\n" + NUMBERS, r"row 1: .*\\x1b\[2J.*expected a file name and a label"),
    ],
)
def test_lists_that_cannot_be_meant_are_told(photos, text, says):
    with pytest.raises(RequestError, match=says) as caught:
        listed(photos, text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_line_ends_of_every_system(photos, end):
    assert listed(photos, NAMES.replace("\n", end)).train.targets.bincount().tolist() == [3, 3]


def test_random_files_are_read_or_refused_in_one_line(tmp_path, photos):
    rng = random.Random(0)
    good = [NUMBERS.encode(), gzip.compress(b"\0\0\x08\x01\0\0\0\5abcde"), (photos / "img" / "1.png").read_bytes()]
    good.append((cifar_folder(tmp_path) / "data_batch_1").read_bytes()[:400])
    for _ in range(150):
        content = bytearray(rng.choice(good))
        for _ in range(rng.randint(0, 6)):
            content[rng.randrange(len(content))] = rng.choice([0, 255, 44, 10, 34, rng.randrange(256)])
        for name in ("a.csv", "a.gz", "a.png", "a.jpg"):
            (tmp_path / name).write_bytes(content)
        for read in (
            lambda: csv_images(str(tmp_path / "a.csv"), str(photos / "img"), **LIST),
            lambda: read_idx(tmp_path / "a.gz"),
            lambda: read_image(tmp_path / "a.png"),
            lambda: read_pickle(tmp_path / "a.jpg"),
        ):
            try:
                read()
            except RequestError as error:
                assert str(error).isprintable()


# ---------------------------------------------------------------------------------------------------------------------
# Which samples


def settings(top, **changes):
    common = {"limit": None, "val_fraction": 0.1, "train_transforms": [], "eval_transforms": [], "cache": False}
    return {"_target_": "datasets.image_folder", "root": str(top), **FOLDER, **common, **changes}


def test_a_limit_of_sorted_images_has_all_classes(tmp_path):
    make_folder(tmp_path, ("ant", "bee", "cat"), 10)
    splits, _ = load_splits(settings(tmp_path, limit=6, val_fraction=0.2))
    counts = [split.part.targets[split.indices].bincount(minlength=3).tolist() for split in splits.values()]
    assert counts[0] == [2, 2, 2] and min(map(min, counts)) >= 1


def test_overfitting_says_what_its_figure_means(call):
    answer = call("train", "debug=overfit", "epochs=3", "model.hidden=[8]")
    assert answer.code == 0, answer.err
    last = re.search(r"epoch 3/3 .*? accuracy ([0-9.]+%)", answer.out)[1]
    assert f"by heart {last} of the 16 training samples: 100 % is right" in answer.out


def test_early_stopping_needs_a_validation_part(call, tmp_path):
    error = call("train", "early_stopping.patience=2", "dataset.val_fraction=0").error
    assert error.startswith("early_stopping.patience=") and "there is no validation part" in error
    assert not (tmp_path / "checkpoints").exists()
