"""The exceptions that end a run early."""

#: The exit status of a run that a signal stopped and that --resume continues: EX_TEMPFAIL of sysexits.h.
RESUME_ME = 75


class TrainingError(Exception):
    """An error that the user can correct: the program prints the one-line message and exits with code 2."""


class Stopped(Exception):
    """The run was asked to stop, and its checkpoint has been written.

    Attributes:
        status: the exit status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
