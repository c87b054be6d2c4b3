"""Web servers on this machine that misbehave on demand, for tests of downloads."""

import contextlib
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Mirror:
    """A running server: its file's address, and the Range header of every request so far (None: the whole file)."""

    url: str
    asked: list = field(default_factory=list)


def sends(upto=None, ranges=True, stall=False, capped=None, length=True, label=True, chunked=False, other=None):
    """An act: answer with the file, or what is asked of it; break off (or fall silent) after `upto` bytes.

    capped: bring so many bytes at a time and say so; length: say how many come; label: say which they are; chunked: in
    chunks, the last of which says that it is the last; other: bytes to send in place of the file.
    """

    def act(handler, body, over):
        body = body if other is None else other
        wanted = handler.headers["Range"] if ranges else None
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        if start >= len(body):
            return refuses(416)(handler, body, over)
        handler.send_response(206 if wanted or capped else 200)
        sent = body[start:][:capped]
        if (wanted or capped) and label:
            handler.send_header("Content-Range", f"bytes {start}-{start + len(sent) - 1}/{len(body)}")
        if chunked:
            handler.send_header("Transfer-Encoding", "chunked")
            sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(sent), sent)
        elif length:
            handler.send_header("Content-Length", str(len(sent)))
        handler.end_headers()
        handler.wfile.write(sent[:upto])
        handler.wfile.flush()
        if stall:
            over.wait(30)

    return act


def refuses(code, to=None):
    """An act: answer with that status; `to` is where a redirection leads."""

    def act(handler, body, over):
        handler.send_response(code)
        if to:
            handler.send_header("Location", to)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return act


@contextlib.contextmanager
def serving(body: bytes, *acts, name="file.bin"):
    """Serve `body` at /NAME: request n meets act n, further ones the last; without acts, all goes well."""
    over, acts = threading.Event(), acts or (sends(),)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            mirror.asked.append(self.headers["Range"])
            act = acts[min(len(mirror.asked), len(acts)) - 1]
            with contextlib.suppress(ConnectionError):  # the client had enough
                act(self, body, over)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        mirror = Mirror(f"http://127.0.0.1:{server.server_address[1]}/{name}")
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        try:
            yield mirror
        finally:
            over.set()
            server.shutdown()


def nobody() -> str:
    """An address where nothing listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return f"http://127.0.0.1:{server.server_address[1]}/file.bin"
