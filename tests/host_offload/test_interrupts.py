import signal
import threading

import pytest

from host_offload.interrupts import hold_interrupts


def test_an_interrupt_comes_after_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), hold_interrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_error_passes_and_the_handler_is_put_back():
    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="inside"), hold_interrupts():
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGINT) is usual


def test_does_nothing_in_another_thread():
    seen = []

    def body():
        with hold_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
