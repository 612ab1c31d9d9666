"""A TCP proxy in front of a server that can lose things: replies, connections, everything for a while."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PIECE = 1 << 16


class Proxy:
    """Passes on what comes, in both directions.

    Args:
        loses_reply: asked with the first bytes of each request that goes out; if it says so, the server gets the whole
            request and does what it says, and the client gets a closed connection in place of the answer.
        host: to listen at.
    """

    def __init__(
        self, port: int, loses_reply: Callable[[bytes], bool] = lambda head: False, host: str = "127.0.0.1"
    ) -> None:
        self._target, self.loses_reply = ("127.0.0.1", port), loses_reply
        self.lost = 0
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for one in self._open:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._target, timeout=30)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        with self._lock:
            self._open |= {client, server}
        doomed = threading.Event()
        back = threading.Thread(target=self._pass_back, args=(server, client, doomed), daemon=True)
        back.start()
        fresh = True
        with suppress(OSError):
            while data := client.recv(PIECE):
                if fresh or data[:4] in (b"PUT ", b"GET ", b"POST", b"HEAD", b"DELE"):
                    fresh = False
                    if self.loses_reply(data):
                        self.lost += 1
                        doomed.set()
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)
        back.join()
        with self._lock:
            self._open -= {client, server}
        client.close()
        server.close()

    def _pass_back(self, server: socket.socket, client: socket.socket, doomed: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(PIECE):
                if doomed.is_set() and not data.startswith(b"HTTP/1.1 100"):
                    break
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy(
    port: int, loses_reply: Callable[[bytes], bool] = lambda head: False, host: str = "127.0.0.1"
) -> Iterator[Proxy]:
    made = Proxy(port, loses_reply, host)
    try:
        yield made
    finally:
        made.stop()
