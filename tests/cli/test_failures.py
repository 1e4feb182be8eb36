import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from memlayers.bench.gate import GateError
from memlayers.cli import main
from memlayers.lm.faults import TrainingFault

FAULTS = [
    (TrainingFault("out of memory:\n  total 1 GB\n"), "out of memory:\n  total 1 GB"),
    (MemoryError(), "not enough memory: an allocation failed"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "not enough memory: CUDA out of memory."),
    (
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate"),
        "not enough memory: [enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate",
    ),
    (GateError("read differs"), "read differs"),
    (OSError(errno.ENOSPC, "No space left on device", "f"), "[Errno 28] No space left on device: 'f'"),
    (OSError(errno.EIO, "Input/output error", "f"), "[Errno 5] Input/output error: 'f'"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[type(fault).__name__ for fault, _ in FAULTS])
def test_what_goes_wrong_on_the_way_is_said_with_status_1(fault, message, monkeypatch, capsys):
    import memlayers.cli.machine_commands as module

    def fail():
        raise fault

    monkeypatch.setattr(module, "versions", fail)
    assert main(["info"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"memlayers: error: {message}\n")


def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch):
    import memlayers.cli.machine_commands as module

    def fail():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(module, "versions", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        main(["info"])


def test_an_allocation_that_no_machine_can_make_is_one_line(monkeypatch, capsys):
    import memlayers.cli.machine_commands as module

    monkeypatch.setattr(module, "versions", lambda: torch.empty(1 << 50))
    assert main(["info"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("memlayers: error: not enough memory: ")
    assert err.count("\n") == 1


def test_an_interruption_is_no_traceback(monkeypatch, capsys):
    import memlayers.cli.machine_commands as module

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "versions", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "memlayers: interrupted\n"


@pytest.mark.promise(
    "Command line and files",
    "SIGTERM or SIGHUP while another command works (`prepare`, `compare`, `eval`, `bench`)",
    "supported",
    "it ends as by Ctrl-C, says where finished work is kept, with status 128 + signal",
)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_no_traceback_and_says_what_is_kept(number, status, monkeypatch, capsys):
    import memlayers.cli.machine_commands as module

    def work():
        try:
            os.kill(os.getpid(), number)
        except BaseException as error:
            error.add_note("What is done is kept")
            raise

    monkeypatch.setattr(module, "versions", work)
    assert main(["info"]) == status
    assert capsys.readouterr().err == f"memlayers: ended by {number.name}. What is done is kept\n"


def test_an_error_is_no_traceback_where_standard_error_is_gone(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["info", "--nonsense"]) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_output_to_a_full_disk_is_one_line(tmp_path):
    script = "import sys; from memlayers.cli import main; sys.exit(main(['--version']))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "memlayers: error: [Errno 28] No space left on device\n")


def test_a_closed_output_is_no_traceback():
    script = "import sys; from memlayers.cli import main; sys.exit(main(['--version']))"
    command = f"exec '{sys.executable}' -c \"{script}\" >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_file_that_may_not_be_read_is_the_user_s_fault(monkeypatch, capsys):
    import memlayers.cli.machine_commands as module

    def fail():
        raise PermissionError(errno.EACCES, "Permission denied", "f")

    monkeypatch.setattr(module, "versions", fail)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "memlayers: error: [Errno 13] Permission denied: 'f'\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])  # so that it shows at the end, or at once
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(unbuffered):
    script = "import sys; from memlayers.cli import main; sys.exit(main(['info']))"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    command.stdout.close()
    assert command.stderr.read() == b""
    command.stderr.close()
    assert command.wait(100) == 1
