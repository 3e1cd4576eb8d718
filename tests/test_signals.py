"""Signals during a long call into C."""

from __future__ import annotations

import ctypes
import signal
import socket
import sys
import threading

import pytest

from yarn_edge.signals import deferred_ctrl_c


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_deferred_signal_does_not_interrupt_a_system_call() -> None:
    """llama.cpp's RPC client takes a `recv` that ends with EINTR for a lost worker."""
    library = ctypes.CDLL(None, use_errno=True)
    ours, theirs = socket.socketpair()
    buffer = ctypes.create_string_buffer(1)
    with ours, theirs:
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        threading.Timer(0.4, theirs.sendall, (b"x",)).start()
        received = []
        with pytest.raises(KeyboardInterrupt), deferred_ctrl_c():
            received.append(library.recv(ours.fileno(), buffer, 1, 0))
    assert received == [1]
    assert buffer.raw == b"x"
