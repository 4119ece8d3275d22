"""Checks of the settings and of what a start needs beside the bundles: ports, keys, certificate."""

import contextlib
import errno
import http.client
import ssl
import stat
from collections.abc import Iterator

from server import listening
from server.api.auth import Keys
from server.cli_utils import parse_settings, refuse_unknown_variables
from server.doctor.context import Context
from server.doctor.redact import changed_settings
from server.doctor.report import Check
from server.errors import Misconfigured, UnetppError

PROBE_TIMEOUT_S = 3.0
SETTINGS_PAGE = "compare with the page Settings of the manual; unset what is not there"


def check_settings(context: Context) -> Iterator[Check]:
    """Reads the settings as a start does."""
    is_complete = True
    try:
        refuse_unknown_variables()
    except Misconfigured as error:
        is_complete = False
        yield Check("settings", "failed", str(error), SETTINGS_PAGE)
    try:
        settings = parse_settings()
    except Misconfigured as error:
        # A misspelt setting of a group makes the group invalid, too, and was reported.
        if is_complete:
            yield Check("settings", "failed", str(error), SETTINGS_PAGE)
        return
    if context.bundles_folder is not None:
        settings = settings.model_copy(update={"bundles": context.bundles_folder})
    context.settings = settings
    changed = context.facts["settings"] = changed_settings(settings)
    if is_complete:
        words = ", ".join(f"{name}={value}" for name, value in changed.items())
        yield Check("settings", "ok", f"differ from the defaults: {words}" if words else "all as by default")


def check_ports(context: Context) -> Iterator[Check]:
    """Binds the ports for a moment, as a start does, and asks a program that holds one whether it is a server of ours."""
    http_settings = context.known_settings.http
    rows = [("port", http_settings.host, http_settings.port, listening.HOST)]
    if http_settings.ops_port is not None:
        rows.append(("ops port", http_settings.ops_host, http_settings.ops_port, listening.OPS_HOST))
    if http_settings.ops_port == http_settings.port:
        text = f"UNETPP_HTTP__PORT and UNETPP_HTTP__OPS_PORT are both {http_settings.port}"
        yield Check("ports", "failed", text, "choose two ports")
        return
    for what, host, port, setting in rows:
        yield _check_port(context, what, host, port, setting)


def _check_port(context: Context, what: str, host: str, port: int, setting: str) -> Check:
    settings = context.known_settings
    is_guarded = settings.auth.keys_file is not None or settings.auth.insecure
    name = f"ports:{what}"
    try:
        with contextlib.ExitStack() as stack:
            listening.bind(host, port, setting, is_guarded, stack)
    except Misconfigured as error:
        is_taken = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
        if is_taken and is_our_server(host, port, tls=settings.http.tls_cert is not None):
            context.is_serving = True
            return Check(name, "ok", f"{port} is in use by a running unetpp server")
        remedy = f"choose another port ({setting.replace('HOST', 'PORT')}), or end the program that uses it"
        return Check(name, "failed", str(error), remedy if is_taken else f"change {setting}, or set keys")
    return Check(name, "ok", f"{port} is free")


def is_our_server(host: str, port: int, *, tls: bool) -> bool:
    """Whether what listens on the port answers as this server does, with or without a key."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    connection: http.client.HTTPConnection
    if tls:
        # The certificate is for the name by which others know the server, and nothing secret is sent.
        context = ssl._create_unverified_context()  # noqa: S323
        connection = http.client.HTTPSConnection(host, port, timeout=PROBE_TIMEOUT_S, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=PROBE_TIMEOUT_S)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health/live")
            body = connection.getresponse().read(4096)
        except (OSError, http.client.HTTPException):
            return False
    # A 401, 404 or 503 is a problem document.
    return body == b'{"live":true}' or b'"urn:unetpp:' in body


def check_keys(context: Context) -> Iterator[Check]:
    """Reads the keys file as a start does."""
    auth = context.known_settings.auth
    if auth.keys_file is None:
        text = "no keys file; " + ("UNETPP_AUTH__INSECURE is set" if auth.insecure else "loopback only")
        yield Check("keys", "not_checked", text)
        return
    try:
        count = len(Keys(auth.keys_file))
        mode = stat.S_IMODE(auth.keys_file.stat().st_mode)
    except (UnetppError, OSError) as error:
        yield Check(
            "keys", "failed", str(error), "write the line that `unetpp key NAME` prints into the file"
        )
        return
    context.facts["keys"] = {"count": count, "mode": f"{mode:03o}"}
    text = f"{count} key{'s' if count > 1 else ''}, mode {mode:03o}"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield Check(
            "keys", "warning", f"{text}: other users may write keys into it", "chmod go-w on the file"
        )
    else:
        yield Check("keys", "ok", text)


def check_tls(context: Context) -> Iterator[Check]:
    """Loads the certificate and its key as a start does."""
    http_settings = context.known_settings.http
    try:
        listening.check_certificate(http_settings)
    except Misconfigured as error:
        yield Check(
            "tls", "failed", str(error), "set both files, in PEM, readable, and belonging to each other"
        )
        return
    if http_settings.tls_cert is None:
        yield Check("tls", "not_checked", "no certificate; the ports speak HTTP")
    else:
        yield Check("tls", "ok", "certificate and key belong to each other")
