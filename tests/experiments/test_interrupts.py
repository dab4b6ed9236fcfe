"""An interrupt ends a command also where a library has dropped it, and nothing that tidies up is interrupted by it."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, suppress

import pytest

from pica.experiments.interrupts import StopRequest, heed, raised_until_heeded, stop_on_signal


def press(number: int = signal.SIGINT) -> None:
    """A real signal, which Python sees before the next line."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@contextmanager
def tidying(done: list[str]):
    try:
        yield
    finally:
        time.sleep(1.2)
        done.append("tidy")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_dropped_interrupt_is_raised_anew(number: int):
    def drop() -> None:
        with raised_until_heeded() as request:
            for pressed in (True, False):
                with suppress(KeyboardInterrupt):
                    if pressed:
                        press(number)
                    time.sleep(60)
            assert request.made
            time.sleep(60)

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        drop()
    assert time.monotonic() - begun < 30


def converted(done: list[str]) -> None:
    try:
        press()
    except KeyboardInterrupt:
        try:
            raise ImportError("could not be imported") from None
        finally:
            time.sleep(1.2)
            done.append("tidy")


def plain(done: list[str]) -> None:
    with tidying(done):
        press()


@pytest.mark.parametrize(("way", "kind"), [(plain, KeyboardInterrupt), (converted, ImportError)])
def test_what_tidies_up_is_left_alone(way: Callable[[list[str]], None], kind: type[BaseException]):
    done: list[str] = []
    with pytest.raises(kind), raised_until_heeded():
        way(done)
    assert done == ["tidy"]


def test_another_signal_ends_the_tidying():
    done: list[str] = []

    def press_twice() -> None:
        with raised_until_heeded():
            try:
                press()
            finally:
                press()
                done.append("tidy")

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert not done


def test_a_heeded_interrupt_is_not_raised_again_but_the_next_one_is():
    done: list[int] = []

    def go_on() -> None:
        with raised_until_heeded():
            for number in range(2):
                with suppress(KeyboardInterrupt):
                    press()
                heed()
                time.sleep(1.2)
                done.append(number)
            with suppress(KeyboardInterrupt):
                press()
            time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        go_on()
    assert done == [0, 1]


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with suppress(KeyboardInterrupt), raised_until_heeded():
        press()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("block", [raised_until_heeded, stop_on_signal])
def test_what_the_shell_has_ignored_stays_ignored(block: Callable[[], AbstractContextManager[StopRequest]]):
    """As `pica train &` in a script has it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with block() as request:
            press()
            assert not request.made
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
