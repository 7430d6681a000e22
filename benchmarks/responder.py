"""The smallest HTTP server: it answers each request with the same bytes, so that a load generator's own cost shows.

`python -m benchmarks.responder` prints its port and serves until stdin ends. A request must come in one piece, as those
of `benchmarks.load` do on loopback.
"""

import select
import socket
import sys

BODY = b'{"probabilities": [' + b", ".join([b"0.1000000"] * 10) + b"]}"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


def serve(listener: socket.socket, until: int, answer: bytes = ANSWER) -> None:
    """Answers everybody, until the file descriptor `until` can be read or is closed."""
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    epoll.register(until, select.EPOLLIN)
    streams: dict[int, socket.socket] = {}
    while True:
        for descriptor, _ in epoll.poll():
            if descriptor == until:
                for stream in streams.values():
                    stream.close()
                epoll.close()
                return
            if descriptor == listener.fileno():
                stream, _ = listener.accept()
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                streams[stream.fileno()] = stream
                epoll.register(stream, select.EPOLLIN)
                continue
            try:
                asked = streams[descriptor].recv(65536)
                streams[descriptor].sendall(answer if asked else b"")
            except OSError:
                asked = b""
            if not asked:
                streams.pop(descriptor).close()


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0), backlog=128) as made:
        print(made.getsockname()[1], flush=True)
        serve(made, sys.stdin.fileno())
