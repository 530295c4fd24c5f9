"""Tells Ray that EC2 is about to take this spot instance away.

EC2 writes the notice into the instance's metadata two minutes ahead. Ray does not look there. Told by
`ray drain-node`, it gives the deadline to every rank of the run (`ray.train.get_preemption_info()`), which
saves a checkpoint and goes on elsewhere. Started on each worker by aws.yaml; needs Python and Ray alone.
"""

from __future__ import annotations

import argparse
import http.client
import subprocess
import time

METADATA_HOST = "169.254.169.254"  # the same on every instance
TOKEN_SECONDS = 300
# Of EC2's 120 s: what is left for the run, when the interval of asking and the start of `ray` are taken off.
DEADLINE_SECONDS = 100


def notice(host: str, timeout_seconds: float = 2.0) -> str | None:
    """Return what EC2 says of this instance's end, or None while it says nothing."""
    connection = http.client.HTTPConnection(host, timeout=timeout_seconds)
    try:
        connection.request(
            "PUT", "/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
        )
        token = connection.getresponse().read().decode()
        connection.request(
            "GET", "/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
        )
        response = connection.getresponse()
        body = response.read().decode()
        return body if response.status == http.client.OK else None
    except (OSError, http.client.HTTPException):
        return None  # the metadata service has hiccups; the next question comes soon
    finally:
        connection.close()


def drain_command(said: str) -> list[str]:
    """Return the command that drains the node on which it runs."""
    return [
        "ray",
        "drain-node",
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        f"EC2 spot notice: {said}",
        "--deadline-remaining-seconds",
        str(DEADLINE_SECONDS),
    ]


def main() -> int:
    """Wait for the notice, hand it on once, and end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default=METADATA_HOST)
    parser.add_argument("--interval-seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    while (said := notice(arguments.host)) is None:
        time.sleep(arguments.interval_seconds)
    return subprocess.run(drain_command(said), check=False).returncode  # noqa: S603 (no shell, fixed words)


if __name__ == "__main__":
    raise SystemExit(main())
