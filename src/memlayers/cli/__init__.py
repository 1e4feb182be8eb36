"""The command line: ``memlayers train | retrofit | compare | prepare | eval | generate | explore | doctor | ...``.

In the order of a command's way:

main               what is printed, and the exit status, when something goes wrong
commands           every command with its options, and the choice between them
arguments          what was typed becomes values; the help
configuration      the configuration of a run from its preset, its files and its options
options_file       a file of options
training_commands  train, retrofit, compare, reproduce, prepare
model_commands     eval, generate, explore, doctor
machine_commands   bench, info
"""

import contextlib
import errno
import logging
import sys
from collections.abc import Sequence

from memlayers.checks import CommandFailed, ProcessLost
from memlayers.console import discard_output, messages, open_standard_streams, tell
from memlayers.launch import is_launched, is_spoken_for, number
from memlayers.signals import Stopped, obey_missed, on_ending_signal, stop
from memlayers.version import __version__

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # full, or failing: nothing that a user got wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status. A failure is one line on standard error.

    Status 2 is for what a user got wrong, 1 for what went wrong on the way: no memory or no room on the disk left, a
    loss that is not finite, a check that failed; 128 + signal for SIGTERM and SIGHUP. Nothing is said if nobody reads
    the output any more.

    Of several processes that `torchrun` started, one of each machine says what all of them fail by; that another one
    was lost, and what went wrong in one of them alone, each says by itself.
    """
    open_standard_streams()
    # Where it is installed, transformers imports it for a schedule, and on a CPU it says what it lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(messages()), on_ending_signal(stop):
        status = _status_of(sys.argv[1:] if arguments is None else list(arguments))
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            discard_output()
    return status


def _status_of(arguments: Sequence[str]) -> int:
    try:
        if arguments[:1] == ["--version"]:  # before anything is imported that an extra brings
            print(f"memlayers {__version__}")
        else:
            from memlayers.cli.commands import run_command  # needs PyYAML

            run_command(arguments)
            obey_missed()
        if sys.stdout is not None:  # it was closed at the start
            sys.stdout.flush()  # what is still to be written must not fail after the end
    except BrokenPipeError:
        return FAILED
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("", "memlayers"):
            raise
        return _fail(f"this command needs {error.name}: pip install 'memlayers[lm]'", USER_ERROR)
    except (ValueError, OSError) as error:
        is_of_the_disk = isinstance(error, OSError) and error.errno in _OF_THE_DISK
        return _fail(_with_notes(error), FAILED if is_of_the_disk else USER_ERROR)
    except CommandFailed as error:
        return _fail(str(error), FAILED)
    except ProcessLost as error:
        return _fail(str(error), FAILED, is_own=True)
    except (MemoryError, RuntimeError) as error:
        from memlayers.available import is_lack_of_memory  # imports torch, for which no other end has to wait

        if not is_lack_of_memory(error):
            raise
        found = str(error).strip().partition("\n")[0] or "an allocation failed"
        return _fail(f"not enough memory: {found}", FAILED, is_own=True)
    except Stopped as stopped:
        return _fail(_with_notes(stopped), stopped.code)
    except KeyboardInterrupt as interruption:
        return _fail(_with_notes(interruption) or "interrupted", INTERRUPTED)
    return 0


def _with_notes(error: BaseException) -> str:
    """The error's message, and what was added on its way here: where what is done so far is kept."""
    return ". ".join(filter(None, (str(error) or None, *getattr(error, "__notes__", ()))))


def _fail(message: str, status: int, *, is_own: bool = False) -> int:
    if is_own or not is_spoken_for():
        rank = f"rank {number('RANK')}: " if is_own and is_launched() else ""
        tell(f"memlayers: {'' if status > 128 else 'error: '}{rank}{message.strip()}")
    return status
