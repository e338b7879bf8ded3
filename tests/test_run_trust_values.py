"""What may be taken from a file, value by value: each limit from both sides, and what is told of the rest."""

from __future__ import annotations

import copy
import hashlib
import hmac
import math
import os
import secrets
from pathlib import Path
from typing import Any

import pytest

from engine.config import Setting, known_settings
from engine.errors import RequestError
from engine.run import trust

FILE = Path("a.pt")


def setting(name: str = "model.x", default: Any = None, rule: str = "") -> Setting:
    return Setting(name, default, "any", rule, True, "")


def takes(value: Any, **kind: Any) -> bool:
    return trust.is_data(setting(**kind), value)


# ---------------------------------------------------------------------------------------------------------------------
# Values


def test_a_list_has_at_most_a_thousand_items() -> None:
    assert takes([1] * 999) and not takes([1] * 1000)  # the list itself counts
    assert takes([[1] * 498] * 2) and not takes([[1] * 499] * 2)
    assert takes({str(n): 1 for n in range(499)}) and not takes({str(n): 1 for n in range(500)})


@pytest.mark.parametrize("value", [1_000_000, -1_000_000, 999_999.5])
def test_a_number_is_at_most_a_million(value: float) -> None:
    assert takes(value) and takes([0, value])
    beyond = value + math.copysign(1, value)
    assert not takes(beyond) and not takes([0, beyond]) and not takes({"a": beyond})


@pytest.mark.parametrize(
    ("text", "is_word"),
    [
        ("x" * 64, True),
        ("x" * 65, False),
        ("", False),
        ("two words+more_-1", True),
        ("version.1", True),
        ("version.1" + "0" * 16, True),
        ("version.1" + "0" * 17, False),
        ("1.5.2", True),
        ("a.b", False),
        ("a.", False),
        (".5", False),
        ("a/b", False),
        ("a\n", False),
        ("a:b", False),
    ],
)
def test_a_text_is_a_plain_word(text: str, is_word: bool) -> None:
    assert takes(text) is is_word and takes([text]) is is_word and takes({text: 1}) is is_word
    assert not takes(text, name="dataset.x") and not takes(text, name="x") and takes(7, name="dataset.x")


def test_nothing_but_numbers_texts_and_lists_of_them_is_data() -> None:
    assert takes([None, True, 0, 0.5, (1, "a")])
    assert not takes({1, 2}) and not takes(b"a") and not takes([object()])


@pytest.mark.parametrize("name", trust.LISTS_OF_TEXT)
def test_transforms_and_classes_may_be_any_text_of_200_characters(name: str) -> None:
    assert takes([{"Resize": {"size": [8, 8]}}, "os.system", "é\n" * 100, ""], name=name)
    assert not takes(["x" * 201], name=name) and not takes([10**7], name=name)


@pytest.mark.parametrize(
    "name", ["logger", "logger.mlflow.uri", "device", "num_workers", "num_threads", "dataset.cache"]
)
def test_where_something_goes_is_never_data(name: str) -> None:
    name = "".join(list(name))  # as it is read from a file
    assert not takes(1, name=name) and not takes("b", name=name, rule="one of a, b")
    assert takes("here", name=name, default="here")  # as it is here
    assert takes(1, name=f"{name.partition('.')[0]}_x.y")


def test_what_the_yaml_lists_is_data_and_what_is_to_be_given_is_not() -> None:
    assert takes("a.b", rule="one of a.b, c") and not takes("a.b", rule="")
    assert not takes("???", default="???")


def test_less_pixels_than_here_do_no_harm() -> None:
    assert [takes(n, name="dataset.max_pixels", default=5_000_000) for n in (1, 5_000_000, 5_000_001)] == [1, 1, 0]
    assert takes(3_000_000, name="dataset.max_pixels", default=5_000_000)  # more than other numbers may be


def test_interpolations_are_found_at_any_depth() -> None:
    for value in ("${oc.env:A}", {"a": [{"b": "x${y}"}]}, {"${a}": 1}, [("$", "${")]):
        assert trust.interpolates(value)
    assert not trust.interpolates({"a": ["$x", "{y}", "$ {z}", 7, None], "b": {}})


# ---------------------------------------------------------------------------------------------------------------------
# Signatures


def key_below(folder: Path) -> Path:
    return folder / "image-classifier-training" / "key"


def test_a_signature_is_an_hmac_under_a_key_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "not" / "yet"))
    assert trust.signature("text", make_key=False) == "" and not (tmp_path / "not").exists()
    sign, file = trust.signature("text"), key_below(tmp_path / "not" / "yet")
    key = file.read_bytes()
    assert sign == hmac.new(key, b"text", hashlib.sha256).hexdigest() and len(key) >= 32
    assert trust.signature("text") == sign == trust.signature("text", make_key=False) and file.read_bytes() == key
    assert [path.name for path in file.parent.iterdir()] == ["key"] and file.stat().st_mode & 0o777 == 0o600
    assert trust.signature({"a": 1}) == trust.signature('{"a": 1}')
    file.unlink()  # its folder stays
    assert trust.signature("text") not in ("", sign)
    file.write_bytes(b"")
    assert trust.signature("text") == "" and not trust.is_ours("text", "")


@pytest.mark.parametrize("data", ["", "relative"])
def test_the_key_is_below_home_where_no_other_place_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", data)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    sign = trust.signature("text")
    assert trust.is_ours("text", sign) and key_below(tmp_path / "home" / ".local" / "share").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_without_a_home_nothing_is_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setattr(Path, "home", none)
    assert trust.signature("text") == ""


def test_two_processes_that_make_a_key_at_once_have_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    file, token = key_below(tmp_path), secrets.token_hex

    def other_is_faster(count: int) -> str:
        file.write_text("of the other")
        return token(count)

    monkeypatch.setattr(secrets, "token_hex", other_is_faster)
    assert trust.signature("text") == hmac.new(b"of the other", b"text", hashlib.sha256).hexdigest()
    assert [path.name for path in file.parent.iterdir()] == ["key"]


def test_what_no_configuration_holds_is_not_ours() -> None:
    sign, circle = trust.signature({"a": 1}), {"a": 1}
    circle["b"] = circle  # type: ignore[assignment]
    assert trust.is_ours({"a": 1}, sign) and not trust.is_ours({"a": 1}, "é")
    assert not trust.is_ours({"a": {1}}, sign) and not trust.is_ours(circle, sign)


# ---------------------------------------------------------------------------------------------------------------------
# The directory of a run


def write_run(directory: Path, text: str) -> Path:
    (directory / ".hydra").mkdir(parents=True, exist_ok=True)
    (directory / ".hydra" / "config.yaml").write_text(text)
    return directory


def test_the_configuration_of_a_run_is_ours_while_nobody_changes_it(tmp_path: Path) -> None:
    signed = trust.with_signature("choices: {model: mlp}\nseed: 3\n")
    config = {"choices": {"model": "mlp"}, "seed": 3}
    assert trust.read_run_config(write_run(tmp_path, signed)) == (config, True)
    assert trust.read_run_config(write_run(tmp_path, signed.replace("3", "4", 1))) == ({**config, "seed": 4}, False)
    assert trust.read_run_config(write_run(tmp_path, signed + signed.splitlines()[-1])) == (config, False)
    assert trust.read_run_config(write_run(tmp_path, trust.with_signature(signed))) == (config, True)
    assert trust.read_run_config(write_run(tmp_path, signed.partition("#")[0])) == (config, False)


@pytest.mark.parametrize(
    "text",
    [
        "[]", "choices: mlp", "seed: 1", "choices: {model: 7}", "choices: {7: mlp}", "choices: {logger: [csv, 3]}",
        "choices: {model: {a: b}}", "choices: {}\nname: ${oc.env:A}", "choices: [", "\udcff",
    ],
)  # fmt: skip
def test_what_is_no_configuration_of_a_run_is_one_line(tmp_path: Path, text: str) -> None:
    write_run(tmp_path, "")
    (tmp_path / ".hydra" / "config.yaml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RequestError, match=r"config\.yaml: not a run's configuration \([^\n]*\)$"):
        trust.read_run_config(tmp_path)
    (tmp_path / ".hydra" / "config.yaml").unlink()
    with pytest.raises(RequestError, match="not a run's configuration"):
        trust.read_run_config(tmp_path)


def test_choices_of_a_run_are_one_option_several_or_none() -> None:
    text = "choices: {model: mlp, logger: [csv, null], scheduler: null}\n"
    chosen = {"model": "mlp", "logger": ["csv", None], "scheduler": None}
    assert trust.parse_config(text) == {"choices": chosen}


@pytest.mark.parametrize("inside", ["", ".hydra"])
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_run_in_which_something_leads_elsewhere_is_refused(tmp_path: Path, inside: str, kind: str) -> None:
    write_run(tmp_path, "choices: {}")
    (tmp_path / "more").mkdir()
    trust.check_folder(tmp_path)
    odd = tmp_path / inside / "odd"
    odd.symlink_to("config.yaml") if kind == "link" else os.mkfifo(odd)
    with pytest.raises(ValueError, match="odd is a link or no file"):
        trust.check_folder(tmp_path / inside)
    with pytest.raises(RequestError, match="odd is a link or no file"):
        trust.read_run_config(tmp_path)


def test_hydra_s_folder_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".hydra").write_text("")
    with pytest.raises(ValueError, match="hydra is a link or no file"):
        trust.check_folder(tmp_path)


def test_a_file_that_is_gone_meanwhile_hides_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        name = "gone"

        def stat(self, follow_symlinks: bool) -> Any:
            raise FileNotFoundError

    (tmp_path / "odd").symlink_to("elsewhere")
    entries = [Gone(), *os.scandir(tmp_path)]
    monkeypatch.setattr(os, "scandir", lambda _: entries)
    with pytest.raises(ValueError, match="odd is a link or no file"):
        trust.check_folder(tmp_path)
    del entries[1]
    trust.check_folder(tmp_path)


def test_what_a_resumed_run_takes_over(tmp_path: Path) -> None:
    known = known_settings("train", {"model": "mlp", "optimizer": "sgd", "logger": ["mlflow"]})
    here = {
        "epochs": 20,
        "seed": 0,
        "batch_size": 64,
        "model": {"_target_": "models.mlp.MLP", "hidden": [512], "dropout": 0.0},
        "optimizer": {"lr": 0.1, "momentum": 0.9},
        "device": "auto",
        "num_workers": None,
    }
    own = {
        "epochs": 5,
        "seed": 0,
        "model": {"_target_": "elsewhere.Model", "hidden": [3, 4], "dropout": 0.5},
        "optimizer": {"lr": 0.2, "momentum": 0.8},
        "device": "cpu",
        "num_workers": 3,
    }
    typed = (name for name in ("epochs", "optimizer", "model.h"))  # the whole group; and no setting
    where = tmp_path / "run"
    taken, left = trust.taken_over(here, own, typed, where, known, ours=False)
    assert taken == {"model.hidden": [3, 4], "model.dropout": 0.5}
    assert left == ["device=cpu", "num_workers=3"]
    taken, left = trust.taken_over(here, own, ["model.hidden"], where, known, ours=True)
    assert left == ["model._target_=elsewhere.Model"]  # what builds a group is never taken
    assert list(taken) == [
        "epochs", "model.dropout", "optimizer.lr", "optimizer.momentum", "device", "num_workers"
    ]  # fmt: skip
    assert trust.taken_over(here, copy.deepcopy(here), [], where, known, ours=True) == ({}, [])
    with pytest.raises(RequestError, match=r"run: epochs=0: expected an integer >= 1"):
        trust.taken_over(here, {"epochs": 0}, [], where, known, ours=True)


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint describes


def test_which_options_a_file_may_name() -> None:
    chosen = {"model": "mlp", "logger": ["csv", "mlflow"], "experiment": None, "scheduler": "cosine"}
    assert trust.choices(chosen, FILE) == chosen
    for wrong in ({"model": "_base"}, {"nothing": "mlp"}, {"nothing": None}, {"logger": ["csv", "cvs"]}):
        with pytest.raises(RequestError, match=r"a\.pt: it names .* which configs/ does not have"):
            trust.choices({**chosen, **wrong}, FILE)


def described(group: str = "model", choice: Any = "mlp", **own: Any) -> dict[str, Any]:
    return {group: own, "choices": {group: choice}}


def test_what_builds_a_model_is_an_option_or_a_class_of_models() -> None:
    from torchvision.models import resnet18

    from models.mlp import MLP

    target, known = trust.target_of("model", described(_target_="models.mlp.MLP"), FILE)
    assert target is MLP and known is not None and known["model.dropout"].default == 0.0
    for choice in ("cnn", "mine", None, ["mlp"]):
        assert trust.target_of("model", described("model", choice, _target_="models.mlp.MLP"), FILE) == (MLP, None)
    for name in ("torchvision.models.resnet18", "torchvision.models.resnet.resnet18"):
        assert trust.target_of("model", described(_target_=name), FILE) == (resnet18, None)
    for name in (
        "torchvision.models.quantization.resnet18", "torchvision.models.vgg.resnet18", "torchvision.models.x",
        "models.mlp.pairwise", "torchvision.resnet18", "xtorchvision.models.resnet18", 7, None,
    ):  # fmt: skip
        with pytest.raises(RequestError, match=r"none of this program's; put it into models/ and configs/model/$"):
            trust.target_of("model", described(_target_=name), FILE)
    with pytest.raises(
        RequestError, match=r"a\.pt: its dataset is digits \(models\.mlp\.MLP\).* into configs/dataset/"
    ):
        trust.target_of("dataset", described("dataset", "digits", _target_="models.mlp.MLP"), FILE)


def test_functions_and_other_classes_of_models_are_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import models

    (tmp_path / "models").mkdir()
    source = "from torch import nn\nclass Net(nn.Module): ...\nclass Other: ...\ndef make(): ...\n"
    (tmp_path / "models" / "of_kinds.py").write_text(source)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "models")])
    named = {name: described("model", "mine", _target_=f"models.of_kinds.{name}") for name in ("Net", "Other", "make")}
    with pytest.raises(RequestError, match="none of this program's"):  # its file is not here
        trust.target_of("model", named["Net"], FILE)
    monkeypatch.setattr(trust, "ROOT", tmp_path)
    assert trust.target_of("model", named["Net"], FILE)[0].__name__ == "Net"
    (tmp_path / "beside.py").write_text("raise SystemError")
    named["beside"] = described("model", "mine", _target_="beside.Net")
    for name in ("Other", "make", "beside"):
        with pytest.raises(RequestError, match="none of this program's"):
            trust.target_of("model", named[name], FILE)


def test_settings_of_a_file_go_before_those_here_and_typed_ones_before_all(capsys: pytest.CaptureFixture[str]) -> None:
    from models.mlp import MLP

    config = described(_target_="models.mlp.MLP", hidden=[3])
    target, found = trust.settings_of("model", config, FILE, ours=False)
    assert target is MLP and found == {"_target_": "models.mlp.MLP", "hidden": [3], "dropout": 0.0}
    _, found = trust.settings_of("model", config, FILE, ours=False, typed={"hidden": [4], "dropout": 0.5})
    assert (found["hidden"], found["dropout"]) == ([4], 0.5)
    with pytest.raises(RequestError, match=r"^a\.pt: model\.hidden=\[0\]: expected"):
        trust.settings_of("model", described(_target_="models.mlp.MLP", hidden=[0]), FILE, ours=True)
    with pytest.raises(RequestError, match=r"^model\.hidden=\[0\]: expected"):
        trust.settings_of("model", config, FILE, ours=True, typed={"hidden": [0]})
    with pytest.raises(RequestError, match=r"its model takes no 'width'"):
        trust.settings_of("model", {**config, "model": {**config["model"], "width": 3}}, FILE, ours=True)
    assert capsys.readouterr().out == ""


def test_settings_of_a_model_without_a_yaml_are_plain_data() -> None:
    config = described(
        "model", "mine", _target_="models.mlp.MLP", hidden=[3], deep={"a": {"b": 1}}, kind="relu", no=None
    )
    found = {"hidden": [3], "deep": {"a": {"b": 1}}, "kind": "relu", "no": None}
    assert trust.settings_of("model", config, FILE, ours=False)[1] == found
    config["model"] |= {f"path{n}": f"/tmp/{n}" for n in range(7)}
    assert trust.settings_of("model", config, FILE, ours=True)[1]["path6"] == "/tmp/6"
    with pytest.raises(RequestError) as error:
        trust.settings_of("model", config, FILE, ours=False)
    assert "model.path4=/tmp/4: paths, addresses and names are not taken" in str(error.value)
    assert "path5" not in str(error.value) and "model.path0=/tmp/0, model.path1" in str(error.value)
    typed = {f"path{n}": f"/home/{n}" for n in range(7)}
    assert trust.settings_of("model", config, FILE, ours=False, typed=typed)[1] == found | typed


def test_a_data_set_s_paths_are_those_here(capsys: pytest.CaptureFixture[str]) -> None:
    own = {"_target_": "datasets.image_folder", "root": "secrets", "cache_dir": "elsewhere", "val_fraction": 0.25}
    config = described("dataset", "image_folder", **own)
    with pytest.raises(RequestError, match=r"^a\.pt: dataset\.root=secrets: paths"):
        trust.settings_of("dataset", config, FILE, ours=False)
    capsys.readouterr()
    _, found = trust.settings_of("dataset", config, Path("a\n.pt"), ours=False, typed={"root": "mine"})
    assert (found["root"], found["cache_dir"], found["val_fraction"]) == ("mine", "data/cache", 0.25)
    told = capsys.readouterr().out
    assert told == "dataset.cache_dir is data/cache as here, not elsewhere as in a\\n.pt\n"
    _, found = trust.settings_of("dataset", config, FILE, ours=True)
    assert (found["root"], found["cache_dir"]) == ("secrets", "elsewhere") and capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------------
# How it is evaluated


def evaluated(
    shape: list[int],
    transforms: list[Any],
    batch_size: Any = 64,
    typed: int | None = None,
    ours: bool = False,
    **more: Any,
) -> dict[str, Any]:
    config = {"batch_size": batch_size, "seed": 0, "dataset": {"eval_transforms": transforms}, **more}
    return trust.evaluation_of(config, shape, FILE, typed, ours=ours)


def test_how_a_checkpoint_is_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    resized = [{"Resize": {"size": [8, 8]}}]
    assert evaluated([1, 8, 8], resized, seed=2**32 - 1) == {
        "batch_size": 64,
        "seed": 2**32 - 1,
        "eval_transforms": resized,
    }
    assert evaluated([1, 8, 8], [], 64, typed=5)["batch_size"] == 5
    assert evaluated([1, 8, 8], [], 2_000_000, ours=True)["batch_size"] == 2_000_000
    assert capsys.readouterr() == ("", "")
    wrong = [{"batch_size": 0}, {"batch_size": None}, {"batch_size": 2_000_000}, {"seed": -1}, {"transforms": None}]
    wrong += [{"transforms": ["x" * 300]}]
    for settings in wrong:
        with pytest.raises(RequestError, match=r"^a\.pt: its .* is .*; expected "):
            evaluated([1, 8, 8], **{"transforms": [], **settings})


@pytest.mark.parametrize(
    ("shape", "transforms", "batch_size", "fitting"),
    [
        ([1, 4096, 1024], [], 4, 4),  # 2^24 numbers a batch
        ([1, 4096, 1024], [], 5, 4),
        ([1, 4096, 1025], [], 4, 3),
        ([1, 1024, 1024], [{"Resize": 4096}], 2, 1),
        ([1, 8, 8], [{"Resize": {"size": [2048, 16]}}, {"Resize": 8}], 64, 4),  # whatever it is at the end
        ([3, 5000, 5000], [], 64, 1),
        ([2, 2048, 2048], [{"Pad": 1}], 2, 2),
        ([1, 1, 1], [], 1 << 19, 1 << 19),
    ],
)
def test_a_stranger_s_batch_has_at_most_16_million_numbers(
    capsys: pytest.CaptureFixture[str], shape: list[int], transforms: list[Any], batch_size: int, fitting: int
) -> None:
    assert evaluated(shape, transforms, batch_size)["batch_size"] == fitting
    said = f"a.pt: batches of {fitting} instead of {batch_size}, as it was made elsewhere; batch_size= takes others\n"
    assert capsys.readouterr().err == (said if fitting != batch_size else "")
    assert evaluated(shape, transforms, batch_size, typed=7)["batch_size"] == 7 and capsys.readouterr().err == ""
    assert evaluated(shape, transforms, batch_size, ours=True)["batch_size"] == batch_size


@pytest.mark.parametrize(
    ("shape", "transforms", "beyond"),
    [  # 2^30 steps at most, and one setting that is one more
        ([1, 1, 1], [{"Resize": 32_768}], [{"Resize": 32_769}]),
        ([2, 1, 1], [{"Resize": [16_384, 7]}, "x"], [{"Resize": [16_385, 7]}, "x"]),
        ([1, 1, 1], [{"Blur": {"kernel_size": 32, "size": 1024}}], [{"Blur": {"kernel_size": 33, "size": 1024}}]),
        ([1, 1, 1], [{"Blur": {"kernel_size": [5, 32]}, "a": 1024}], [{"Blur": {"kernel_size": [5, 33]}, "a": 1024}]),
        ([1, 32_768, 16_384], ["x", "y"], ["x", "y", "z"]),
    ],
)
def test_a_stranger_s_transforms_take_a_bounded_time(
    shape: list[int], transforms: list[Any], beyond: list[Any]
) -> None:
    assert evaluated(shape, transforms)["eval_transforms"] == transforms
    with pytest.raises(RequestError, match=r"^a\.pt: its dataset.eval_transforms are long at work on images"):
        evaluated(shape, beyond)
    assert evaluated(shape, beyond, ours=True)["eval_transforms"] == beyond


# ---------------------------------------------------------------------------------------------------------------------
# Keywords that a command line added


def test_which_added_keywords_a_resumed_run_takes_over(tmp_path: Path) -> None:
    """Those of a run that was typed here, unless they are typed anew or what they are for is built otherwise now."""
    known = known_settings("train", {"model": "mlp", "optimizer": "adam"})
    here = {"optimizer": {"_target_": "torch.optim.Adam", "lr": 0.1}, "model": {"_target_": "models.mlp.MLP"}}
    own = copy.deepcopy(here)
    own["optimizer"] |= {"amsgrad": True, "fused": False}
    own["more"] = {"amsgrad": True}  # no group that is built
    where = tmp_path / "run"
    assert trust.taken_over(here, own, [], where, known, ours=True) == (
        {"optimizer.amsgrad": True, "optimizer.fused": False},
        [],
    )
    added = copy.deepcopy(here)
    added["optimizer"]["amsgrad"] = False
    taken, left = trust.taken_over(added, own, ["optimizer.amsgrad"], where, known, ours=True)
    assert (taken, left) == ({"optimizer.fused": False}, [])
    assert trust.taken_over(here, own, ["optimizer"], where, known, ours=True) == ({}, [])
    assert trust.taken_over(here, own, [], where, known, ours=False) == (
        {},
        ["+optimizer.amsgrad=true", "+optimizer.fused=false"],
    )
    other = copy.deepcopy(own)
    other["optimizer"]["_target_"] = "torch.optim.NAdam"
    taken, left = trust.taken_over(here, other, [], where, known, ours=True)
    assert taken == {} and "+optimizer.amsgrad=true" in left and "+optimizer.fused=false" in left
    own["optimizer"]["fused"] = float("nan")
    with pytest.raises(RequestError, match=r"run: "):
        trust.taken_over(here, own, [], where, known, ours=True)


def test_added_keywords_reach_no_function_that_only_a_yaml_vouches_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(input_shape: Any, num_classes: int, width: int = 1, **others: Any) -> None: ...

    known = {"model.width": Setting("model.width", 1, "int", "", False, "")}
    monkeypatch.setattr(trust, "target_of", lambda *_: (make, known))
    config = described(_target_="models.own.make", width=3, extra=5)
    assert trust.settings_of("model", config, FILE, ours=True)[1] == {"width": 3, "extra": 5}
    with pytest.raises(RequestError, match=r"^a\.pt: model\.extra=5: "):
        trust.settings_of("model", config, FILE, ours=False)


def test_what_could_be_built_without_yaml() -> None:
    for name, is_one in (
        ("models.mlp.MLP", True),
        ("torchvision.models.resnet18", True),
        ("torchvision.models.get_model", False),
        ("os.system", False),
        (None, False),
        (7, False),
        (["models.mlp.MLP"], False),
    ):
        assert trust.is_model_here(name, FILE) is is_one, name
