"""Image files, folders, CSV lists and IDX files: read as they are meant, or refused in one line."""

import gzip
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from datasets import csv_images, image_folder, read_idx, read_image
from engine.errors import RequestError

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


def test_one_bit_files(tmp_path):
    image = Image.new("1", (4, 2), 0)
    image.putpixel((3, 1), 1)
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 1)[0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 255]]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the top is on the right-hand side
    quarters().save(tmp_path / "a.jpg", quality=95, subsampling=0, exif=exif)
    image = read_image(tmp_path / "a.jpg")
    assert list(image.shape) == [3, 24, 16]
    assert near(corners(image), [BLUE, RED, WHITE, GREEN])


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    quarters().resize((960, 640)).save(tmp_path / "a.jpg", quality=95)
    small = read_image(tmp_path / "a.jpg", at_least=(40, 60))
    assert list(small.shape) == [3, 160, 240]
    assert near(corners(small), [RED, GREEN, BLUE, WHITE])
    assert list(read_image(tmp_path / "a.jpg", at_least=(400, 600)).shape) == [3, 640, 960]


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
    (tmp_path / "cat" / "notes.txt").write_text("none")
    (tmp_path / "cat" / ".DS_Store").write_text("none")
    data = image_folder(str(tmp_path), **FOLDER)
    assert len(data.train) + len(data.test) == 16
    assert "1 file is no image" in (told := capsys.readouterr().out) and "notes.txt" in told


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
    data = listed(photos, NAMES, classes=["dog", "cat"])
    assert data.classes == ["dog", "cat"]
    assert all(int(image[0, 0, 0]) % 2 != label for image, label in (data.train[i] for i in range(6)))
    assert listed(photos, NUMBERS, classes=["even", "odd"]).classes == ["even", "odd"]


def test_a_test_list_of_its_own(photos):
    (photos / "test.csv").write_text("7.png,1\n")
    data = listed(photos, NUMBERS, test_annotations_file=str(photos / "test.csv"))
    assert len(data.train) == 8 and data.test.targets.tolist() == [1]
    (photos / "test.csv").write_text("7.png,1\n6.png,2\n")
    with pytest.raises(RequestError, match=r"test\.csv, row 2: label '2'; expected 0 to 1, as there are 2 classes"):
        listed(photos, NUMBERS, test_annotations_file=str(photos / "test.csv"))


@pytest.mark.parametrize(
    ("text", "settings", "says"),
    [
        (NUMBERS + "nine.png,1\n", {}, r"labels\.csv, row 9: .*nine\.png is not there"),
        ("file,label\n" + NUMBERS + "nine.png,1\n", {}, r"row 10: .*nine\.png is not there"),
        (NUMBERS + "7.png,5\n", {"classes": ["a", "b"]}, r"row 9: label '5'; expected 0 to 1, as there are 2 classes"),
        (NUMBERS + "7.png,-1\n", {"classes": ["a", "b"]}, r"row 9: label '-1'"),
        (NAMES + "7.png;cow\n", {"classes": ["cat", "dog"]}, r"row 9: label 'cow'; expected one of cat, dog"),
        (NUMBERS + "7.png,1000000\n", {}, r"row 9: label 1000000 would make"),
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
