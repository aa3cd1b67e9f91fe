"""Which hosts are this machine, and through which proxy the others are reached."""

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
