"""The one exception for mistakes that a user can mend."""


class TrainingError(Exception):
    """A mistake in the options, the data or the output folder.

    The message is one line that says what is wrong; ``crsam-train`` prints it on stderr and exits with code 2.
    """
