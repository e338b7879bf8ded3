"""What makes short runs in tests take half of their time: texts are parsed once, pictures are one white pixel."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.hydra import Hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from engine import files
from engine.config import CONFIGS

# One white pixel as an RGBA PNG, as matplotlib writes them: TensorBoard takes no other number of dimensions.
WHITE = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489000000"
    "0b4944415478da63f80f040009fb03fd68fa1ccc0000000049454e44ae426082"
)


def draw_quickly(path: Path, *_: Any) -> bool:
    """Write one white pixel as `style.draw` writes a picture, which takes a third of a short run."""
    files.write(path, WHITE)
    return True


def compose_quickly(patch: Callable[[Any, str, Any], None]) -> None:
    """Let calls in this process compose a configuration in half of the time, to the same configuration.

    Hydra parses some twenty YAML files for a command, and composes everything twice: at first only to learn whether a
    file sets hydra.mode, which searches alone do; then some are read again for their comments. What a text was parsed
    to is kept here.
    """
    parsed: dict[str, bytes] = {}  # pickled: five times as fast to copy as OmegaConf's own way
    plain: dict[Any, bytes] = {}
    load, create, safe_load = OmegaConf.load, OmegaConf.create, yaml.safe_load
    get_mode, ours = Hydra.get_mode, ("hydra.conf", str(CONFIGS), "")

    def load_once(file: Any) -> DictConfig | ListConfig:
        if not isinstance(file, io.TextIOWrapper):
            return load(file)
        text = file.read()
        if text not in parsed:
            file.seek(0)
            parsed[text] = pickle.dumps(load(file))  # which names it, where it is no YAML
        return pickle.loads(parsed[text])

    def create_once(obj: Any = "", *arguments: Any, **named: Any) -> Any:
        if not isinstance(obj, str) or arguments or named:
            return create(obj, *arguments, **named)
        if obj not in parsed:
            parsed[obj] = pickle.dumps(create(obj))
        return pickle.loads(parsed[obj])

    def safe_load_once(stream: Any) -> Any:
        if not isinstance(stream, str):
            return safe_load(stream)
        if stream not in plain:
            plain[stream] = pickle.dumps(safe_load(stream))
        return pickle.loads(plain[stream])

    def mode_of(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        others = [source for source in self.config_loader.get_sources() if source.path not in ours]
        may_be_set = others or any("hydra" in word or "hparams_search" in word for word in overrides)
        return get_mode(self, config_name, overrides) if may_be_set else None

    patch(OmegaConf, "load", staticmethod(load_once))
    patch(OmegaConf, "create", staticmethod(create_once))
    patch(yaml, "safe_load", safe_load_once)
    patch(Hydra, "get_mode", mode_of)
