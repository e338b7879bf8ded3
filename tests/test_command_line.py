"""The command line: help, completion and every wrong request, answered in one line, without torch, leaving nothing."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT, Call

from engine import config, terminal
from engine.command import cli
from engine.command.help import setting_rows
from engine.command.typed import as_meant
from engine.config import Setting, group_options

MODELS = "cnn, fastnet, mlp, resnet18, resnet34, resnet50, timm, torchvision, vit"
WRONG_REQUESTS = [  # what is typed, what the answer has to hold
    # Unknown options and settings, with the nearest valid ones.
    ("model=mpl", f"model=mpl: no such model (did you mean mlp?); there is {MODELS}"),
    ("dataset=fashion-mnist", "did you mean fashion_mnist"),
    ("experiment=tutoriel", "did you mean tutorial?"),
    ("debug=fst", "did you mean fast?"),
    ("optimizer.lrr=1", "'optimizer.lrr' (did you mean optimizer.lr?)"),
    ("epoch=3", "did you mean epochs?"),
    ("lr=0.1", "did you mean optimizer.lr?"),
    ("batchsize=3", "did you mean batch_size?"),
    ("+typo=1", "there is no setting 'typo'"),
    ("optimizer.foo=1", "there is no setting 'optimizer.foo'"),
    ("+optimizer._foo=1", "there is no setting 'optimizer._foo'"),
    ("+optimizer.foo.bar=1", "there is no setting 'optimizer.foo.bar'"),
    ("++x=1", "there is no setting 'x'"),
    ("+nothing={}", "there is no setting 'nothing'"),
    ("+optimizer={lrr: 1}", "'optimizer.lrr' (did you mean optimizer.lr?)"),
    ("hydra.foo=1", "there is no setting 'hydra.foo'"),
    ("dataset.root=x", "there is no setting 'dataset.root'"),  # the bundled digits have none
    # Needed settings and groups taken out.
    ("~optimizer.lr", "'optimizer.lr' was taken out"),
    ("~epochs", "'epochs' was taken out"),
    ("~optimizer", "optimizer has to be one of adam, adamw, muon, nadam, rmsprop, sgd"),
    ("model=null", f"model has to be one of {MODELS}"),
    ("optimizer=42", "optimizer has to be one of"),
    ("model=", "model"),
    # Values of the wrong type or out of range: option, value and what is expected.
    ("optimizer.lr=abc", "optimizer.lr=abc: expected a number > 0"),
    ("optimizer.lr=0", "optimizer.lr=0: expected a number > 0"),
    ("optimizer.lr=nan", "optimizer.lr=nan: expected a number > 0"),
    ("optimizer.lr=inf", "optimizer.lr=inf: expected a number > 0"),
    ("optimizer.lr=null", "optimizer.lr=null: expected a number > 0"),
    ("optimizer.lr=[0.1]", "optimizer.lr=[0.1]: expected a number > 0"),
    ("optimizer.nesterov=1", "optimizer.nesterov=1: expected true or false"),
    ("epochs=-1", "epochs=-1: expected an integer >= 1"),
    ("epochs=1.5", "epochs=1.5: expected an integer >= 1"),
    ("epochs=true", "epochs=true: expected an integer >= 1"),
    ("epochs=", "epochs=: expected an integer >= 1"),
    ("epochs={a: 1}", "expected an integer >= 1"),
    ("epochs=${seed}x", "expected an integer >= 1"),
    ("epochs=${nothing}", "nothing"),
    ("batch_size=0", "batch_size=0: expected an integer >= 1"),
    ("seed=-1", "seed=-1: expected an integer in [0, 4294967296)"),
    ("seed=99999999999999999999", "expected an integer in [0, 4294967296)"),
    ("num_workers=-1", "num_workers=-1: expected an integer in [0, 1024] or null"),
    ("dataset.val_fraction=1.5", "dataset.val_fraction=1.5: expected a number in [0, 1)"),
    ("dataset.val_fraction=1", "dataset.val_fraction=1: expected a number in [0, 1)"),
    ("dataset.limit=0", "dataset.limit=0: expected an integer >= 1 or null"),
    ("dataset.train_transforms=Normalize", "dataset.train_transforms=Normalize: expected a list"),
    ("model.dropout=1", "model.dropout=1: expected a number in [0, 1)"),
    ("model.hidden=[a]", "model.hidden=[a]: expected a list of integers >= 1"),
    ("model.hidden=[0]", "model.hidden=[0]: expected a list of integers >= 1"),
    ("model.hidden=[1.5]", "model.hidden=[1.5]: expected a list of integers >= 1"),
    ("model.hidden=512", "model.hidden=512: expected a list of integers >= 1"),
    ("optimizer=adam optimizer.betas=[0.9]", "optimizer.betas=[0.9]: expected a list of 2 numbers in [0, 1)"),
    ("optimizer=adam optimizer.betas=[0.9,0.9,0.9]", "expected a list of 2 numbers in [0, 1)"),
    ("optimizer=adam optimizer.betas=[0.9,1]", "expected a list of 2 numbers in [0, 1)"),
    # Command lines that are none.
    ("model=[", "'model=[' is not understood"),
    ("foo", "'foo' is not understood"),
    ("=3", "not understood"),
    ("+model=mlp", "model appears more than once"),
    ("--foo", "unrecognized arguments: --foo"),
    ("--config-dir", "--config-dir"),
    ("--config-dir=/not/there", "'/not/there' not found"),
    ("--config-name=foo", "'foo'"),
    ("--help model=mpl", "did you mean mlp?"),
    ("--cfg job model=mpl", "did you mean mlp?"),
]


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when a request gets as far as importing train.py or evaluate.py, and with it torch."""

    real = importlib.import_module

    def refuse(name: str, *arguments: str) -> ModuleType:
        if name in ("train", "evaluate", "predict", "export"):
            pytest.fail(f"{name} is imported before the answer is given")
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", refuse)


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(("typed", "said"), WRONG_REQUESTS)
def test_a_wrong_request_is_answered_in_one_line(call: Call, tmp_path: Path, typed: str, said: str) -> None:
    arguments = re.split(r" (?![\d'])", typed)  # `{a: 1}` is one argument
    answer = call("train", *arguments)
    assert said in answer.error
    assert answer.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("batchsize=3", "did you mean batch_size?"),
        ("split=foo", "split=foo: expected text one of train, val, test"),
        ("batch_size=0", "expected an integer >= 1 or null"),
        ("model=mpl", "did you mean mlp?"),
        ("dataset=digitz", "did you mean digits?"),
        ("+foo=1", "there is no setting 'foo'"),
        ("dataset=digits dataset.limt=1", "did you mean dataset.limit?"),
    ],
)
def test_evaluate_answers_wrong_requests_likewise(call: Call, tmp_path: Path, typed: str, said: str) -> None:
    assert said in call("evaluate", *typed.split()).error
    assert list(tmp_path.iterdir()) == []


AS_TYPED = [  # what a new user types, what the answer has to hold
    ("train epochs = 3", "no spaces around the =; type epochs=3"),
    ("train epochs =3", "type epochs=3"),
    ("train optimizer.lr= 0.1", "type optimizer.lr=0.1"),
    ("train --lr 0.1", "typed without dashes: optimizer.lr=0.1"),
    ("train --epochs=3", "typed without dashes: epochs=3"),
    ("train --batch-size 32", "typed without dashes: batch_size=32"),
    ("train --epoch 3", "did you mean epochs?"),
    ("train seed=0,1", "seed=0,1: several values, one run each, need -m"),
    ("train model.hidden=8,8", "a list is typed model.hidden=[8,8]"),
    ("train 'seed=range(0,3)'", "need -m"),
    (
        "train dataset.train_transforms=[{RandomRotation: {degrees: 30}}]",
        "put it in quotes: 'dataset.train_transforms=[{RandomRotation: {degrees: 30}}]'",
    ),
    ("train model.hidden=64", "write model.hidden=[64]"),
    ("train model.hidden=[64", "its brackets do not close"),
    ("train optimizer=SGD", "did you mean sgd?"),
    ("train dataset=FashionMNIST", "did you mean fashion_mnist?"),
    ("train loss=mse", "there is no setting 'loss' (did you mean criterion?)"),
    ("train gpus=1", "did you mean device?"),
    ("train optimizer.amsgrad=true", "optimizer has optimizer.lr, optimizer.momentum"),
    ("train optimizer.amsgrad=true", "+optimizer.amsgrad=... adds a keyword of its class"),
    ("train optimizer.lrr=1", "(did you mean optimizer.lr?); +optimizer.lrr=... adds a keyword of its class"),
    ("train mlp", "did you mean model=mlp?"),
    ("train epochs", "it needs a value: epochs=VALUE"),
    ("train last.pt", "did you mean resume=last.pt?"),
    ("train hydra.run.dir=here", "a run is named by name=NAME"),
    ("train hydra.job.name=foo", "a run is named by name=NAME"),
    ("train hydra.output_subdir=x", "a run is named by name=NAME"),
    ("train --config-name=evaluate", "--config-dir DIR"),
    ("train --experimental-rerun=x.pickle", "a run goes on with resume=DIR"),
    ("evaluate nothing.pt", "nothing.pt: no such file"),
    ("evaluate conftest.py checkpoint=x.pt", "checkpoint is given twice"),
    ("predict nothing.png", "nothing.png: no such file"),
    ("predict topk=3", "did you mean top_k?"),
    ("export", "output has to be given"),
    ("export nothing.pt output=model.onnx", "nothing.pt: no such file"),
    ("export output=model.onnx chekpoint=best.pt", "did you mean checkpoint?"),
    # Numbers that C has no room for, names that no file system has.
    ("train epochs=1000000000000000000000000000000", "of at most 9,223,372,036,854,775,807"),
    (f"train optimizer.lr=1{400 * '0'}", "expected a number > 0, of at most"),
    ("train model.hidden=[99999999999999999999]", "expected a list of integers"),
    ("train optimizer.lr=1e300", "optimizer.lr=1e+300: expected a number > 0, of at most 3.4e+38"),
    ("train 'dataset.train_transforms=[{Normalize: {mean: [1e300]}}]'", "holds a number beyond 3.4e+38"),
    (f"train name={201 * 'x'}", "expected at most 200 characters, there are 201"),
    ("train name=latest", "name=latest: expected letters"),
    ("train num_workers=9999999", "expected an integer in [0, 1024] or null"),
    ("train dataset.limit=99999999999999999999999", "expected an integer >= 1 or null, of at most"),
    (f"train device={300 * 'x'}", "too long"),
    (f"train model={300 * 'x'}", "no such model"),
    (f"train resume={300 * 'x'}", "no run there"),
    (f"evaluate checkpoint={300 * 'x'}", "too long"),
    (f"predict images={50 * 'long/name/'}{300 * 'x'}", "too long"),
    ("train device='\"\udcff\"'", "not in UTF-8"),
]


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(("typed", "said"), AS_TYPED)
def test_what_a_new_user_types_is_answered_with_how_to_type_it(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, said: str
) -> None:
    (tmp_path / "conftest.py").touch()
    entry, *arguments = shlex.split(typed)
    answer = call(entry, *arguments).error
    assert said in answer and len(answer) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["conftest.py"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configuration with which an entry point would be started."""
    configuration: dict[str, Any] = {}
    monkeypatch.setattr(cli, "_main", configuration.update)
    return configuration


@pytest.mark.parametrize(
    ("typed", "setting", "value"),
    [
        ("evaluate best.pt split=val", "checkpoint", "best.pt"),
        ("evaluate run", "checkpoint", "run/best.pt"),
        ("evaluate best.pt run", "checkpoint", ["best.pt", "run/best.pt"]),
        ("evaluate 'checkpoint=[best.pt,run/best.pt]'", "checkpoint", ["best.pt", "run/best.pt"]),
        ("evaluate checkpoint=123", "checkpoint", "123"),
        ("predict photo.png", "images", "photo.png"),
        ('predict photo.png "it\'s (1),2.png" top_k=2', "images", ["photo.png", "it's (1),2.png"]),
        ("predict top_k=2 run", "images", "run"),
        ("predict 'run/*.png'", "images", "run/*.png"),
        ("predict photo.png best.pt", "checkpoint", "best.pt"),
        ("predict photo.png run/w.safetensors", "checkpoint", "run/w.safetensors"),
        ("export run output=model.onnx", "checkpoint", "run/best.pt"),
        ("predict images=a\\\\ best.pt", "images", "a\\"),
        ("train epochs=3 -m seed=1", "epochs", 3),
    ],
)
def test_what_is_meant_is_taken(
    call: Call, tmp_path: Path, asked: dict[str, Any], typed: str, setting: str, value: Any
) -> None:
    (tmp_path / "run").mkdir()
    for name in ("best.pt", "photo.png", "it's (1),2.png", "run/best.pt", "run/w.safetensors"):
        (tmp_path / name).touch()
    entry, *arguments = shlex.split(typed)
    answer = call(entry, *arguments)
    assert answer.code == 0, answer.err
    assert asked[setting] == value


def test_a_setting_given_twice_is_told(call: Call, asked: dict[str, Any]) -> None:
    answer = call("train", "epochs=3", "epochs=4")
    assert asked["epochs"] == 4 and answer.err == "note: epochs is given twice, the last one counts\n"


def test_command_lines_made_of_pieces_get_an_answer(call: Call, asked: dict[str, Any], tmp_path: Path) -> None:
    random = Random(1)
    names = [
        "epochs",
        "optimizer.lr",
        "model",
        "name",
        "+x",
        "~seed",
        "hydra.run.dir",
        "hydra/launcher",
        "resume",
        "",
        "-",
    ]
    values = [
        "3",
        "",
        "[",
        "]'",
        "null",
        "{a:",
        "${epochs}",
        "${oc.env:NOT}",
        "1e999",
        "\x1b[2J",
        "\udcff",
        "9" * 5000,
        "a,b",
    ]
    for _ in range(60):
        pieces = [
            random.choice(names) + random.choice(["=", "=", "==", " ", "@"]) + random.choice(values) for _ in range(2)
        ]
        answer = call(random.choice(["train", "evaluate", "predict"]), *pieces)
        assert answer.code in (0, 2), pieces
        assert "Traceback" not in answer.err and len(answer.err) < 700, pieces
        assert answer.code == 0 or len(answer.err.splitlines()) == 1, (pieces, answer.err)
        assert "\x1b" not in answer.err


# ---------------------------------------------------------------------------------------------------------------------
# What is printed, and where to


def can_steer(text: str) -> bool:
    return any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in text)


@pytest.mark.parametrize(
    "typed",
    [
        ["model=\x1b[2J"],
        ["ab\x1b]0;title\x07=1"],
        ["--\x1bfoo"],
        ["--cfg", "job", "name='\x1b[31mred'"],
        ["name=\r\x1b[A"],
    ],
)
def test_nothing_that_was_typed_steers_the_terminal(call: Call, typed: list[str]) -> None:
    answer = call("train", *typed)
    assert answer.out + answer.err and not can_steer(answer.out + answer.err)


def test_a_stream_writes_control_characters_out_but_for_a_bars_own() -> None:
    raw = io.BytesIO()
    below = io.TextIOWrapper(raw, "utf-8", write_through=True)
    out, error = terminal.SafeStream(below, is_error=False), terminal.SafeStream(below, is_error=True)
    typed = [(out, "a\tb\n"), (out, "\rc\x1b[A"), (error, "\rbar \x1b[31m\r"), (error, "\x1b[A"), (error, "\x1b[Ax")]
    for stream, text in typed:
        stream.write(text)
        stream.flush()
    assert raw.getvalue() == b"a\tb\n" + rb"\rc\x1b[A" + b"\r" + rb"bar \x1b[31m\r" + b"\x1b[A" + rb"\x1b[Ax"
    for stream in (out, error):
        stream.detach()


def test_the_streams_are_put_back(call: Call) -> None:
    before = sys.stdout, sys.stderr
    assert call("train", "--help").code == 0 and (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">/dev/full", 1, "error: standard output cannot be written: No space left on device\n"),
        ("| exec true", 141, ""),
        (">&-", 0, ""),
        ("2>&- >&-", 0, ""),
    ],
)
def test_an_output_that_is_full_or_closed(tmp_path: Path, redirection: str, code: int, said: str) -> None:
    command = f"set -o pipefail; '{sys.executable}' '{ROOT / 'train.py'}' --cfg job epochs=3 {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (code, said, "")


# ---------------------------------------------------------------------------------------------------------------------
# A user's own YAML

OWN_YAML = [  # group/option, the file, what the answer has to hold
    ("model/mine", "_target_: models.mlp.MLP\nhidden: [\n", "mine.yaml"),
    ("model/mine", "hidden: [1]\n  x: 3\n", "mine.yaml"),
    ("model/mine", "_target_: models.mlp.MLP\nhidden: [1]\nhidden: [2]\n", "found duplicate key hidden"),
    ("model/mine", "hidden: [512]\n", "mine.yaml: names nothing to build"),
    ("model/mine", "", "mine.yaml: names nothing to build"),
    ("model/mine", "- models.mlp.MLP\n", "mine.yaml: names nothing to build"),
    ("model/mine", "defaults: [nothing]\n", "nothing"),
    ("model/mine", "defaults: [mlp]\nhidden: [0]\n", "model.hidden=[0]: expected a list of integers >= 1"),
    (
        "model/mine",
        "_target_: models.mlp.MLP\nwidth: 0  # int >= 1: pixels\n",
        "model.width=0: expected an integer >= 1",
    ),
    ("optimizer/mine", "defaults: [sgd]\nlrr: 1\nlr: -1\n", "optimizer.lr=-1: expected a number > 0"),
    ("experiment/mine", "# @package _global_\nepoch: 1\n", "'epoch' (did you mean epochs?)"),
    ("experiment/mine", "# @package _global_\noptimizer: {lrr: 1}\n", "did you mean optimizer.lr?"),
    ("experiment/mine", "# @package _global_\ndefaults: [{override /model: cnnn}]\n", "did you mean cnn?"),
    ("experiment/mine", "epochs: 1\n", "'experiment.epochs'"),  # the @package line is missing
]


def own_yaml(folder: Path, name: str, text: str) -> str:
    file = folder / f"{name}.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return name.replace("/", "=")


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(("name", "text", "said"), OWN_YAML)
def test_a_users_own_yaml_gets_the_same_treatment(call: Call, tmp_path: Path, name: str, text: str, said: str) -> None:
    choice = own_yaml(tmp_path / "own", name, text)
    answer = call("train", "--config-dir=own", choice)
    assert said in answer.error
    assert [p.name for p in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("_target_: nowhere.Net\n", "model._target_=nowhere.Net: no such module"),
        ("_target_: models.mlp.MPL\n", "models.mlp has no 'MPL' (did you mean MLP?)"),
        ("_target_: models.mlp\n", "expected a class or function"),
        ("_target_: models.mlp.MLP\nhiden: [3]\n", "models.mlp.MLP does not fit its YAML"),
        ("_target_: torch.nn.Linear\n", "torch.nn.Linear does not fit its YAML"),
        ("_target_: models.mlp.MLP\nhidden: [-3]\n", "negative dimension -3"),
        ("_target_: models.mlp.MLP\nhidden: [3]\ndropout: 2\n", "dropout probability has to be between 0 and 1"),
        ("_target_: faulty.syntax.Net\n", "faulty.syntax cannot be imported"),
        ("_target_: faulty.raising.Net\n", "it depends (raising.py:3)"),
        ("_target_: faulty.needy.Net\n", "needs 'not_installed_at_all'"),
    ],
)
def test_a_users_own_model_gets_the_same_treatment(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    package = tmp_path / "own" / "faulty"
    choice = own_yaml(tmp_path / "own", "model/mine", text)
    package.mkdir()
    (package / "syntax.py").write_text("class Net(:\n")
    (package / "needy.py").write_text("import not_installed_at_all\n")
    (package / "raising.py").write_text(
        "class Net:\n    def __init__(self, **settings):\n        raise KeyError('it depends')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    answer = call("train", "--config-dir=own", choice)
    for name in [n for n in sys.modules if n.partition(".")[0] == "faulty"]:
        del sys.modules[name]
    assert said in answer.error.replace("'it depends'", "it depends")
    assert [p.name for p in tmp_path.iterdir()] == ["own"]


def test_a_users_own_yaml_builds_on_ours(call: Call, tmp_path: Path) -> None:
    choice = own_yaml(tmp_path / "own", "model/small", "defaults: [mlp]\nhidden: [7]\n")
    answer = call("train", "--config-dir=own", choice, "debug=fast", "name=123")  # a name that looks like a number
    assert answer.code == 0, answer.err
    assert f"small, {64 * 7 + 7 + 7 * 10 + 10:,} parameters" in answer.out
    assert (tmp_path / "checkpoints" / "123" / "best.pt").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Help, completion, Hydra's own answers


def test_help_shows_groups_settings_and_five_examples(call: Call) -> None:
    text = call("train", "--help").out
    for group, options in group_options().items():
        if group in ("model", "dataset", "optimizer", "scheduler", "criterion", "experiment", "debug"):
            line = re.search(rf"^  {group} +(.*)$", text, re.MULTILINE)
            assert line and {o.strip("[]") for o in line[1].split(", ")} == set(options)
    assert "[mlp]" in text and "[digits]" in text  # the defaults
    for name, default, meaning in setting_rows("train"):
        assert re.search(rf"^  {re.escape(name)}={re.escape(default)} +{re.escape(meaning)}$", text, re.MULTILINE), name
    examples = text.partition("Examples:\n")[2].split("\n\n")[0].splitlines()
    assert len(examples) == 5 and all(line.startswith("  python train.py") for line in examples)


def test_every_setting_has_a_comment_with_its_meaning() -> None:
    for entry, group_file in [(e, None) for e in ("train", "evaluate")] + [
        (f"{group}/{option}", group) for group, options in group_options().items() for option in options
    ]:
        if group_file in ("experiment", "debug"):
            continue  # they only set what is described elsewhere
        for setting in config.read_settings(ROOT / "configs" / f"{entry}.yaml", group=group_file or "").values():
            assert setting.meaning or setting.name == "_target_", f"{entry}: {setting.name}"
            assert setting.kind != "any" or setting.name == "_target_", f"{entry}: {setting.name}"
            assert setting.name == "_target_" or setting.accepts(setting.default), f"{entry}: {setting.name}"


def test_help_of_chosen_options_and_of_a_users_own(call: Call, tmp_path: Path) -> None:
    own_yaml(tmp_path / "own", "model/mine", "_target_: a.B\ndepth: 3  # int >= 1: layers\n")
    text = call("train", "--help", "optimizer=adam", "model=mine", "--config-dir", "own").out
    assert "optimizer.betas=[0.9, 0.999]" in text and "optimizer.momentum" not in text
    assert re.search(r"^  model.depth=3 +layers \(an integer >= 1\)$", text, re.MULTILINE)


def test_a_setting_without_a_comment_is_checked_by_its_default() -> None:
    (lr,) = (s for s in config.read_settings(ROOT / "configs/optimizer/sgd.yaml").values() if s.name == "lr")
    assert lr == Setting("lr", 0.05, "float", "> 0", False, "learning rate")
    bare = config._setting("depth", 3, "", None)
    assert bare.accepts(4) and not bare.accepts("four") and not bare.accepts(None)


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cfg", "job"], "\nbatch_size: 64\n"),
        (["--cfg", "job", "optimizer=adam", "-p", "optimizer"], "_target_: torch.optim.Adam\n"),
        (["--hydra-help"], "Hydra"),
    ],
)
def test_hydras_own_answers(call: Call, tmp_path: Path, arguments: list[str], said: str) -> None:
    answer = call("train", *arguments)
    assert answer.code == 0 and said in answer.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("python train.py mod", {"model.", "model="}),
        ("python train.py model=", {"model=cnn", "model=mlp", "model=resnet18"}),
        ("python train.py epo", {"epochs="}),
        ("python train.py model=cnn experiment=", {"experiment=tutorial"}),
    ],
)
def test_tab_completion(call: Call, monkeypatch: pytest.MonkeyPatch, line: str, offered: set[str]) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert offered <= set(call("train", "-sc", "query=bash").out.split())


def test_real_processes_answer_before_torch_is_imported(process: Call, tmp_path: Path) -> None:
    """A torch that stops whoever imports it stands first in the path."""
    for package in ("torch", "torchvision", "matplotlib"):
        (tmp_path / "trap" / package).mkdir(parents=True)
        (tmp_path / "trap" / package / "__init__.py").write_text("raise SystemExit('imported too early')\n")
    path = {"PYTHONPATH": str(tmp_path / "trap")}
    line = "python train.py model=m"
    assert "imported too early" in process("train", **path).err  # the trap works
    assert process("train", "--help", **path).out.startswith("usage: python train.py")
    assert process("evaluate", "--help", **path).out.startswith("usage: python evaluate.py")
    assert process("train", "model=mpl", **path).error.startswith("model=mpl: no such model")
    assert process("train", "epochs=-1", **path).error == "epochs=-1: expected an integer >= 1"
    assert "epochs: 20" in process("train", "--info", "config", **path).out
    completion = process("train", "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)), **path)
    assert completion.out.split() == ["model=mlp"]
    assert [p.name for p in tmp_path.iterdir()] == ["trap"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("[RandomCrop: {size: 8}]", "[{RandomCrop: {size: 8}}]"),  # as a YAML file has it
        ("[Resize:{size:8}]", "[{Resize: {size: 8}}]"),
        (
            "[RandomHorizontalFlip, Normalize: {mean: [0.5], std: [0.25]}]",
            "[RandomHorizontalFlip, {Normalize: {mean: [0.5], std: [0.25]}}]",
        ),
        ("[{RandomCrop: {size: 8}}]", "[{RandomCrop: {size: 8}}]"),
        ("[]", "[]"),
        ("[RandomHorizontalFlip]", "[RandomHorizontalFlip]"),
    ],
)
def test_a_list_of_transforms_is_typed_as_a_yaml_file_has_it(typed: str, meant: str) -> None:
    name = "dataset.train_transforms="
    assert as_meant("train", [name + typed], list, {}) == [name + meant]


def test_an_option_that_is_not_there_says_where_others_go(call: Call) -> None:
    assert call("train", "criterion=hinge").error.endswith("another one is a YAML file in configs/criterion/")
    assert call("train", "dataset=../flat").error.startswith("dataset=../flat: no such dataset")
    assert call("train", "model=NaN").error.startswith("model has to be one of")
    assert call("evaluate", "--help", "dataset").out.startswith("usage: python evaluate.py")
