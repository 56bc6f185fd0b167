"""The program ``crsam-train``: runs a command, and turns errors and Ctrl-C into one line and an exit code."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from .errors import Stopped, TrainingError
from .options import parse
from .ranks import started


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``crsam-train`` with the given command line.

    Args:
        argv: the arguments without the program name; ``sys.argv[1:]`` by default.

    Returns:
        The exit code: 0 after success, 1 if the output pipe was closed, 2 after an error that the user can correct, 75
        after SIGTERM or SIGUSR1 (``--resume`` continues the run), 130 after Ctrl-C. A process started by torchrun exits
        here with this code instead of returning: gloo threads may abort an interpreter that is shutting down.
    """
    code = _main(argv)
    if started()[1] > 1:
        if "crsam_ext.training.loader" in sys.modules:
            sys.modules["crsam_ext.training.loader"].kill_all()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
    _make_streams_robust()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["prepare"]:
            from .prepare import main as prepare

            return prepare(arguments[1:])
        options = parse(argv)
        # Not at the top: --help and errors in the options must not need the packages that training needs.
        from .loop import run

        run(options)
    except Stopped as stopped:
        return stopped.status
    except TrainingError as error:
        return _complain(str(error), 2)
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        return _complain(f"the package {package} is missing: pip install 'crsam_ext[train]'", 2)
    except KeyboardInterrupt:
        return _complain("interrupted; --resume continues from the last checkpoint", 130)
    except BrokenPipeError:
        return _complain("the output pipe was closed; --resume continues from the last checkpoint", 1)
    except OSError as error:  # from stdout or stderr; errors of files were raised as TrainingError
        return _complain(f"{error}; --resume continues from the last checkpoint", 2)
    return 0


def _make_streams_robust() -> None:
    """Escape characters that the terminal cannot show, and discard output to closed streams."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, stays open until the program ends
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _complain(message: str, code: int) -> int:
    if started()[0] == 0:  # in a distributed run only rank 0 prints
        with suppress(OSError):
            print(f"crsam-train: {' '.join(message.split())}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # otherwise Python would fail again on exit and replace the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


if __name__ == "__main__":
    sys.exit(main())
