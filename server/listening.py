"""Addresses and certificate of the server: checked before any bundle is opened, so that a mistake is reported at once."""

import contextlib
import errno
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

from server.errors import Misconfigured
from server.settings import HttpSettings, Settings

HOST, OPS_HOST = "UNETPP_HTTP__HOST", "UNETPP_HTTP__OPS_HOST"

Address = tuple[int, tuple[Any, ...]]


@contextlib.contextmanager
def bound(settings: Settings) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    """Binds the sockets of the public port and of the ops port (none if it has no port), and closes them at the end.

    They are bound, so that a port in use is reported before bundles are read, and do not listen yet, so that
    clients are refused instead of waiting.

    Raises:
        Misconfigured: a port is taken, an address is not one of this machine, or one beyond loopback would be
            open to all.
    """
    http = settings.http
    is_guarded = settings.auth.keys_file is not None or settings.auth.insecure
    check_certificate(http)
    if http.ops_port == http.port:
        raise Misconfigured(
            f"UNETPP_HTTP__PORT and UNETPP_HTTP__OPS_PORT are both {http.port}; they must differ",
            setting="UNETPP_HTTP__OPS_PORT",
            value=http.ops_port,
        )
    with contextlib.ExitStack() as stack:
        sockets = bind(http.host, http.port, HOST, is_guarded, stack)
        ops_sockets = (
            [] if http.ops_port is None else bind(http.ops_host, http.ops_port, OPS_HOST, is_guarded, stack)
        )
        yield sockets, ops_sockets


def check_certificate(http: HttpSettings) -> None:
    """Loads the certificate and its key, if there are any.

    Raises:
        Misconfigured: one is set without the other, or they cannot be used.
    """
    cert, key = http.tls_cert, http.tls_key
    if cert is None and key is None:
        return
    if cert is None or key is None:
        missing = "UNETPP_HTTP__TLS_CERT" if cert is None else "UNETPP_HTTP__TLS_KEY"
        raise Misconfigured(
            f"{missing} is not set; set UNETPP_HTTP__TLS_CERT and UNETPP_HTTP__TLS_KEY, or neither",
            setting=missing,
        )
    for setting, path in (("UNETPP_HTTP__TLS_CERT", cert), ("UNETPP_HTTP__TLS_KEY", key)):
        if not path.is_file():
            raise Misconfigured(f"{setting}={path} is not a file", setting=setting, value=str(path))
    try:
        # Without a password OpenSSL would ask the terminal for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=" ")  # noqa: S106 - of no key
    except OSError as error:
        raise Misconfigured(
            f"the certificate {cert} and the key {key} cannot be used: both must be PEM and readable, belong to each other, and the "
            f"key must have no passphrase ({error.strerror or type(error).__name__})",
            setting="UNETPP_HTTP__TLS_CERT",
            value=str(cert),
        ) from error


def bind(
    host: str,
    port: int,
    setting: str,
    is_guarded: bool,
    stack: contextlib.ExitStack,
    resolve: Callable[[str, int], list[Address]] | None = None,
) -> list[socket.socket]:
    """Binds a socket for each address of a host name.

    Args:
        host: name or address; "" means all addresses.
        port: TCP port.
        setting: name of the setting that holds the host.
        is_guarded: whether keys are needed, or the operator accepts that they are not.
        stack: closes the sockets.
        resolve: function that returns the addresses of a host; by default the system's resolver.

    Raises:
        Misconfigured: names the setting.
    """
    try:
        addresses = (resolve or _resolve)(host, port)
    except OSError as error:
        raise _not_here(setting, host, f": {error.strerror}") from error
    if not is_guarded and not all(_is_loopback(str(address[0])) for _, address in addresses):
        raise Misconfigured(
            f"{setting}={host} is reached from other machines, and no key is needed; make keys (unetpp key NAME) and set "
            "UNETPP_AUTH__KEYS_FILE, or start with --insecure (UNETPP_AUTH__INSECURE=true) if everyone who reaches the port may "
            "use it",
            setting=setting,
            value=host,
            remedy="UNETPP_AUTH__KEYS_FILE",
        )
    sockets = []
    for family, address in addresses:
        try:
            sockets.append(stack.enter_context(_bind_one(family, address)))
        except OSError as error:
            # A name may have an IPv6 address where the machine has no IPv6.
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(addresses) > 1:
                continue
            is_taken = error.errno == errno.EADDRINUSE
            reason = "is taken by another program" if is_taken else f"cannot be bound: {error.strerror}"
            raise Misconfigured(
                f"port {port} of {host or 'all addresses'} {reason}; choose another one",
                setting=setting.replace("HOST", "PORT"),
                value=port,
            ) from error
    if not sockets:
        raise _not_here(setting, host)
    return sockets


def _not_here(setting: str, host: str, reason: str = "") -> Misconfigured:
    return Misconfigured(
        f"{setting}={host} is not an address of this machine{reason}", setting=setting, value=host
    )


def _resolve(host: str, port: int) -> list[Address]:
    rows = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in rows))


def _bind_one(family: int, address: tuple[Any, ...]) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        # So that the port of a server that has just ended is free.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # Because IPv4 has a socket of its own.
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except BaseException:
        made.close()
        raise
    return made


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
