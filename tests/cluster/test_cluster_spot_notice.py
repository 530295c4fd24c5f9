"""The watcher of spot notices, against a metadata service of ours and a `ray` that notes what it is told."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.scripts import scripts

SCRIPT = Path(__file__).parents[2] / "cluster/spot_notice.py"
NOTICE = '{"action": "terminate", "time": "2030-01-01T00:00:00Z"}'


class Metadata(http.server.BaseHTTPRequestHandler):
    """EC2's metadata service, of which the first answers are: nothing to say."""

    refusals_left = 2

    def do_PUT(self) -> None:
        asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200 if asked else 400, "session")

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != "session":
            self.answer(401, "")
        elif type(self).refusals_left:
            type(self).refusals_left -= 1
            self.answer(404, "Not Found")
        else:
            self.answer(200, NOTICE)

    def answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Metadata, "refusals_left", 2)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_notice_drains_the_node_once(metadata_host: str, tmp_path: Path) -> None:
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/told\n')
    ray.chmod(0o755)
    command = [sys.executable, str(SCRIPT), "--host", metadata_host, "--interval-seconds", "0.01"]
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(command, check=True, timeout=300, env=environment)

    drain, *arguments = (tmp_path / "told").read_text().splitlines()
    assert drain == "drain-node"
    with scripts.drain_node.make_context(drain, arguments) as context:
        assert context.params["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
        assert NOTICE in context.params["reason_message"]
        assert context.params["node_id"] is None  # the node on which it runs
        assert 0 < context.params["deadline_remaining_seconds"] < 120


def test_waits_while_the_metadata_service_is_away(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--host", "127.0.0.1:9", "--interval-seconds", "0.01"]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(command, check=True, timeout=0.5)
