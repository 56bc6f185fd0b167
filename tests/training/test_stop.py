"""Requests to stop and to save, with one process and with two."""

import os
import signal
import time
from contextlib import suppress

import pytest

from crsam_ext.training import stop
from crsam_ext.training.errors import Stopped
from crsam_ext.training.ranks import ALONE, Ranks
from crsam_ext.training.stop import Requests


def after_a_step(requests):
    """Return the requests after a step: whether to save, and the exit status to stop with."""
    requests.begin_step()
    requests.end_step()
    try:
        requests.raise_if_stopped(3)
    except Stopped as stopped:
        return requests.save, stopped.status
    return requests.save, None


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_stops_the_run(name, status):
    requests = Requests(ALONE, 30)
    with requests.listening():
        assert after_a_step(requests) == (False, None)
        os.kill(os.getpid(), getattr(signal, name))
        assert after_a_step(requests) == (True, status)
        requests.saved()
        assert after_a_step(requests) == (True, status)  # the request stays until the run has stopped


def test_a_signal_in_a_step_takes_effect_after_it():
    requests = Requests(ALONE, 30)
    with requests.listening():
        requests.begin_step()
        signal.raise_signal(signal.SIGTERM)
        requests.end_step()
        assert requests.save


def test_a_second_ctrl_c_acts_immediately():
    requests = Requests(ALONE, 30)
    with requests.listening():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("error", [None, Stopped("stopped", 75), KeyboardInterrupt()])
def test_signal_handlers_are_restored_after_listening(error):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with suppress(Stopped, KeyboardInterrupt), Requests(ALONE, 30).listening():
        signal.raise_signal(signal.SIGINT)
        if error is not None:
            raise error

    assert [signal.getsignal(number) for number in numbers] == before


def test_save_is_due_after_the_given_minutes(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    requests, other = Requests(ALONE, 2), Requests(Ranks(1, 1), 2)
    now += 120
    assert after_a_step(requests) == (False, None)
    now += 1
    assert after_a_step(requests) == (True, None)
    assert after_a_step(other) == (False, None)  # only rank 0 checks the time
    requests.saved()
    assert after_a_step(requests) == (False, None)
    now += 121
    assert after_a_step(requests) == (True, None)


def test_a_signal_while_a_save_is_due_is_not_lost(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    requests = Requests(ALONE, 2)
    with requests.listening():
        now += 121
        assert after_a_step(requests) == (True, None)
        signal.raise_signal(signal.SIGTERM)  # while the checkpoint is being written
        requests.saved()
        assert after_a_step(requests) == (True, 75)


def test_only_existing_signals_are_handled():
    assert set(stop._SIGNALS) <= {"SIGTERM", "SIGUSR1", "SIGINT"}
    assert "SIGINT" in stop._SIGNALS
