"""What every picture has in common: its style, its way to the disk, and a page on which text is fitted by the pixel.

They are drawn with matplotlib's objects on the Agg canvas, so no display and no global state is involved, and
matplotlib is imported when the first one is drawn. A picture never makes a run fail: what goes wrong is one line of the
log. Sizes are in pixels and chosen so that every text can be read without zooming.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine import files
from engine.errors import one_line, printable
from engine.terminal import log

if TYPE_CHECKING:  # a sweep draws without torch
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from torch import Tensor

DPI = 100
BLUE, ORANGE, GREY, BLACK = "#1f6fb4", "#d95f02", "#6b6b6b", "#222222"  # told apart with every common colour blindness
STYLE: dict[str, Any] = {
    "axes.edgecolor": "#9a9a9a",
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.dpi": DPI,
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "savefig.dpi": DPI,
    "text.parse_math": False,  # a class name with dollar signs is no formula
    "xtick.color": "#333333",
    "ytick.color": "#333333",
}
CHINESE_AND_JAPANESE = ["Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "Yu Gothic", "Microsoft YaHei"]
OTHER_SCRIPTS = [*CHINESE_AND_JAPANESE, "Arial Unicode MS"]  # fonts for class names that DejaVu Sans cannot write


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in our style whatever the user's matplotlibrc says, and leave matplotlib's settings as they were."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    families = ["DejaVu Sans", *(name for name in OTHER_SCRIPTS if name in installed)]
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class name may have characters that no font here has
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"font.family": families})  # type: ignore[arg-type]
        yield


def draw(path: Path, make: Callable[..., Figure], *arguments: Any) -> bool:
    """Write the figure that `make(*arguments)` returns as a PNG.

    Returns:
        whether all went well; if not, the reason was said: in the log of the run, or where none is open, as in an
        evaluation, on standard error.
    """
    png = BytesIO()
    try:
        with house_style():
            make(*arguments).savefig(png, format="png")
        files.write(path, png.getvalue())
    except Exception as error:  # whatever it is: the numbers are worth more than their picture
        text = printable(f"{path} was not drawn: {one_line(error)}")
        if log.handlers:
            log.warning(text)
        else:
            print(text, file=sys.stderr)
        return False
    return True


class Page:
    """A figure of `width` x `height` pixels, with places in pixels from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI))
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes of this size at this place."""
        bottom = self.height - top - height
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def write(
        self, x: float, y: float, text: str, size: float = 9, ha: str = "left", color: str = BLACK, bold: bool = False
    ) -> None:
        """One line of text, its middle at the height `y`."""
        x, y, weight = x / self.width, 1 - y / self.height, "bold" if bold else "normal"
        self.figure.text(x, y, text, fontsize=size, ha=ha, va="center", color=color, fontweight=weight)

    def show(self, pixels: np.ndarray, left: float, top: float, side: float) -> None:
        """An image `[height, width]` or `[height, width, 3]`, 0 to 1, in a square."""
        axes = self.axes(left, top, side, side)
        axes.imshow(pixels, "gray", vmin=0, vmax=1)
        axes.set_axis_off()


def viewable(images: Tensor, transforms: Sequence[Any]) -> np.ndarray:
    """Images as they can be shown: `[n, height, width, 3]`, 0 to 1, or `[n, height, width]` where they are not RGB.

    Args:
        images: `[n, channels, height, width]`, uint8, or floats that are 0 to 1 once `Normalize` is undone.
        transforms: what was done to the images; of this, `Normalize` is undone.
    """
    from engine.data.augment import Normalize

    if not images.is_floating_point():
        images = images / 255
    for transform in reversed(transforms):
        if isinstance(transform, Normalize):
            images = images * transform.std + transform.mean
    pixels = images.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return pixels if pixels.shape[3] == 3 else pixels.mean(3)


@lru_cache(maxsize=1)
def _renderer() -> Any:
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(1, 1, DPI)


def text_width(text: str, size: float) -> float:
    """Pixels that a line of text takes, at a font size in points."""
    from matplotlib.font_manager import FontProperties

    return float(_renderer().get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0])


def fitted(text: str, size: float, limit: float) -> str:
    """Text on one line of at most `limit` pixels; of a longer one the beginning and the end, which tell names apart."""
    text = "".join(c if c.isprintable() else " " for c in text)
    width = text_width(text, size)
    if width <= limit:
        return text
    kept = min(len(text) - 1, int(len(text) * limit / width) + 3)
    while True:
        short = text[: (kept + 1) // 2].rstrip() + "…" + text[len(text) - kept // 2 :].lstrip()
        if kept <= 2 or text_width(short, size) <= limit:
            return short
        kept -= 1


def finite(values: Iterable[float | None]) -> np.ndarray:
    """Numbers to draw, with gaps (nan) for what cannot be drawn."""
    numbers = np.array(list(values), dtype=float)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def name_ticks(axes: Axes, names: Sequence[str], size: float, slant: int) -> None:
    """Names at 0, 1, ... below the horizontal axis, turned by `slant` degrees where that is not 0."""
    turned: dict[str, Any] = {"rotation": slant, "ha": "right", "rotation_mode": "anchor"} if slant else {}
    axes.set_xticks(range(len(names)), names, fontsize=size, **turned)


def number_axis(axis: Axis, most: int, percent: bool = False, **settings: Any) -> None:
    """At most `most` round numbers along an axis, which are shares of 0 to 1 where they are told in percent."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10], **settings))
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%" if percent else f"{value:.4g}")


def count_axis(axis: Axis, most: int) -> None:
    """At most `most` whole numbers along an axis."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
