"""How far exported files are from predict.py: `python benchmarks/export.py checkpoints/latest/best.pt`.

Of a checkpoint that was trained on Fashion-MNIST: all 10,000 test images, then 500 of them as PNG files of many sizes,
and as large JPEG files. And how far what predict.py says of these is from what it says of them as training reads them,
which decodes them at reduced size. Printed are the largest difference of a probability, the mean over images of their
largest, and how many predictions differ.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import export
from datasets import fashion_mnist
from engine.data.images import read_image
from predict import Predictor

Answers = Callable[[Tensor], Tensor]


def probabilities(predictor: Predictor, images: Sequence[Path | Tensor]) -> Tensor:
    """What predict.py says, `[n, classes]`."""
    rows = [dict(prediction.ranked) for prediction in predictor(images, top_k=len(predictor.classes))]
    return torch.tensor([[row[name] for name in predictor.classes] for row in rows])


def compare(what: str, answers: dict[str, Answers], wanted: Tensor, batches: Sequence[Tensor]) -> None:
    """Print how far each file is from what predict.py says, given batches `[batch, height, width, channels]`."""
    for name, answer in answers.items():
        with torch.inference_mode():
            found = torch.cat([answer(batch) for batch in batches])
        others = int((found.argmax(1) != wanted.argmax(1)).sum())
        each = (found - wanted).abs().amax(1)
        largest, mean = float(each.max()), float(each.mean())
        print(f"{what:<40} {name:<6} {largest:8.1e} {mean:8.1e}  {others} of {len(wanted):,} predictions differ")


def main() -> None:
    """Export, compare, print."""
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/latest/best.pt"
    predictor = Predictor(checkpoint, device="cpu")
    images = fashion_mnist("data").test[0]
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        answers: dict[str, Answers] = {}
        for ending, run in ((".onnx", export.answers_of_onnx), (".pt2", export.answers_of_pt2)):
            output = Path(folder) / f"model{ending}"
            export.main({"checkpoint": checkpoint, "output": str(output), "choices": {}})
            answers[ending] = run(output.read_bytes())
        batches = images.permute(0, 2, 3, 1).contiguous().split(500)
        compare("10,000 test images", answers, probabilities(predictor, [*images]), batches)
        for kind, least, most in (("png", 5, 300), ("jpg", 250, 700)):
            paths = []
            for number, image in enumerate(images[:: len(images) // 500, 0]):
                size = tuple(int(side) for side in draw.integers(least, most, 2))
                paths.append(Path(folder) / f"{number}.{kind}")
                Image.fromarray(image.numpy()).resize(size, Image.Resampling.BICUBIC).save(paths[-1], quality=95)
            read = [torch.from_numpy(np.array(Image.open(path)))[None, :, :, None] for path in paths]
            what = f"500 {kind.upper()} files, {least} to {most} pixels a side"
            said = probabilities(predictor, paths)
            compare(what, answers, said, read)
        as_in_training = [read_image(path, 1, at_least=(28, 28)) for path in paths]
        compare("  decoded as training does", {"": lambda _: probabilities(predictor, as_in_training)}, said, read[:1])


if __name__ == "__main__":
    main()
