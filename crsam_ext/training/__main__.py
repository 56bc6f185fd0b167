"""The program ``crsam-train``: runs the training, and turns errors and Ctrl-C into one line and an exit code."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from .errors import Stopped, TrainingError
from .options import parse
from .ranks import started


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Args:
        argv: the arguments without the name of the program; those of the process by default.

    Returns:
        The exit code: 0, 1 when nobody reads the output, 2 after an error that the user can mend, 75 after SIGTERM or
        SIGUSR1, when the run goes on with --resume, 130 after Ctrl-C. A process that torchrun has started ends with it
        here: threads of gloo may abort an interpreter that shuts down.
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
        # Not at the top: the help and mistakes in the options need none of the packages that training needs.
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
        return _complain("interrupted; with --resume it goes on after the last checkpoint", 130)
    except BrokenPipeError:
        return _complain("nobody reads the output any more; with --resume it goes on after the last checkpoint", 1)
    except OSError as error:  # of stdout or stderr: those of files have become a TrainingError
        return _complain(f"{error}; with --resume it goes on after the last checkpoint", 2)
    return 0


def _make_streams_robust() -> None:
    """Whatever the terminal cannot show is escaped; streams that are closed go nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, it stays open as long as the program runs
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _complain(message: str, code: int) -> int:
    if started()[0] == 0:  # of the processes of a run, the first speaks for all
        with suppress(OSError):
            print(f"crsam-train: {' '.join(message.split())}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # or Python would fail at it once more as it ends, with a code of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


if __name__ == "__main__":
    sys.exit(main())
