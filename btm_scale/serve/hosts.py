"""Which hosts are this machine, and through which proxy and with which header the others are asked."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from btm_scale.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether a host name or address reaches this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def proxy_of(url: str) -> str | None:
    """Return the proxy that the environment names for a URL; requests to this machine need none.

    Raises ConfigError if it is not an HTTP proxy.
    """
    parts = urlsplit(url)
    if is_loopback(parts.hostname or "") or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy:
        return None
    scheme, separator, _ = proxy.partition("://")
    if separator and scheme not in ("http", "https"):
        raise ConfigError(
            f"The environment names a {scheme} proxy for {parts.hostname}, but only HTTP proxies are supported. "
            f"Add {parts.hostname} to NO_PROXY."
        )
    return proxy if separator else f"http://{proxy}"


def is_header_text(key: str) -> bool:
    """Whether an HTTP header may have this key: clients encode other characters in different ways, or refuse them."""
    return key.isascii() and key.isprintable()


def authorization(key: str, source: str) -> dict[str, str]:
    """Return the header of an API key. Raises ConfigError, which names the key's source, if no header can have it."""
    if not (key := key.strip()):
        raise ConfigError(f"{source} is not set. Set it to the API key.")
    if not is_header_text(key):
        raise ConfigError(f"{source} has characters that no HTTP header may have. Set it to the API key.")
    return {"Authorization": f"Bearer {key}"}
