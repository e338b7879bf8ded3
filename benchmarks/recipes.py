"""What the recipes of configs/experiment/ reach: `python benchmarks/recipes.py` prints a table, a row a recipe.

Every run is the `python train.py experiment=NAME` that a user types, one a seed; the test set is read once a run, with
the weights that were best on the validation part. The digits are few, so that of them five folds are trained, each a
fifth of every class for the test, in place of seeds.

    python benchmarks/recipes.py digits_best --seeds 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets import ImageData, digits  # noqa: E402

RECIPES = ("tutorial", "digits_best")
FOLDS = 5


def fold_of_digits(fold: int) -> ImageData:
    """The digits, of each class another fifth for the test: every fifth sample, from number `fold` on."""
    whole = digits()
    assert isinstance(whole.train, tuple) and isinstance(whole.test, tuple)
    images, labels = (torch.cat(parts) for parts in zip(whole.train, whole.test, strict=True))
    place = torch.zeros_like(labels)
    for number in range(len(whole.classes)):
        place[labels == number] = torch.arange(int((labels == number).sum()))
    test = place % FOLDS == fold
    return ImageData((images[~test], labels[~test]), (images[test], labels[test]), whole.classes)


def train(recipe: str, seed: int, folder: Path) -> tuple[float, float]:
    """Test accuracy and seconds of training, of one run in an empty folder."""
    words = [f"experiment={recipe}", f"seed={seed}", f"name={recipe}_{seed}"]
    if recipe.startswith("digits"):
        words += ["dataset._target_=recipes.fold_of_digits", f"+dataset.fold={seed}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], cwd=folder, env=environment, check=True)
    summary = json.loads((folder / "checkpoints" / f"{recipe}_{seed}" / "summary.json").read_text())
    return summary["test_accuracy"], summary["seconds"]


def main() -> None:
    """Print mean and standard deviation of the test accuracy, and the median of the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help=f"of {', '.join(RECIPES)}; all if left out")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe (3), five folds of the digits")
    asked = parser.parse_args()
    rows = []
    for recipe in asked.recipes:
        runs = FOLDS if recipe.startswith("digits") else asked.seeds
        with tempfile.TemporaryDirectory() as folder:
            found = [train(recipe, seed, Path(folder)) for seed in range(runs)]
        accuracy, seconds = zip(*found, strict=True)
        spread = statistics.stdev(accuracy) if runs > 1 else float("nan")
        figures = f"{statistics.mean(accuracy):.2%} | {spread:.2%} | {statistics.median(seconds):.1f}"
        rows.append(f"| `{recipe}` | {runs} | {figures} |")
    print("\n| recipe | runs | test accuracy, mean | standard deviation | seconds of training, median |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
