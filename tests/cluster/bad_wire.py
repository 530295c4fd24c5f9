"""Pass frames between two TAP devices, late, and lose some: python bad_wire.py ONE OTHER DELAY LOSS."""

import asyncio
import fcntl
import os
import random
import struct
import sys
from contextlib import suppress

_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI = 0x0002 | 0x1000


def opened(name: str) -> int:
    """Return the open end of a TAP device."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP_NO_PI))
    return device


async def serve(names: list[str], delay: float, loss: float) -> None:
    """Pass frames for ever."""
    loop, chance = asyncio.get_running_loop(), random.Random(0)
    one, other = map(opened, names)

    def send(device: int, frame: bytes) -> None:
        with suppress(BlockingIOError):  # a full queue loses frames
            os.write(device, frame)

    def receive(source: int, target: int) -> None:
        frame = os.read(source, 65536)
        if chance.random() >= loss:
            loop.call_later(delay, send, target, frame)

    loop.add_reader(one, receive, one, other)
    loop.add_reader(other, receive, other, one)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1:3], *map(float, sys.argv[3:5])))
