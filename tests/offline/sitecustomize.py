"""Refuses every network address but loopback, in each Python process that has this folder on PYTHONPATH.

Python imports a module of this name at start-up: test processes, notebook kernels and their children are all covered.
"""

import ipaddress
import sys


class NetworkRefused(OSError):
    """A test or a notebook wanted to leave this machine."""


def is_here(host) -> bool:
    """Loopback by number or name; '' and None are this machine too."""
    host = host.decode() if isinstance(host, bytes) else host
    try:
        return host in (None, "", "localhost") or ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def refuse(event: str, args: tuple) -> None:
    """An audit hook: asked by Python itself before any connection, datagram or look-up of a name."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        host = address[0] if isinstance(address, tuple) else None  # a Unix socket's address is a path
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    else:
        return
    if not is_here(host) and host not in ("0.0.0.0", "::"):
        raise NetworkRefused(f"no network in tests: {event} to {host!r}")


if not getattr(sys, "offline", False):  # once a process: a hook cannot be taken away again
    sys.offline = True
    sys.addaudithook(refuse)
