"""A web server on loopback that fails as a test plans it, and waiting for what happens in the background."""

import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves `files`. `plans` has, per path, a list of how the next requests fail: a status, "cut" or "stall" (in the
    middle), "slow", "stale" (other contents)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.plans, self.gets, self.closing = {}, {}, Counter(), threading.Event()
        self.tokens = {}  # path → the Authorization header that it needs

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def add(self, path: str, data: bytes, *plan) -> str:
        self.files[path], self.plans[path] = data, list(plan)
        return self.url(path)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.gets[self.path] += 1
        data, plan = self.server.files.get(self.path), self.server.plans.get(self.path)
        if self.headers.get("Authorization") != self.server.tokens.get(self.path, self.headers.get("Authorization")):
            return self.send_error(401)
        step = 404 if data is None else plan.pop(0) if plan else None
        if isinstance(step, int):
            return self.send_error(step)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        data = bytes(len(data)) if step == "stale" else data
        half = len(data) // 2
        self.wfile.write(data[:half])
        self.wfile.flush()
        if step in ("stall", "slow"):
            self.server.closing.wait(120 if step == "stall" else 0.4)
        if step not in ("cut", "stall"):
            self.wfile.write(data[half:])

    def log_message(self, *words):
        pass


def wait_for(condition, seconds: float = 60) -> None:
    """Wait until a condition is true. Fail after `seconds`, which are many times what a busy machine needs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
