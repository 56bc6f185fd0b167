"""What ends a run before its end."""

#: The exit status of a run that a signal stopped, and that goes on with --resume: EX_TEMPFAIL of sysexits.h.
RESUME_ME = 75


class TrainingError(Exception):
    """What the user can mend: the program prints the message, one line, and ends with exit code 2."""


class Stopped(Exception):
    """The run was asked to stop, and its checkpoint is written.

    Attributes:
        status: the exit status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
