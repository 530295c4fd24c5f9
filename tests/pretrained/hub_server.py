"""A small stand-in of the hub's HTTP API: creating, LFS upload, commits, listing, download. No xet."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_this_test"


class Hub:
    """Repositories by name, each a dict of files; blobs by sha256; what was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.uri = ""

    def sha(self, name: str) -> str:
        """Return the commit of a repository: a hash of its content."""
        files = sorted(self.repositories[name].items())
        return hashlib.sha1(repr(files).encode(), usedforsecurity=False).hexdigest()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body."""
        if method == "POST" and path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = name in self.repositories
            self.repositories.setdefault(name, {})
            hidden = asked.get("private", asked.get("visibility") == "private")
            self.private.setdefault(name, bool(hidden))
            return 409 if known else 200, {}, json.dumps({"url": f"{self.uri}/{name}"}).encode()
        if path == "/api/validate-yaml":
            return 200, {}, b'{"errors": [], "warnings": []}'
        if method == "PUT" and (found := re.fullmatch(r"/blobs/(\w+)", path)):
            self.blobs[found[1]] = body
            return 200, {}, b""
        name = next((each for each in self.repositories if f"/{each}" in path), None)
        if name is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        return self.of_repository(name, path.partition(f"/{name}")[2].partition("?")[0], body)

    def of_repository(self, name: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Answer what concerns one repository."""
        files = self.repositories[name]
        if path.startswith("/preupload/"):
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            return 200, {}, json.dumps({"files": modes}).encode()
        if path == ".git/info/lfs/objects/batch":
            objects = [
                each | {"actions": {"upload": {"href": f"{self.uri}/blobs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {}, json.dumps({"transfer": "basic", "objects": objects}).encode()
        if path.startswith("/commit/"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
            facts = {"success": True, "commitOid": self.sha(name), "commitUrl": f"{self.uri}/{name}/commit/x"}
            return 200, {}, json.dumps(facts).encode()
        if found := re.fullmatch(r"/resolve/[^/]+/(.+)", path):
            if found[1] not in files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            content = files[found[1]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return 200, {"ETag": etag, "X-Repo-Commit": self.sha(name)}, content
        if path.startswith("/tree/"):
            tree = [
                {
                    "type": "file",
                    "path": each,
                    "size": len(content),
                    "oid": hashlib.sha256(content).hexdigest(),
                }
                for each, content in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        if path not in ("", "/revision/main", f"/revision/{self.sha(name)}"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        facts = {
            "id": name,
            "sha": self.sha(name),
            "private": self.private[name],
            "siblings": [{"rfilename": each} for each in files],
        }
        return 200, {}, json.dumps(facts).encode()


@contextmanager
def served() -> Iterator[Hub]:
    """Yield a hub that listens on loopback, for those who bring `TOKEN`."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self.chunk, b""))
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.path.startswith(
                "/blobs/"
            )
            status, headers, content = (
                hub.answer(self.command, self.path, body) if allowed else (401, {}, b'{"error": "no access"}')
            )
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = reply

        def chunk(self) -> bytes:
            size = int(self.rfile.readline(), 16)
            content = self.rfile.read(size)
            self.rfile.readline()
            return content

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.uri = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
