import threading
import time

import pytest

from tasks.pipelining import BackgroundWriter, prefetch


def test_prefetch_keeps_order():
    assert list(prefetch(iter(range(50)), 3)) == list(range(50))


def test_prefetch_reads_at_most_so_many_ahead():
    produced = []

    def source():
        for i in range(100):
            produced.append(i)
            yield i

    items = prefetch(source(), 2)
    assert next(items) == 0
    time.sleep(0.3)
    # One taken, two queued, one waiting to be queued.
    assert len(produced) <= 4
    items.close()


def test_prefetch_raises_the_error_of_its_source_in_order():
    def source():
        yield 1
        raise OSError("disk gone")

    items = prefetch(source(), 4)
    assert next(items) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(items)


def test_prefetch_stops_its_thread_when_closed_early():
    items = prefetch(iter(range(10**9)), 2)
    next(items)
    items.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_prefetch_that_is_given_up_yields_no_more_though_an_item_is_waited_for():
    given_up = threading.Event()

    def source():
        yield 1
        given_up.wait()
        raise OSError("given up")

    items = prefetch(source(), 2, given_up)
    assert next(items) == 1
    threading.Timer(0.3, given_up.set).start()
    assert list(items) == []
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_writer_runs_all_writes_in_order():
    written = []
    with BackgroundWriter() as writer:
        for i in range(20):
            writer.submit(lambda i=i: written.append(i))
    assert written == list(range(20))


def test_writer_raises_a_failed_write_at_the_end():
    def fail():
        raise OSError("store full")

    with pytest.raises(OSError, match="store full"), BackgroundWriter() as writer:
        writer.submit(fail)
