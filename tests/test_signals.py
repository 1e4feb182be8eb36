import os
import signal
import threading

import pytest

from memlayers.signals import Stopped, obey_missed, on_ending_signal, stop, stop_request


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")]
)
def test_a_signal_ends_with_its_status_and_says_its_name(number, status, name):
    with pytest.raises(Stopped, match=f"^ended by {name}$") as stopped, on_ending_signal(stop):
        send(number)
    assert stopped.value.code == status
    assert isinstance(stopped.value, SystemExit)  # what `except Exception` does not take


def goes_unheard(number):
    """A signal during code that catches everything, as finalizers and some imports do."""
    try:
        send(number)
    except BaseException:
        pass
    else:
        raise AssertionError("the signal did not come")


def test_a_signal_that_went_unheard_is_obeyed_later():
    def work():
        goes_unheard(signal.SIGTERM)
        obey_missed()

    with pytest.raises(Stopped) as stopped, on_ending_signal(stop):
        work()
    assert stopped.value.code == 143
    obey_missed()  # it is over


def test_a_signal_that_went_unheard_ends_work_before_it_begins():
    begun = []

    def work():
        obey_missed()  # nothing yet
        goes_unheard(signal.SIGHUP)
        with stop_request():
            begun.append(True)

    with pytest.raises(Stopped), on_ending_signal(stop):
        work()
    assert not begun


def test_the_second_signal_finds_the_system_s_own_way_to_end():
    def work():
        with stop_request() as request:
            send(signal.SIGTERM)
            assert request
            assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == [signal.SIG_DFL] * 2

    with pytest.raises(Stopped):
        work()


def test_what_was_there_is_there_again():
    with on_ending_signal(stop):
        outer = signal.getsignal(signal.SIGTERM)
        with stop_request():
            assert signal.getsignal(signal.SIGTERM) is not outer
        assert signal.getsignal(signal.SIGTERM) is outer
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("before", [signal.SIG_IGN, lambda number, frame: None])
def test_a_signal_that_is_ignored_or_that_somebody_handles_stays_so(before):
    signal.signal(signal.SIGHUP, before)
    try:
        with stop_request() as request:
            send(signal.SIGHUP)
            assert not request
            assert signal.getsignal(signal.SIGHUP) is before
        assert signal.getsignal(signal.SIGHUP) is before
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_in_another_thread_nothing_is_changed():
    found = []

    def work():
        with stop_request():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]
