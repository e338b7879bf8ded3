"""The models: one file each, named by `_target_` in a YAML of configs/model/."""
