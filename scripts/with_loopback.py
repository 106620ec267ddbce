"""Turn this network namespace's loopback on, then become the command that follows.

Ranks meet on 127.0.0.1. A machine cut off by ``unshare -n`` has no loopback until somebody turns it
on; ``selfcheck.sh`` does that in a namespace of its own, so that nothing of the machine changes.
"""

import fcntl
import os
import socket
import struct
import sys

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1


def turn_on(interface: bytes = b"lo") -> None:
    """Set an interface's flag ``UP``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", interface, 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(control, SIOCGIFFLAGS, request), 16)
        request = struct.pack("16sh14x", interface, flags | IFF_UP)
        fcntl.ioctl(control, SIOCSIFFLAGS, request)


if __name__ == "__main__":
    turn_on()
    os.execvp(sys.argv[1], sys.argv[1:])
