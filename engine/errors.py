"""The ways a run ends that are not our bug: each is one line for the user and an exit code."""

import difflib
import sysconfig
import traceback
import unicodedata
from collections.abc import Iterable
from pathlib import Path

NOT_THE_USERS = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"), str(Path(__file__).parent))


class RunError(Exception):
    """A failure at work (a full disk, a loss that is not a number): one line, exit code 1."""

    exit_code = 1


class RequestError(RunError):
    """A wrong request (an unknown option, a missing file): one line, exit code 2, nothing left behind."""

    exit_code = 2


class Interrupted(RunError):
    """Ctrl-C (130) or SIGTERM (143), after the state was saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def printable(text: str) -> str:
    """Text on one line that cannot steer a terminal: control characters, line ends among them, written as escapes.

    The same holds for the invisible characters that turn the direction of writing, and for the halves of characters
    that stand for bytes of a file name that is no UTF-8.
    """
    return text if text.isprintable() else "".join(c if _is_shown(c) else ascii(c)[1:-1] for c in text)


def _is_shown(character: str) -> bool:
    # Spaces of other widths, and what joins the parts of an emoji or keeps letters apart in Persian, are harmless.
    return character.isprintable() or unicodedata.category(character) == "Zs" or character in "\u200c\u200d"


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an exception of somebody else's says, on one line of at most `limit` characters, safe to print."""
    return shortened(" ".join(str(error).split()) or type(error).__name__, limit)


def shortened(text: str, most: int = 80) -> str:
    """Text that was typed or read, for a line of a message: safe to print and not longer than one wants to read."""
    if len(text) > 4 * most:
        text = text[: 2 * most] + text[-2 * most :]  # what is left out of the middle need not be made printable
    text, head = printable(text), most * 3 // 4
    return text if len(text) <= most else f"{text[:head]}...{text[head + 3 - most :]}"


def counted(number: int, noun: str) -> str:
    """`1 image`, `1,797 images`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def out_of_memory(error: BaseException, batch_size: int) -> str | None:
    """What to say and to try where a step ran out of memory, the device's or the machine's; None for other errors."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")  # torch has several
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not named and not (isinstance(error, RuntimeError) and any(word in str(error) for word in words)):
        return None
    half = f"try batch_size={batch_size // 2}" if batch_size > 1 else "try a smaller model or smaller images"
    return f"out of memory with batch_size={batch_size}; {half}"


def cause(error: BaseException, named: bool = False) -> str:
    """What code of the user's or of a library raised, on one line, and where: in the user's own file if it came by one.

    Args:
        error: as it was caught.
        named: whether its type is told even where the text says enough without it.
    """
    common = type(error) in (TypeError, ValueError, RuntimeError, UserWarning, SyntaxError)
    said = one_line(error, 400) if common and not named else f"{type(error).__name__}: {one_line(error, 200)}"
    if isinstance(error, SyntaxError):
        return said  # its text has the place
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(place in frame.filename for place in NOT_THE_USERS)]
    at = (own or frames)[-1]
    return f"{said} ({Path(at.filename).name}:{at.lineno})"


def interrupt_behind(error: BaseException | None) -> int | None:
    """The exit code of the Ctrl-C or SIGTERM that an exception hides, or None.

    OmegaConf, interrupted while it composes a configuration, raises errors of its own on the way out.
    """
    waiting, seen = [error], set[int]()  # by way of a cause a chain of contexts can lead back to where it began
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        if isinstance(one, KeyboardInterrupt):
            return 130
        if isinstance(one, SystemExit) and one.code == 143:
            return 143
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
    return None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean x or y?)` with the nearest of `known`, or an empty string when nothing is near."""
    names = {_plain(k): k for k in known}
    plain = _plain(name)
    if plain in names:
        return f" (did you mean {names[plain]}?)"
    near = difflib.get_close_matches(plain, names, n=2, cutoff=0.75)
    last = plain.rpartition(".")[2]  # `lr` stands for `optimizer.lr`
    near += [k for k in names if k.rpartition(".")[2] == last and k not in near][:2]
    near = near or difflib.get_close_matches(plain, names, n=1, cutoff=0.5)
    return f" (did you mean {' or '.join(names[k] for k in near)}?)" if near else ""


def _plain(name: str) -> str:
    """`Fashion-MNIST` as `fashion_mnist`: what differs in capitals and dashes is near."""
    return name.lower().replace("-", "_")
