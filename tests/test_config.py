"""engine/config.py: help, completion and every wrong request, answered in one line, without torch, leaving nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, Call

from engine import config
from engine.cli import setting_rows
from engine.config import Setting, group_options

WRONG_REQUESTS = [  # what is typed, what the answer has to hold
    # Unknown options and settings, with the nearest valid ones.
    ("model=mpl", "model=mpl: no such model (did you mean mlp?); there is cnn, mlp, resnet18"),
    ("dataset=fashion-mnist", "did you mean fashion_mnist"),
    ("experiment=tutoriel", "did you mean tutorial?"),
    ("debug=fst", "did you mean fast?"),
    ("optimizer.lrr=1", "'optimizer.lrr' (did you mean optimizer.lr?)"),
    ("epoch=3", "did you mean epochs?"),
    ("lr=0.1", "did you mean optimizer.lr?"),
    ("batchsize=3", "did you mean batch_size?"),
    ("+typo=1", "there is no setting 'typo'"),
    ("+optimizer.foo=1", "there is no setting 'optimizer.foo'"),
    ("++x=1", "there is no setting 'x'"),
    ("+nothing={}", "there is no setting 'nothing'"),
    ("+optimizer={lrr: 1}", "'optimizer.lrr' (did you mean optimizer.lr?)"),
    ("hydra.foo=1", "there is no setting 'hydra.foo'"),
    ("dataset.root=x", "there is no setting 'dataset.root'"),  # the bundled digits have none
    # Needed settings and groups taken out.
    ("~optimizer.lr", "'optimizer.lr' was taken out"),
    ("~epochs", "'epochs' was taken out"),
    ("~optimizer", "optimizer has to be one of adam, adamw, rmsprop, sgd"),
    ("model=null", "model has to be one of cnn, mlp, resnet18"),
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

    real = config.importlib.import_module

    def refuse(name: str, *arguments: str) -> ModuleType:
        if name in ("train", "evaluate"):
            pytest.fail(f"{name} is imported before the answer is given")
        return real(name, *arguments)

    monkeypatch.setattr(config.importlib, "import_module", refuse)


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
