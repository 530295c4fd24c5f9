"""Which interface joins a node to the others."""

import fcntl
import os
import socket
import struct
import sys

import pytest

from jebm.on_ray.meeting import interface_of, use_interface_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the addresses of interfaces")


def addresses() -> dict[str, str]:
    """Return the first IPv4 address of each interface that has one, as the kernel says."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def test_each_interface_is_found_by_its_address() -> None:
    assert addresses()["lo"] == "127.0.0.1"
    assert {name: interface_of(address) for name, address in addresses().items()} == {
        name: name for name in addresses()
    }


@pytest.mark.parametrize("address", ["127.0.1.1", "127.255.0.9", "::1"])
def test_loopback_has_more_addresses_than_its_interface_names(address: str) -> None:
    assert interface_of(address) == "lo"


@pytest.mark.parametrize("address", ["203.0.113.7", "2001:db8::7"])
def test_an_address_that_this_machine_does_not_carry_has_no_interface(address: str) -> None:
    assert interface_of(address) is None


def test_gloo_and_nccl_are_told_unless_somebody_has_told_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)
    use_interface_of("203.0.113.7")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    use_interface_of("127.0.1.1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "ib0")
