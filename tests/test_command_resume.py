"""The settings that a resumed run goes on with: its own, what is typed in their place, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from engine.command.resume import adopt, choices_of_run
from engine.config import CONFIGS, check
from engine.errors import RequestError
from engine.run import runs

Config = dict[str, Any]
RUN = Path("checkpoints/run")


def composed(*words: str) -> Config:
    """The checked configuration of `python train.py` with these words."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("train", overrides=list(words), return_hydra_config=True)
    choices = dict(config.hydra.runtime.choices)
    plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return check(plain, choices, [CONFIGS], "train")


def write(config: Config, ours: bool = True) -> None:
    """Put a run with such a configuration into checkpoints/run, typed here or made elsewhere."""
    (RUN / ".hydra").mkdir(parents=True, exist_ok=True)
    runs.save_config(RUN, config)
    if not ours:
        (RUN / ".hydra" / "config.yaml").write_text(yaml.safe_dump(runs.own_config(config)))


def resumed(*words: str) -> Config:
    """What `python train.py resume=checkpoints/run` goes on with where these words are typed."""
    typed = [f"resume={RUN}", *words]
    typed += choices_of_run(typed, [CONFIGS])
    return adopt(composed(*typed), typed, [CONFIGS])


def refused(*words: str) -> str:
    """Why it is refused."""
    with pytest.raises(RequestError) as error:
        resumed(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def once() -> Config:
    return composed("model.hidden=[8]", "optimizer.lr=0.2", "seed=3", "name=run")


@pytest.fixture
def own(once: Config) -> Config:
    """The configuration of the run in checkpoints/run, which was typed here."""
    config = copy.deepcopy(once)
    write(config)
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Which options its groups have


OPTIONS = {  # of the run above, by group; no experiment, search or debug
    "model": "mlp",
    "dataset": "digits",
    "optimizer": "sgd",
    "scheduler": "cosine",
    "criterion": "cross_entropy",
    "logger": "[csv]",
}


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("words", "typed"),
    [
        ([], ()),
        (["model=cnn"], ("model",)),
        (["epochs=3", "logger=[csv,wandb]", "optimizer=adam"], ("logger", "optimizer")),
        (["model.hidden=[9]", "optimizer.lr=0.1"], ()),  # settings, which leave the option open
        (["models=cnn", "=optimizer=adam"], ()),
    ],
)
def test_the_groups_that_are_not_typed_are_the_runs(words: list[str], typed: tuple[str, ...]) -> None:
    expected = sorted(f"{group}={option}" for group, option in OPTIONS.items() if group not in typed)
    for arguments in ([f"resume={RUN}", *words], [*words, f"resume={RUN}/"]):
        assert sorted(choices_of_run(arguments, [CONFIGS])) == expected


def test_several_trackers_are_typed_as_a_list_and_a_search_is_not_gone_on_with(own: Config) -> None:
    own["choices"] |= {"logger": ["csv", "tensorboard"], "hparams_search": "mlp"}
    write(own)
    typed = choices_of_run([f"resume={RUN}"], [CONFIGS])
    assert "logger=[csv,tensorboard]" in typed and "model=mlp" in typed
    assert not [word for word in typed if word.startswith(("hparams_search", "experiment", "debug"))]
    assert resumed()["changed"] == []  # though the search is another than the run's


def test_nothing_is_looked_up_where_no_run_is_resumed() -> None:
    for arguments in ([], ["model=cnn"], ["resume=null"], ["resume="], ["-m", "seed=0,1"], ["resume_changed=true"]):
        assert choices_of_run(arguments, [CONFIGS]) == []


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("option", ["-m", "--multirun"])
def test_a_sweep_of_a_resumed_run_is_refused(option: str) -> None:
    with pytest.raises(RequestError, match="resume= continues one run; it does not go with -m"):
        choices_of_run([f"resume={RUN}", option, "seed=1,2"], [CONFIGS])


def test_a_run_that_is_not_there_and_an_option_that_is_not_here_are_refused(own: Config) -> None:
    with pytest.raises(RequestError, match=r"resume=checkpoints/a=b: no run there; .* such as checkpoints/run, or"):
        choices_of_run(["resume=checkpoints/a=b"], [CONFIGS])
    own["choices"]["model"] = "perceptron"
    write(own)
    with pytest.raises(RequestError, match="checkpoints/run: it names model=perceptron, which configs/ does not have"):
        choices_of_run([f"resume={RUN}"], [CONFIGS])
    RUN.rename("checkpoints/a=b")
    with pytest.raises(RequestError, match="checkpoints/a=b: it names model=perceptron"):
        choices_of_run(["resume=checkpoints/a=b"], [CONFIGS])


# ---------------------------------------------------------------------------------------------------------------------
# What it goes on with


def test_nothing_typed_is_the_runs_own_configuration(own: Config) -> None:
    result = resumed()
    assert result == {**own, "resume": "checkpoints/run", "resume_changed": False, "changed": []}
    assert runs.own_config(result) == runs.own_config(own)  # what is saved again
    (RUN.parent / "latest").symlink_to("run")
    typed = ["resume=latest", *choices_of_run(["resume=latest"], [CONFIGS])]
    assert adopt(composed(*typed), typed, [CONFIGS])["resume"] == "checkpoints/run"


FREE = {  # what does not change the weights of the epochs that were planned
    "epochs=30": 30,
    "early_stopping.patience=2": 2,
    "device=cpu": "cpu",
    "num_workers=2": 2,
    "name=other": "other",
    "checkpoint.every_steps=5": 5,
    "checkpoint.every_minutes=null": None,
}


@pytest.mark.usefixtures("own")
def test_what_changes_no_weights_may_be_typed() -> None:
    result = resumed(*FREE, "logger=[csv,tensorboard]")
    assert result["changed"] == [] and result["choices"]["logger"] == ["csv", "tensorboard"]
    assert "tensorboard" in result["logger"]
    for word, value in FREE.items():
        found: Any = result
        for key in word.partition("=")[0].split("."):
            found = found[key]
        assert found == value, word
    assert (result["optimizer"]["lr"], result["model"]["hidden"], result["seed"]) == (0.2, [8], 3)


CHANGES = {  # what was typed: as it is listed, by name
    "batch_size=32": "batch_size 64 -> 32",
    "clip_grad_norm=1": "clip_grad_norm null -> 1",
    "criterion.label_smoothing=0.1": "criterion.label_smoothing 0.0 -> 0.1",
    "dataset.limit=60": "dataset.limit null -> 60",
    "deterministic=true": "deterministic false -> true",
    "drop_last=true": "drop_last false -> true",
    "limit_batches=5": "limit_batches null -> 5",
    "model.hidden=[9,9]": "model.hidden [8] -> [9, 9]",
    "optimizer.lr=0.1": "optimizer.lr 0.2 -> 0.1",
    "scheduler.warmup_epochs=1": "scheduler.warmup_epochs 0 -> 1",
    "seed=0": "seed 3 -> 0",
    "shuffle=false": "shuffle true -> false",
}


@pytest.mark.usefixtures("own")
def test_what_makes_the_result_another_is_refused_unless_it_is_accepted() -> None:
    for words in (list(CHANGES), ["optimizer.lr=0.1"], ["seed=0"]):
        assert refused(*reversed(words), "epochs=30") == (
            f"checkpoints/run was started with other settings: {', '.join(CHANGES[word] for word in words)}; "
            "leave them out, or accept with resume_changed=true that the result is no longer that of one run"
        )
    result = resumed(*CHANGES, "resume_changed=true")
    assert result["changed"] == list(CHANGES.values()) and result["resume_changed"] is True
    assert (result["optimizer"]["lr"], result["model"]["hidden"], result["seed"]) == (0.1, [9, 9], 0)
    assert (result["clip_grad_norm"], result["dataset"]["limit"], result["shuffle"]) == (1, 60, False)


@pytest.mark.usefixtures("own")
def test_another_option_brings_its_own_values_and_the_others_are_the_runs() -> None:
    assert "other settings: optimizer sgd -> adam; leave them out" in refused("optimizer=adam")
    result = resumed("optimizer=adam", "optimizer.lr=0.003", "resume_changed=true")
    adam = composed("optimizer=adam")["optimizer"]
    assert result["optimizer"] == {**adam, "lr": 0.003} and result["choices"]["optimizer"] == "adam"
    assert result["model"]["hidden"] == [8]
    assert result["changed"] == ["optimizer sgd -> adam"]  # whose values need not be listed one by one
    result = resumed("model=cnn", "scheduler=constant", "seed=4", "batch_size=9", "resume_changed=true")
    assert sorted(result["changed"][:2]) == ["model mlp -> cnn", "scheduler cosine -> constant"]
    assert result["changed"][2:] == ["batch_size 64 -> 9", "seed 3 -> 4"]
    assert result["optimizer"]["lr"] == 0.2


@pytest.mark.usefixtures("own")
def test_an_option_that_is_the_runs_already_keeps_the_runs_values() -> None:
    result = resumed("model=mlp", "optimizer=sgd")
    assert (result["model"]["hidden"], result["optimizer"]["lr"], result["changed"]) == ([8], 0.2, [])
    assert resumed("resume_changed=true")["changed"] == ["as asked"]
    assert resumed("resume_changed=false")["changed"] == []


def test_what_was_added_since_or_taken_out_counts_as_changed_and_is_named(own: Config) -> None:
    own["lost"] = 1
    del own["drop_last"]
    write(own)
    assert "other settings: drop_last none -> false, lost 1 -> none; leave" in refused()


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("word", ["experiment=tutorial", "debug=fast", "+debug=fast", "hparams_search=mlp"])
def test_a_group_that_sets_values_anywhere_is_refused(word: str) -> None:
    """Their values may have been the run's own, typed or not; which of them count could not be told."""
    group = word.partition("=")[0].lstrip("+")
    typed = [f"resume={RUN}", word, *choices_of_run([f"resume={RUN}", word], [CONFIGS])]
    config = composed(*[w.lstrip("+") for w in typed if not w.startswith("hparams")])  # a search needs its sweeper
    config["choices"][group] = word.partition("=")[2]
    with pytest.raises(RequestError, match=f"^{group}=: cannot be changed when resuming; set its values one by one$"):
        adopt(config, typed, [CONFIGS])


def test_long_values_and_lists_are_cut_in_the_middle(own: Config) -> None:
    own["model"]["hidden"] = [7] * 200
    write(own)
    before, _, after = refused("model.hidden=[9]").partition("model.hidden ")[2].partition(" -> ")
    assert before.startswith("[7, 7") and before.endswith("7, 7]") and len(before) == 60 and after.startswith("[9]; ")
    lost = {f"lost{number:03}": number for number in range(100)}
    own |= lost
    write(own)
    listed = refused().partition("other settings: ")[2].partition("; leave them out, or accept")[0]
    assert listed.startswith("lost000 0 -> none, ") and listed.endswith(", lost099 99 -> none")
    assert len(listed) == 600


@pytest.mark.usefixtures("own")
def test_neither_what_is_composed_nor_the_runs_file_is_changed() -> None:
    typed = [f"resume={RUN}", "epochs=30", *choices_of_run([f"resume={RUN}"], [CONFIGS])]
    config = composed(*typed)
    before, file = copy.deepcopy(config), (RUN / ".hydra" / "config.yaml").read_bytes()
    assert adopt(config, typed, [CONFIGS])["model"]["hidden"] == [8]
    assert config == before and (RUN / ".hydra" / "config.yaml").read_bytes() == file


# ---------------------------------------------------------------------------------------------------------------------
# Values of a run that was edited, or made elsewhere


def test_a_value_that_is_not_valid_is_refused_where_it_is_not_typed_anew(own: Config) -> None:
    own["batch_size"] = -1
    write(own)
    assert refused() == "checkpoints/run: batch_size=-1: expected an integer >= 1"
    assert resumed("batch_size=64", "resume_changed=true")["batch_size"] == 64


@pytest.fixture
def photos() -> Config:
    """A run with a folder of its own, in checkpoints/run."""
    config = composed("dataset=image_folder", "dataset.root=photos", "device=cpu", "name=run")
    write(config)
    return config


def test_a_path_is_taken_from_a_run_that_was_made_here_and_asked_for_else(
    photos: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    result = resumed()
    assert result["dataset"]["root"] == "photos" and result["device"] == "cpu" and result["changed"] == []
    write(photos, ours=False)
    elsewhere = "paths, addresses, names and added keywords are not taken from a run that was made elsewhere"
    assert refused() == f"checkpoints/run: say dataset.root=photos: {elsewhere}"
    assert capsys.readouterr().out == ""
    result = resumed("dataset.root=photos")
    assert result["dataset"]["root"] == "photos" and result["changed"] == []
    # The device is here's, which changes no weights; the name is the run's own affair, and not told.
    assert (result["device"], result["name"]) == ("auto", None)
    assert capsys.readouterr().out == "not taken from checkpoints/run, which was made elsewhere: device=cpu\n"


def test_what_neither_the_run_nor_the_command_line_gives_is_asked_for(photos: Config) -> None:
    del photos["dataset"]["root"]
    write(photos)
    assert refused().startswith("dataset.root has to be given: folder that holds one folder a class")


def test_a_value_that_is_not_taken_and_would_change_the_result_has_to_be_typed(
    own: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    own["dataset"]["target_transform"], own["device"], own["num_workers"] = "own.labels", "cpu", 7
    write(own, ours=False)
    assert refused() == (
        "checkpoints/run was started with other settings: dataset.target_transform own.labels -> null; "
        "say dataset.target_transform=own.labels "
        "(paths, addresses, names and added keywords are not taken from a run that was made elsewhere), "
        "or accept with resume_changed=true that the result is no longer that of one run"
    )
    assert capsys.readouterr().out == ""
    result = resumed("resume_changed=true")
    assert result["changed"] == ["dataset.target_transform own.labels -> null"]
    assert result["dataset"]["target_transform"] is None and result["optimizer"]["lr"] == 0.2
    # What is listed as changed is not told a second time.
    assert capsys.readouterr().out == (
        "not taken from checkpoints/run, which was made elsewhere: device=cpu, num_workers=7\n"
    )
    result = resumed("dataset.target_transform=own.labels", "device=cpu", "num_workers=7")
    assert result["changed"] == [] and result["dataset"]["target_transform"] == "own.labels"
    assert capsys.readouterr().out == ""


def test_a_long_list_of_what_is_not_taken_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    config = composed("logger=[csv,mlflow,tensorboard,wandb]", "num_workers=7", "logger.wandb.mode=online")
    for tracker, names in (("mlflow", ("uri", "artifacts", "experiment")), ("wandb", ("project", "entity"))):
        config["logger"][tracker] |= {"pictures": False, **dict.fromkeys(names, 200 * "x")}
    config["device"], config["logger"]["tensorboard"]["pictures"] = 200 * "d", False
    write(config, ours=False)
    assert resumed()["changed"] == []
    listed = capsys.readouterr().out.partition(", which was made elsewhere: ")[2].rstrip("\n")
    assert len(listed) == 600 and listed.startswith("device=ddd") and listed.endswith("=false")


def test_a_run_that_is_older_than_a_setting_goes_on_unchanged(own: Config) -> None:
    """What stands for nothing, null, is what a file without the setting has meant; another value is a change."""
    del own["clip_grad_norm"], own["ema"]
    write(own)
    assert resumed()["changed"] == []
    assert "clip_grad_norm none -> 1" in refused("clip_grad_norm=1")


def test_weights_to_begin_with_are_for_a_run_of_which_nothing_was_saved(own: Config) -> None:
    assert "init_from null -> a.pt" in refused("init_from=a.pt")
    assert resumed("init_from=a.pt", "resume_changed=true")["init_from"] == "a.pt"
    (RUN / "last.pt").touch()
    said = refused("init_from=a.pt", "resume_changed=true")
    assert said.startswith("init_from=a.pt: checkpoints/run goes on with the weights that it has; leave init_from out")
    assert resumed()["changed"] == []
    write({**own, "init_from": "a.pt"})
    assert resumed()["changed"] == []
