"""Messages arrive whole and in order, whatever else is written between them."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes.worker.protocol import Channel, Closed, Silent

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
messages = st.dictionaries(st.text(), values, max_size=4)
rubbish = st.one_of(
    st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"").replace(b"{", b"")),
    st.sampled_from([b"{", b'{"event": ', b"[1, 2]", b"7", b"null", b"\xff\xfe", b"[" * 5000, b""]),
)


@contextmanager
def pipe():
    """A channel to read from and one to write to, joined; the second's descriptor as well."""
    read_fd, write_fd = os.pipe()
    spare_read, spare_write = os.pipe()
    reader, writer = Channel(read_fd, spare_write), Channel(spare_read, write_fd)
    try:
        yield reader, writer, write_fd
    finally:
        reader.close()
        writer.close()


@settings(deadline=None)
@given(st.lists(messages, max_size=5))
def test_what_is_sent_is_received(sent):
    with pipe() as (reader, writer, _):
        for message in sent:
            writer.send(message)
        assert [reader.receive(60) for _ in sent] == sent


@settings(deadline=None)
@given(st.lists(st.tuples(rubbish, st.booleans(), messages), min_size=1, max_size=5))
def test_what_a_library_writes_in_between_is_dropped(parts):
    """Also where it does not end its line."""
    with pipe() as (reader, writer, fd):
        for junk, ended, message in parts:
            os.write(fd, junk + b"\n" * ended)
            writer.send(message)
        assert [reader.receive(60) for _ in parts] == [message for _, _, message in parts]


def test_a_message_may_come_in_pieces_and_be_larger_than_a_pipe():
    message = {"text": "x" * 300_000}
    with pipe() as (reader, writer, _):
        thread = threading.Thread(target=writer.send, args=(message,))
        thread.start()
        assert reader.receive(5) == message
        thread.join()


def test_silence_is_told_after_the_time_allowed_and_rubbish_does_not_extend_it():
    with pipe() as (reader, _, fd):
        stop = threading.Event()

        def chatter() -> None:
            while not stop.wait(0.02):
                os.write(fd, b"still here\n")

        thread = threading.Thread(target=chatter)
        thread.start()
        start = time.monotonic()
        with pytest.raises(Silent):
            reader.receive(0.3)
        assert 0.25 < time.monotonic() - start < 2
        stop.set()
        thread.join()


def test_an_end_is_told_after_everything_before_it():
    with pipe() as (reader, writer, _):
        writer.send({"last": 1})
        writer.close()
        assert reader.receive(60) == {"last": 1}
        with pytest.raises(Closed):
            reader.receive(1)


def test_nobody_reading_is_told():
    with pipe() as (reader, writer, _):
        reader.close()
        with pytest.raises(Closed):
            writer.send({"a": 1})


def test_a_closed_channel_closes_nothing_else():
    with pipe() as (reader, writer, _):
        reader.close()
        other = os.pipe()  # takes the numbers that were freed
        reader.close()
        os.write(other[1], b"x")
        assert os.read(other[0], 1) == b"x"
        for fd in other:
            os.close(fd)
        with pytest.raises(Closed):
            reader.receive(0.1)
        with pytest.raises(Closed):
            reader.send({})
