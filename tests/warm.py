"""Imported by the process that others are forked from: what each of them would do first is done here once."""

from __future__ import annotations

from hydra import compose, initialize_config_dir

from engine.config import CONFIGS

with initialize_config_dir(str(CONFIGS), version_base=None):
    compose("train")
