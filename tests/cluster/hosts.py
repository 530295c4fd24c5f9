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

__all__ = ["Host", "Lan", "forwarded", "lan", "why_not"]

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

    @contextmanager
    def shell(
        self, command: str, environment: dict[str, str], *, cwd: Path
    ) -> "Iterator[subprocess.Popen[str]]":
        """Start a line of bash on this host, stdout and stderr together; it ends with the block."""
        with subprocess.Popen(
            [*_enter(self.pid), *_dies_with_us(["bash", "-c", f"cd {shlex.quote(str(cwd))} && {command}"])],
            env=environment | {"HOME": str(self.home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

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
    lines = [
        "ip link add name br0 type bridge",
        "ip link add name port0 type veth peer name eth0",
        "tc qdisc add dev port0 root tbf rate 1mbit burst 32kb latency 1s",
        "ip tuntap add tap0 mode tap",
        "command -v setpriv nsenter pgrep >&2",
    ]
    try:
        tried = subprocess.run(
            ["unshare", *_SPACES.split(), "bash", "-ec", "\n".join(lines)],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        return str(error)
    return None if tried.returncode == 0 else f"the kernel gives no such networks: {tried.stderr.strip()}"


class Lan:
    """Hosts joined by a switch; each has one interface, eth0, and a route to nowhere."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        """Make the switch; it ends with the stack, as all hosts do."""
        self._stack, self._folder = stack, folder
        self._switch = stack.enter_context(_namespaces())
        self._hosts: dict[str, tuple[ExitStack, str]] = {}  # what ends each, and its port of the switch
        self._ports = 0
        self._on_switch("ip link add name br0 type bridge", "ip link set br0 up")

    def boot(self, name: str, address: str) -> Host:
        """Start a host. What it had in its home is still there, and the same network card."""
        ending = self._stack.enter_context(ExitStack())
        first = ending.enter_context(_namespaces())
        home = self._folder / name
        home.mkdir(parents=True, exist_ok=True)
        (home / "hosts").write_text(_DEBIAN_HOSTS.format(name=name))
        (home / "resolv.conf").touch()
        self._ports += 1
        port = f"port{self._ports}"
        card = "02:00:" + ":".join(f"{int(byte):02x}" for byte in address.split("."))
        _run(f"ip link add {port} netns {self._switch} type veth peer name eth0 netns {first}".split())
        lines = [
            f"hostname {name}",
            f"mount --bind {shlex.quote(str(home / 'hosts'))} /etc/hosts",
            f"mount --bind {shlex.quote(str(home / 'resolv.conf'))} /etc/resolv.conf",
            "mkdir -p /tmp/ray",
            "mount -t tmpfs tmpfs /tmp/ray",
            "ip link set lo up",
            f"ip link set eth0 address {card}",
            f"ip address add {address}/24 dev eth0",
            "ip link set eth0 up",
            f"ip route add default via {address.rpartition('.')[0]}.1",
        ]
        _run([*_enter(first), "bash", "-ec", "\n".join(lines)])
        self._on_switch(f"ip link set {port} master br0 up")
        self._hosts[name] = ending, port
        return Host(name, address, first, home)

    def power_off(self, host: Host) -> None:
        """Kill all that runs on a host, at once; the others' connections end, unless its wire was cut."""
        self._hosts.pop(host.name)[0].close()

    def cut(self, host: Host) -> None:
        """Lose whatever is sent to a host or by it; it keeps its carrier, so nobody notices."""
        self._on_switch(f"ip link set {self._port(host)} nomaster")

    def mend(self, host: Host) -> None:
        """Undo `cut`."""
        self._on_switch(f"ip link set {self._port(host)} master br0")

    def limit(self, host: Host, megabits: int | None) -> None:
        """Let a host receive no more than so many Mbit/s; None: no limit."""
        shape = f"tbf rate {megabits}mbit burst 128kb latency 400ms" if megabits else "pfifo_fast"
        self._on_switch(f"tc qdisc replace dev {self._port(host)} root {shape}")

    @contextmanager
    def bad_wire(self, host: Host, *, delay: float, loss: float) -> Iterator[None]:
        """Delay each frame of a host by so many seconds, each way, and lose this share of them."""
        taps = [f"{end}{self._ports}" for end in ("near", "far")]
        script = Path(__file__).with_name("bad_wire.py")
        self._on_switch(
            *(f"ip tuntap add {tap} mode tap" for tap in taps), "ip link add name br1 type bridge"
        )
        command = [sys.executable, str(script), *taps, str(delay), str(loss)]
        wire = subprocess.Popen(_dies_with_us([*_in_network(self._switch), *command]))
        try:
            self._on_switch(
                "ip link set br1 up",
                f"ip link set {taps[0]} master br1 up",
                f"ip link set {taps[1]} master br0 up",
                f"ip link set {self._port(host)} master br1",
            )
            yield
        finally:
            self.mend(host)
            wire.kill()
            wire.wait()
            self._on_switch(*(f"ip link del {link}" for link in (*taps, "br1")))

    def _port(self, host: Host) -> str:
        return self._hosts[host.name][1]

    def _on_switch(self, *lines: str) -> None:
        _run([*_enter(self._switch), "bash", "-ec", "\n".join(lines)])


@contextmanager
def lan(folder: Path) -> Iterator[Lan]:
    """Give a network without hosts; all that it ever had is gone afterwards."""
    with ExitStack() as stack:
        yield Lan(stack, folder)


@contextmanager
def forwarded(host: Host, address: str, port: int, *, to: Host | None = None) -> Iterator[int]:
    """Let a host listen at an address (port 0: any) for a server on 127.0.0.1, `port` of another host.

    Without `to`, of this machine. Gives the port that it listens at. With 127.0.0.1 it is what `ssh -L` does.
    """
    with _server_in(host, address, port if to else 0) as server:
        script = Path(__file__).with_name("forward.py")
        command = [sys.executable, str(script), str(server.fileno()), str(port)]
        command = [*(_in_network(to.pid) if to else []), *command]
        forwarder = subprocess.Popen(_dies_with_us(command), pass_fds=[server.fileno()])
        try:
            yield server.getsockname()[1]
        finally:
            forwarder.kill()
            forwarder.wait()


@contextmanager
def _namespaces() -> Iterator[int]:
    """Start the first process of a host; give its pid."""
    command = f"unshare {_SPACES} --kill-child sleep infinity".split()
    unshare = subprocess.Popen(_dies_with_us(command), start_new_session=True)
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


def _dies_with_us(command: list[str]) -> list[str]:
    """Return what runs a command until its parent ends."""
    return ["setpriv", "--pdeathsig", "KILL", *command]


def _enter(pid: int) -> list[str]:
    return ["nsenter", f"--target={pid}", "--net", "--mount", "--uts", "--pid"]


def _in_network(pid: int) -> list[str]:
    """Return what runs a command in a host's network only, so that its process is the one that is started."""
    return ["nsenter", f"--target={pid}", "--net"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


def _server_in(host: Host, address: str, port: int) -> socket.socket:
    """Return a socket of this process that listens in the network of a host."""
    libc = ctypes.CDLL(None, use_errno=True)
    here_path, there_path = Path("/proc/thread-self/ns/net"), Path(f"/proc/{host.pid}/ns/net")
    with here_path.open() as here, there_path.open() as there:
        try:
            assert libc.setns(there.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            return socket.create_server((address, port))
        finally:
            assert libc.setns(here.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
