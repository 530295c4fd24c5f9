"""Hosts for tests: namespaces of one machine, each with an address, a name and Debian's /etc/hosts.

Each host is one `unshare`d process and what runs below it; when that process is killed, all of it is gone,
its interface as well.
"""

import ctypes
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Host", "forwarded", "lan", "why_not"]

_SPACES = "--net --mount --uts --pid --fork --mount-proc"
_CLONE_NEWNET = 0x40000000
_DEBIAN_HOSTS = """127.0.0.1\tlocalhost
127.0.1.1\t{name}

# The following lines are desirable for IPv6 capable hosts
::1     localhost ip6-localhost ip6-loopback
ff02::1 ip6-allnodes
ff02::2 ip6-allrouters
"""


@dataclass(frozen=True)
class Host:
    """A machine of the test's network, with a home and a /tmp/ray of its own."""

    name: str
    address: str
    pid: int
    """Of its first process, as this machine counts."""
    home: Path

    def shell(self, command: str, environment: dict[str, str], *, cwd: Path) -> "subprocess.Popen[str]":
        """Start a line of bash on this host; stdout and stderr come together."""
        return subprocess.Popen(
            [*_enter(self.pid), "bash", "-c", f"cd {shlex.quote(str(cwd))} && {command}"],
            env=environment | {"HOME": str(self.home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str, environment: dict[str, str], *, cwd: Path, timeout: float = 180) -> str:
        """Run a line of bash on this host, and return what it prints."""
        with self.shell(command, environment, cwd=cwd) as process:
            output, _ = process.communicate(timeout=timeout)
        assert process.returncode == 0, output
        return output


def why_not() -> str | None:
    """Return why this machine cannot give such hosts; None if it can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    tried = subprocess.run(
        f"unshare {_SPACES} ip link add name br0 type bridge".split(),
        capture_output=True,
        text=True,
        check=False,
    )
    return None if tried.returncode == 0 else f"the kernel gives no namespaces: {tried.stderr.strip()}"


@contextmanager
def lan(folder: Path, addresses: dict[str, str]) -> Iterator[dict[str, Host]]:
    """Give hosts by name, joined by a switch; each has one interface, eth0, and a route to nowhere."""
    with ExitStack() as stack:
        switch = stack.enter_context(_namespaces())
        _run([*_enter(switch), *["ip", "link", "add", "name", "br0", "type", "bridge"]])
        _run([*_enter(switch), *["ip", "link", "set", "br0", "up"]])
        hosts = {}
        for number, (name, address) in enumerate(addresses.items()):
            first = stack.enter_context(_namespaces())
            home = folder / name
            home.mkdir(parents=True)
            (home / "hosts").write_text(_DEBIAN_HOSTS.format(name=name))
            (home / "resolv.conf").touch()
            cable = f"port{number}"
            lines = [
                f"hostname {name}",
                f"mount --bind {shlex.quote(str(home / 'hosts'))} /etc/hosts",
                f"mount --bind {shlex.quote(str(home / 'resolv.conf'))} /etc/resolv.conf",
                "mkdir -p /tmp/ray",
                "mount -t tmpfs tmpfs /tmp/ray",
                "ip link set lo up",
                f"ip address add {address}/24 dev eth0",
                "ip link set eth0 up",
                f"ip route add default via {address.rpartition('.')[0]}.1",
            ]
            _run(f"ip link add {cable} netns {switch} type veth peer name eth0 netns {first}".split())
            _run([*_enter(first), "bash", "-ec", "\n".join(lines)])
            _run([*_enter(switch), *f"ip link set {cable} master br0 up".split()])
            hosts[name] = Host(name, address, first, home)
        yield hosts


@contextmanager
def forwarded(host: Host, port: int) -> Iterator[int]:
    """Let a host listen on a port for a server on 127.0.0.1 of this machine; give that port."""
    with _server_in(host) as server:
        command = [
            sys.executable,
            str(Path(__file__).with_name("forward.py")),
            str(server.fileno()),
            str(port),
        ]
        forwarder = subprocess.Popen(command, pass_fds=[server.fileno()])
        try:
            yield server.getsockname()[1]
        finally:
            forwarder.kill()
            forwarder.wait()


@contextmanager
def _namespaces() -> Iterator[int]:
    """Start the first process of a host; give its pid."""
    command = f"unshare {_SPACES} --kill-child sleep infinity".split()
    unshare = subprocess.Popen(command, start_new_session=True)
    try:
        children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
        while not (found := children.read_text().split()):
            assert unshare.poll() is None
            time.sleep(0.01)
        # It sleeps only once it has its own /proc.
        while Path(f"/proc/{found[0]}/comm").read_text().strip() != "sleep":
            time.sleep(0.01)
        yield int(found[0])
    finally:
        unshare.kill()  # and with it the host
        unshare.wait()


def _enter(pid: int) -> list[str]:
    return ["nsenter", f"--target={pid}", "--net", "--mount", "--uts", "--pid"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


def _server_in(host: Host) -> socket.socket:
    """Return a socket of this process that listens in the network of a host."""
    libc = ctypes.CDLL(None, use_errno=True)
    here_path, there_path = Path("/proc/thread-self/ns/net"), Path(f"/proc/{host.pid}/ns/net")
    with here_path.open() as here, there_path.open() as there:
        try:
            assert libc.setns(there.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            return socket.create_server((host.address, 0))
        finally:
            assert libc.setns(here.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
