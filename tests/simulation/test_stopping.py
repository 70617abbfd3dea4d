import os
import signal

import pytest

from fedq.simulation.stopping import Interrupted, Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_wish_looked_for_after_each_client(number):
    before, done = signal.getsignal(number), []

    def work(item: int) -> int:
        if item == 2:
            os.kill(os.getpid(), number)
        done.append(item)  # the current client is finished
        return item

    with Stopping() as stopping:
        with pytest.raises(Interrupted, match=signal.Signals(number).name) as stopped:
            list(stopping.map(map)(work, range(10)))
        assert signal.getsignal(number) is before  # a second signal acts at once
    assert done == [0, 1, 2]
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_the_first_request_counts():
    stopping = Stopping()
    stopping.check()
    stopping.request(KeyError("first"))
    stopping.request(KeyError("second"))
    with pytest.raises(KeyError, match="first"):
        stopping.check()
