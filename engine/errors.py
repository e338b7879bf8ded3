"""The two ways a run ends that are not our bug: each is one line for the user and an exit code."""


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


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an exception of somebody else's says, on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
