"""Which addresses the server listens on, whether it may, and with which certificate: settled before minutes of warming up."""

import contextlib
import errno
import ipaddress
import socket
import ssl
from collections.abc import Iterator

from server.errors import Misconfigured
from server.settings import HttpSettings, Settings


@contextlib.contextmanager
def bound(settings: Settings) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    """The sockets of the port for all and of the ops port, none where there is none; closed in the end.

    They are bound, so that nobody else gets the ports, and do not listen yet, so that callers are refused and do not wait.

    Raises:
        Misconfigured: a port is taken, an address not ours, or one beyond loopback is open to all without that being asked for.
    """
    http, guarded = settings.http, settings.auth.keys_file is not None or settings.auth.insecure
    check_certificate(http)
    if http.ops_port == http.port:
        raise Misconfigured("UNETPP_HTTP__PORT and UNETPP_HTTP__OPS_PORT must differ")
    with contextlib.ExitStack() as opened:
        main = _bind(http.host, http.port, "HTTP__HOST", guarded, opened)
        ops = [] if http.ops_port is None else _bind(http.ops_host, http.ops_port, "HTTP__OPS_HOST", guarded, opened)
        yield main, ops


def check_certificate(http: HttpSettings) -> None:
    """Loads certificate and key, if there are.

    Raises:
        Misconfigured: one without the other, or they cannot be used.
    """
    if http.tls_cert is None and http.tls_key is None:
        return
    if http.tls_cert is None or http.tls_key is None:
        raise Misconfigured("UNETPP_HTTP__TLS_CERT and UNETPP_HTTP__TLS_KEY come together; set both, or none")
    for path in (http.tls_cert, http.tls_key):
        if not path.is_file():
            raise Misconfigured(f"there is no file {path}; see UNETPP_HTTP__TLS_CERT and UNETPP_HTTP__TLS_KEY")
    try:
        # Without a word as password OpenSSL would ask the terminal for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(http.tls_cert, http.tls_key, password=" ")  # noqa: S106 - of no key
    except OSError as error:
        raise Misconfigured(
            f"the certificate {http.tls_cert} and the key {http.tls_key} cannot be used: both must be PEM, readable, belong to each "
            f"other, and the key have no passphrase ({error.strerror or type(error).__name__})"
        ) from error


def _bind(host: str, port: int, setting: str, guarded: bool, opened: contextlib.ExitStack) -> list[socket.socket]:
    """A socket for each address of a name."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise Misconfigured(f"UNETPP_{setting}={host} is no address of this machine: {error.strerror}") from error
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    if not guarded and not all(_is_loopback(str(address[0])) for _, address in addresses):
        raise Misconfigured(
            f"UNETPP_{setting}={host} is reached from other machines, and nobody needs a key: make keys (unetpp key NAME) and set "
            "UNETPP_AUTH__KEYS_FILE, or say --insecure (UNETPP_AUTH__INSECURE=true) if whoever reaches the port may use it"
        )
    sockets = []
    for family, address in addresses:
        try:
            sockets.append(opened.enter_context(_bind_one(family, address)))
        except OSError as error:
            # A name may have an IPv6 address where the machine has no IPv6.
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(addresses) > 1:
                continue
            why = "is taken by another program" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror}"
            raise Misconfigured(f"port {port} of {host or 'all addresses'} {why}; choose another one") from error
    if not sockets:
        raise Misconfigured(f"UNETPP_{setting}={host} is no address of this machine")
    return sockets


def _bind_one(family: int, address: tuple[object, ...]) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A port whose last server has just ended is free.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # IPv4 has a socket of its own.
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except BaseException:
        made.close()
        raise
    return made


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
