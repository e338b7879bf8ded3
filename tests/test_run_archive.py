"""The reader of torch.save's archives: what is written comes back, limits from both sides, nothing is called."""

from __future__ import annotations

import copy
import io
import pickle
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.run import archive


def loaded(content: bytes, path: Path) -> Any:
    path.write_bytes(content)
    return archive.load(path)


def refused(content: bytes, path: Path) -> str:
    """Why a file is refused."""
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        archive.load(path)
    return str(error.value)


def packed(records: dict[str, bytes], compressed: tuple[str, ...] = ()) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        for name, content in records.items():
            file.writestr(name, content, zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED)
    return raw.getvalue()


def pickled(operations: bytes, **records: bytes) -> bytes:
    """An archive with these operations between the first and the last of its pickle, and these data."""
    data = {f"a/data/{name.removeprefix('_')}": content for name, content in records.items()}
    return packed({"a/data.pkl": b"\x80\x02" + operations + b".", **data})


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def storage(key: str = "0", kind: str = "storage", name: str = "torch\nFloatStorage") -> bytes:
    return b"(" + text(kind) + b"c" + name.encode() + b"\n" + text(key) + text("cpu") + number(0) + b"tQ"


def tensor(size: bytes, stride: bytes, offset: bytes = b"K\x00", of: bytes | None = None) -> bytes:
    """Operations that make a tensor; of a size and stride of tuples of small numbers."""
    begin = b"ctorch._utils\n_rebuild_tensor_v2\n(" + (of or storage()) + offset
    shape = [b"(" + b"".join(b"K" + bytes([n]) for n in numbers) + b"t" for numbers in (size, stride)]
    return begin + b"".join(shape) + b"\x89ccollections\nOrderedDict\n)RtR"


def saved(value: Any, **settings: Any) -> bytes:
    raw = io.BytesIO()
    torch.save(value, raw, **settings)
    return raw.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# What is written comes back


PLAIN = {
    "small": [0, 1, 255, 256, 65535, 65536, -1, 2**31 - 1, -(2**31), 2**31, 2**600],
    "other": (1.5, True, False, None, "", "é", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    "empty": [[], {}, [], {}],
    -3: {7: None, "a": 0.25, "b": [], "c": 0.5},
    "one": [None],
    "pair": {"x": 1},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_comes_back_from_each_protocol(tmp_path: Path, protocol: int) -> None:
    many = [[f"text {n}", f"text {n}"] for n in range(300)]  # more than one byte counts are remembered
    shared = [1, 2]
    value = {**PLAIN, "many": many, "shared": [shared, shared, many[299], many[0]]}
    content = packed({"a/data.pkl": pickle.dumps(value, protocol=protocol)})
    found = loaded(content, tmp_path / "a.pt")
    assert found == value
    assert [type(item) for item in found["other"]] == [type(item) for item in value["other"]]
    found["empty"][0].append(1)
    assert found["empty"] == [[1], {}, [], {}] and loaded(content, tmp_path / "a.pt") == value  # no two are one


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("dtype", list(archive.STORAGES.values()), ids=str)
def test_tensors_of_each_kind_come_back(tmp_path: Path, dtype: torch.dtype, protocol: int) -> None:
    value = torch.tensor([[0, 1, 2], [3, 100, 5]]).to(dtype)
    found = loaded(saved({"t": value, "view": value[:, 1:].t()}, pickle_protocol=protocol), tmp_path / "a.pt")
    assert found["t"].dtype == dtype and torch.equal(found["t"], value)
    assert torch.equal(found["view"], value[:, 1:].t()) and found["view"].stride() == (1, 3)


def test_a_module_s_state_comes_back_without_its_attributes(tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    assert hasattr(state, "_metadata")
    found = loaded(saved(state), tmp_path / "a.pt")
    assert type(found) is dict and list(found) == list(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_record_longer_than_one_piece_is_whole(tmp_path: Path) -> None:
    value = torch.randint(0, 256, (5_000_001,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(saved(value), tmp_path / "a.pt"), value)


# ---------------------------------------------------------------------------------------------------------------------
# Archives


def test_an_archive_has_one_pickle_in_one_folder_and_is_not_compressed(tmp_path: Path) -> None:
    path, none = tmp_path / "a.pt", pickle.dumps({"a": 1}, protocol=2)
    assert loaded(packed({"x/data.pkl": none}), path) == {"a": 1}
    for names in (["data.pkl"], ["x/y/data.pkl"], ["x/mydata.pkl"], ["x/data.pkl", "y/data.pkl"]):
        assert "no data.pkl" in refused(packed(dict.fromkeys(names, none)), path), names
    records = {"x/data.pkl": none, "x/version": b"3\n"}
    for name in records:
        assert "compressed" in refused(packed(records, compressed=(name,)), path), name


def test_numbers_of_the_other_byte_order_are_not_misread(tmp_path: Path) -> None:
    records = {"x/data.pkl": pickle.dumps({}, protocol=2), "x/byteorder": b"little"}
    assert loaded(packed(records), tmp_path / "a.pt") == {}
    assert "byte order" in refused(packed({**records, "x/byteorder": b"big"}), tmp_path / "a.pt")


@pytest.mark.parametrize("record", ["x/version", "x/empty", "x/data.pkl"])
def test_the_checksum_of_each_record_counts(tmp_path: Path, record: str) -> None:
    records = {"x/data.pkl": pickle.dumps({}, protocol=2), "x/version": b"3\n", "x/empty": b""}
    content = bytearray(packed(records))
    entry = content.rfind(b"PK\x01\x02", 0, content.rfind(record.encode()))
    content[entry + 16] ^= 1  # of the checksum in the table of contents
    assert "Bad CRC-32" in refused(bytes(content), tmp_path / "a.pt")


def test_what_zipfile_says_of_an_archive_is_a_refusal(tmp_path: Path) -> None:
    path, records = tmp_path / "a.pt", {"x/y": b"0" * 1000, "x/data.pkl": pickle.dumps({}, protocol=2)}
    good = packed(records)
    entries = [good.find(b"PK\x01\x02"), good.rfind(b"PK\x01\x02")]
    locked, newer, beyond = bytearray(good), bytearray(good), bytearray(good)
    for place in (good.rfind(b"PK\x03\x04") + 6, entries[1] + 8):
        locked[place] |= 1
    assert "encrypted" in refused(bytes(locked), path)
    newer[entries[1] + 6] = 99
    assert "no archive of torch.save" in refused(bytes(newer), path)
    assert "no archive of torch.save" in refused(b"text", path)
    for entry, size in zip(entries, (0, 900), strict=True):
        beyond[entry + 20 : entry + 28] = size.to_bytes(4, "little") * 2
    assert "no archive of torch.save" in refused(bytes(beyond), path)  # its last record goes on after the end
    cut = bytearray(good)
    cut[entries[0] + 16 : entries[0] + 24] = zlib.crc32(b"0" * 7).to_bytes(4, "little") + (7).to_bytes(4, "little")
    assert "x/y is cut off" in refused(bytes(cut), path)


# ---------------------------------------------------------------------------------------------------------------------
# Limits, from both sides


def test_texts_have_at_most_16_mib_together_as_often_as_they_are_met() -> None:
    half = "x" * (8 * 1024 * 1024)
    archive.check_data({"a": half, "b": [half]}, 0)
    with pytest.raises(ValueError, match="16,777,217 characters"):
        archive.check_data([half, half, "x"], 0)


@pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: (inner,), lambda inner: {"a": inner}])
def test_there_are_at_most_32_levels(wrap: Any) -> None:
    value: Any = 0
    for _ in range(32):
        value = wrap(value)
    archive.check_data(value, 0)
    with pytest.raises(ValueError, match="32 levels"):
        archive.check_data(wrap(value), 0)


def test_a_name_has_at_most_1000_characters() -> None:
    archive.check_data({10**3000: 0, "x" * 1000: 0}, 0)
    with pytest.raises(ValueError, match="1,000 characters"):
        archive.check_data({"a": 0, "x" * 1001: 0}, 0)


def test_tensors_stand_for_at_most_twice_the_file(tmp_path: Path) -> None:
    def content(rest: int) -> bytes:
        """A byte tensor of 3,000 in the file, met twice, and a part of it."""
        whole, kind = (3000).to_bytes(2, "little"), storage(name="torch\nByteStorage")
        begin = b"ctorch._utils\n_rebuild_tensor_v2\n(" + kind + b"K\x00"
        one = begin + b"M" + whole + b"\x85K\x01\x85tR"
        part = begin + number(rest) + b"\x85K\x01\x85tR"
        return pickled(b"(" + one * 2 + part + b"t", _0=bytes(3000))

    most = 2 * (len(content(0)) - 3000)
    assert [len(found) for found in loaded(content(most), tmp_path / "a.pt")] == [3000, 3000, most]
    assert "more than it holds" in refused(content(most + 1), tmp_path / "a.pt")


def test_values_operations_and_tensors_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, one = tmp_path / "a.pt", tensor(b"\x01", b"\x01")
    monkeypatch.setattr(archive, "MOST_TENSORS", 3)
    assert len(loaded(pickled(b"(" + one * 3 + b"t", _0=bytes(4)), path)) == 3
    assert "more than 3 tensors" in refused(pickled(b"(" + one * 4 + b"t", _0=bytes(4)), path)
    monkeypatch.setattr(archive, "MOST_VALUES", 20)
    archive.check_data([None] * 19, 0)  # and the list
    with pytest.raises(ValueError, match="20 values"):
        archive.check_data([None] * 20, 0)
    assert loaded(pickled(b"(" + b"N" * 17 + b"t"), path) == (None,) * 17  # and four more
    assert "more than 20 operations" in refused(pickled(b"(" + b"N" * 18 + b"t"), path)


@pytest.mark.parametrize(
    ("size", "stride", "offset", "fits"),
    [
        (b"\x02\x03", b"\x03\x01", 0, True),
        (b"\x02\x03", b"\x03\x01", 1, False),  # the last one lies behind the data
        (b"\x06", b"\x01", 0, True),
        (b"\x07", b"\x01", 0, False),
        (b"\x01", b"\x01", 5, True),
        (b"\x01", b"\x01", 6, False),
        (b"\x02", b"\x05", 0, True),
        (b"\x02", b"\x06", 0, False),
        (b"\x06", b"\x00", 0, True),
        (b"\x07", b"\x00", 0, False),  # more numbers than data
        (b"", b"", 0, True),
        (b"\x00\x09", b"\x09\x01", 6, True),
        (b"\x00\x09", b"\x09\x01", 7, False),
        (b"\x00\x01", b"\x09\x01", 7, False),
        (b"\x09\x00", b"\x01\x01", 0, True),
        (b"\x01" * 16, b"\x01" * 16, 0, True),
        (b"\x01" * 17, b"\x01" * 17, 0, False),
        (b"\x01", b"\x01", -1, False),
    ],
)
def test_a_tensor_lies_within_its_data(tmp_path: Path, size: bytes, stride: bytes, offset: int, fits: bool) -> None:
    data = torch.arange(6.0)
    content = pickled(tensor(size, stride, number(offset)), _0=data.numpy().tobytes())
    if fits:
        assert torch.equal(loaded(content, tmp_path / "a.pt"), data.as_strided(list(size), list(stride), offset))
    else:
        assert "without the data for it" in refused(content, tmp_path / "a.pt")


# ---------------------------------------------------------------------------------------------------------------------
# What no training run writes

HUGE = b"\x8a\x09" + bytes(8) + b"\x01"  # 2^64
ONE = tensor(b"\x01", b"\x01")
NO_PLAIN_DATA = {
    "nothing to take": b"e",
    "less than it takes": b"K\x01\x86",
    "what was not remembered": b"h\x07",
    "two objects": b"NN",
    "no object": b"",
    "a mark that is left": b"N(",
    "no mark": b"Nt",
    "a class": b"cos\nsystem\n",
    "a storage without a tensor": storage(),
    "something added to a tuple": b")Na",
    "something set in a list": b"]NNs",
    "a key that is a number with a point": b"}G?\xf0\0\0\0\0\0\0Ns",
    "a key without a value": b"}(Nu",
    "text that is called": b"X\2\0\0\0os)R",
    "a call without its arguments in a tuple": b"ccollections\nOrderedDict\n]R",
    "a dictionary made of something": b"ccollections\nOrderedDict\n]\x85R",
    "another call": b"ccollections\nCounter\n)R",
    "a parameter of a number": b"ctorch._utils\n_rebuild_parameter\nN\x85R",
    "a tensor without a storage": tensor(b"\x01", b"\x01", of=text("0")),
    "a tensor of a pair in place of a storage": tensor(b"\x01", b"\x01", of=text("x") + text("a/data/0") + b"\x86"),
    "a tensor of a record that is not there": tensor(b"\x01", b"\x01", of=storage("1")),
    "another kind of storage": tensor(b"\x01", b"\x01", of=storage(kind="module")),
    "numbers that are complex": tensor(b"\x01", b"\x01", of=storage(name="torch\nComplexFloatStorage")),
    "a storage of another module": tensor(b"\x01", b"\x01", of=storage(name="os\nFloatStorage")),
    "more strides than sizes": tensor(b"\x01", b"\x01\x01"),
    "an offset that is a truth": tensor(b"\x01", b"\x01", offset=b"\x88"),
    "a size that is a truth": ONE.replace(b"(K\x01t", b"(\x88t", 1),
    "a size that is a list": ONE.replace(b"(K\x01t", b"](K\x01e", 1),
    "a stride beyond all numbers": ONE.replace(b"(K\x01t(K\x01t", b"(K\x01t(" + HUGE + b"t"),
    "a size beyond all numbers": ONE.replace(b"(K\x01t(K\x01t", b"(K\x00" + HUGE + b"t(K\x01K\x01t"),
    "text that is no UTF-8": b"X\1\0\0\0\xff",
    "a storage of half a number": tensor(b"\x01", b"\x01", of=storage("half")),
    "a persistent name that is text": text("0") + b"Q",
}


@pytest.mark.parametrize("name", NO_PLAIN_DATA)
def test_what_is_no_plain_data_is_refused(tmp_path: Path, name: str) -> None:
    assert loaded(pickled(ONE, _0=bytes(4)), tmp_path / "good.pt").tolist() == [0]
    assert len(refused(pickled(NO_PLAIN_DATA[name], _0=bytes(4), half=bytes(6)), tmp_path / "a.pt")) < 300


def test_an_ordered_dictionary_and_a_parameter_are_what_they_hold(tmp_path: Path) -> None:
    value = OrderedDict(b=torch.nn.Parameter(torch.ones(2)), a=1)
    found = loaded(saved(value), tmp_path / "a.pt")
    assert list(found) == ["b", "a"] and type(found["b"]) is torch.Tensor and found["b"].tolist() == [1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Large ones


def test_a_pickle_has_at_most_16_mib(tmp_path: Path) -> None:
    most = 16 * 1024 * 1024 - len(b"\x80\x02" + text("") + b".")
    assert len(loaded(pickled(text("x" * most)), tmp_path / "a.pt")) == most
    assert "data.pkl takes 16,777,217 bytes" in refused(pickled(text("x" * (most + 1))), tmp_path / "a.pt")


def test_records_that_lie_over_each_other(tmp_path: Path) -> None:
    """A table of contents that names the same bytes again and again stands for far more than the file has."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02N.")
        file.writestr("a/data/0", bytes(1000))
        for number in (1, 2):
            again = copy.copy(file.getinfo("a/data/0"))
            again.filename = f"a/data/{number}"
            file.filelist.append(again)
    assert zipfile.ZipFile(raw).namelist() == ["a/data.pkl", "a/data/0", "a/data/1", "a/data/2"]
    assert refused(raw.getvalue(), tmp_path / "a.pt") == "its records lie over each other"
