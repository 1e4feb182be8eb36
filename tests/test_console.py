import errno
import io
import os
import subprocess
import sys

import pytest

from memlayers.console import bar, messages, open_standard_streams, show, tell


class Broken(io.StringIO):
    """A stream that nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def flush(self):
        raise OSError(errno.EIO, "Input/output error")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [Broken(), closed(), None], ids=["broken", "closed", "none"])
def test_no_message_and_no_bar_ends_what_it_tells_of(stream, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", stream)
    tell("a line")
    with bar(desc="b", total=3) as shown:
        shown.update(1)
        shown.set_postfix({"loss": 1})
        shown.refresh()
    messages().write("c")
    messages().flush()
    assert capsys.readouterr().out == ""  # where `print` goes when its file is None


def test_a_message_arrives(capsys):
    tell("a line")
    assert capsys.readouterr().err == "a line\n"


@pytest.mark.parametrize("stream", [Broken(), closed(), None], ids=["broken", "closed", "none"])
def test_results_that_are_on_the_disk_need_nobody_to_read_of_them(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    show("done")


def test_a_file_is_not_opened_in_the_place_of_a_closed_stream():
    script = (
        "import os; from memlayers.console import open_standard_streams; open_standard_streams(); "
        "os._exit(os.open('.', os.O_RDONLY))"
    )
    closing = f"exec '{sys.executable}' -c \"{script}\" <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", closing], check=False).returncode > 2


def test_open_streams_stay_as_they_are():
    before = [os.fstat(number).st_ino for number in range(3)]
    open_standard_streams()
    assert [os.fstat(number).st_ino for number in range(3)] == before
