"""How this machine reaches a server: what the environment says of proxies and certificates.

The HTTP library that the hub and the openai package use reads all of these variables when a client is made, and fails
at one that it cannot use without naming it. Here they are looked at before that.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from expo.errors import ExpoError, InputError, MissingExtra
from expo.redact import without_secrets

SCHEMES = ("http", "https", "all")
"""Which requests a variable such as HTTP_PROXY is for."""
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


class Proxy(NamedTuple):
    """A proxy that the environment names."""

    variable: str
    address: str


def proxies() -> dict[str, Proxy]:
    """Scheme → its proxy, as the environment names it; of HTTP_PROXY and http_proxy, the latter wins."""
    found = {}
    for scheme, address in getproxies_environment().items():
        if scheme in SCHEMES:
            names = sorted((name for name in os.environ if name.lower() == f"{scheme}_proxy"), reverse=True)
            variable = next((name for name in names if os.environ[name] == address), names[0])
            found[scheme] = Proxy(variable, address if "://" in address else f"http://{address}")
    return found


def proxy_of(url: str) -> Proxy | None:
    """The proxy that requests to a URL go through; None where they go directly."""
    parts, found = urlsplit(url), proxies()
    proxy = found.get(parts.scheme) or found.get("all")
    return None if proxy is None or proxy_bypass_environment(parts.netloc.rpartition("@")[2]) else proxy


def through(url: str) -> str:
    """For a message about a server that does not answer: the proxy in between, if there is one."""
    proxy = proxy_of(url)
    return "" if proxy is None else f" through the proxy of {proxy.variable} ({without_secrets(proxy.address)})"


def advice(url: str, cause: str) -> str:
    """What to do where no server answers."""
    proxy, host = proxy_of(url), urlsplit(url).hostname
    if "CERTIFICATE_VERIFY_FAILED" in cause:
        others = [name for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") if os.environ.get(name)]
        unread = f" ({' and '.join(others)} {'is' if len(others) == 1 else 'are'} not read)" if others else ""
        return f"set SSL_CERT_FILE to the file of the certificates to trust{unread}, or correct --base-url"
    if proxy is None:
        return "start it, or correct --base-url"
    listed = next((name for name in ("no_proxy", "NO_PROXY") if os.environ.get(name)), None)
    direct = f"add {host} to {listed}" if listed else f"set NO_PROXY={host}"
    return f"{direct} to reach it directly, or correct {proxy.variable} or --base-url"


def require_usable(url: str, *, all_proxies: bool = False) -> None:
    """Refuse variables that the HTTP library cannot use.

    Args:
        url: The server's URL.
        all_proxies: Refuse also proxies that requests to this URL do not go through.

    Raises:
        InputError: A proxy's address, or a file of certificates, is unusable; the message names the variable.
        MissingExtra: A proxy needs a package that is not installed.
    """
    _require_certificates(url)
    used = proxy_of(url)
    for proxy in proxies().values() if all_proxies else [used] if used else []:
        problem = _problem(proxy)
        if problem is not None:
            raise problem


def _problem(proxy: Proxy) -> ExpoError | None:
    given = f"{proxy.variable}={without_secrets(proxy.address)} cannot be used"
    parts = urlsplit(proxy.address)
    if parts.scheme not in PROXY_SCHEMES:
        return InputError(f"{given}: a proxy's address begins with http://, https:// or socks5://; correct or unset it")
    try:
        _ = parts.port
    except ValueError:
        return InputError(f"{given}: its port is not a number; correct or unset it")
    if parts.scheme.startswith("socks") and find_spec("socksio") is None:
        return MissingExtra(f"{given}: SOCKS needs the socksio package: pip install socksio, or unset it")
    return None


def _require_certificates(url: str) -> None:
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file:
        if not Path(file).is_file():
            raise InputError(f"SSL_CERT_FILE is not a file: {file}; correct or unset it")
        try:
            ssl.create_default_context(cafile=file)
        except OSError as error:
            reason = "it contains no certificates" if isinstance(error, ssl.SSLError) else error.strerror
            raise InputError(f"SSL_CERT_FILE={file} cannot be used: {reason}; correct or unset it") from error
    elif folder and url.startswith("https:") and not any(Path(part).is_dir() for part in folder.split(os.pathsep)):
        raise InputError(f"SSL_CERT_DIR is not a folder: {folder}; correct or unset it")


@contextmanager
def without_unusable_proxies() -> Iterator[None]:
    """Hide proxies that cannot be used, and are not needed, from a client while it is made: it would fail at them."""
    hidden = [name for proxy in proxies().values() if _problem(proxy) for name in os.environ if _same(name, proxy)]
    values = {name: os.environ.pop(name) for name in hidden}
    try:
        yield
    finally:
        os.environ.update(values)


def _same(name: str, proxy: Proxy) -> bool:
    return name.lower() == proxy.variable.lower()
