"""A folder served as a model repository of the Hub, by the few answers that diffusers asks for."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY_ID = "somebody/model"
COMMIT = "a" * 40


@contextmanager
def fake_hub(folder):
    """Serve a folder as REPOSITORY_ID; gives the address for HF_ENDPOINT."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.split("?")[0]
            name = path.partition(f"/{REPOSITORY_ID}/resolve/")[2].partition("/")[2]
            if path.startswith("/api/models/") and "/tree/" in path:
                tree = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": COMMIT}
                    for name, path in files.items()
                ]
                self.send(json.dumps(tree).encode())
            elif path.startswith("/api/models/"):
                siblings = [{"rfilename": name} for name in files]
                about = {"id": REPOSITORY_ID, "sha": COMMIT, "siblings": siblings}
                self.send(json.dumps(about).encode())
            elif name in files:
                self.send(files[name].read_bytes())
            else:
                self.send(b"", 404)

        def send(self, body, status=200):
            self.send_response(status)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
