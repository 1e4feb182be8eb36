"""The command line: ``memlayers train | compare | prepare | eval | generate | doctor | bench | info``.

main         what is printed, and the exit status, when something goes wrong
commands     the commands and their options
options      a configuration from its preset, its file and its options
config_file  a file of options
refusals     one line for what the parser does not take
"""

import errno
import os
import sys
from collections.abc import Sequence

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # full, or failing: nothing that a user got wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. A failure is one line on standard error.

    Status 2 is for what a user got wrong, 1 for what went wrong on the way: no memory or no room on the disk left, a
    loss that is not finite, a check that failed. Nothing is said if nobody reads the output any more.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        import jsonargparse  # noqa: F401
        import transformers
    except ModuleNotFoundError as error:
        return _fail(f"the command line needs {error.name}: pip install 'memlayers[lm]'", USER_ERROR)
    from memlayers.checks import CommandFailed
    from memlayers.cli.commands import run_command

    transformers.utils.logging.disable_progress_bar()  # of saving and loading; training keeps its own
    try:
        run_command(arguments)
        sys.stdout.flush()  # what is still to be written must not fail after the end
    except BrokenPipeError:
        return _leave_quietly()
    except (ValueError, OSError) as error:
        is_of_the_disk = isinstance(error, OSError) and error.errno in _OF_THE_DISK
        return _fail(_with_notes(error), FAILED if is_of_the_disk else USER_ERROR)
    except CommandFailed as error:
        return _fail(str(error), FAILED)
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        return _fail(f"not enough memory: {str(error).strip().partition(chr(10))[0] or 'an allocation failed'}", FAILED)
    except KeyboardInterrupt as interruption:
        return _fail(_with_notes(interruption) or "interrupted", INTERRUPTED)
    return 0


def _leave_quietly() -> int:
    """The end of a command of which the output went into a pipe that was closed, as by `head`."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # where the rest of it goes at the end of the process
    os.close(nowhere)
    return FAILED


def _with_notes(error: BaseException) -> str:
    """What it says, and what was added on its way here: where what is done so far is kept."""
    return ". ".join(filter(None, (str(error) or None, *getattr(error, "__notes__", ()))))


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; PyTorch says so on a CPU, and of sizes beyond 64 bits, by its message alone."""
    import torch

    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in said
        for sign in ("alloc_cpu", "DefaultCPUAllocator", "can't allocate memory", "size calculation overflow")
    )


def _fail(message: str, status: int) -> int:
    print(f"memlayers: {'' if status == INTERRUPTED else 'error: '}{message.strip()}", file=sys.stderr)
    return status
