"""Which hosts and addresses images may be downloaded from. Used by fetch.py only; no I/O but the wrapped resolver's.

Without a list, only public addresses; with one, only its hosts, wherever they are. The addresses that the resolver
hands on are the ones that get connected to, so a name cannot be checked as one address and used as another."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection

from aiohttp.abc import AbstractResolver, ResolveResult

_6TO4 = ipaddress.IPv6Network("2002::/16")


class AddressRefused(OSError):
    """An OSError, so that aiohttp passes it on from the resolver as any failed lookup. Its text is for the client."""


class AddressGuard:
    def __init__(self, allowed_domains: Collection[str] | None = None) -> None:
        """None or empty: there is no list."""
        self._allowed = {_normal_host(host) for host in allowed_domains or ()}

    def check_host(self, host: str) -> None:
        """`host` as in the URL, without brackets. Also the only check of literal addresses: aiohttp looks none of
        those up. Raises AddressRefused."""
        if self._allowed:
            if _normal_host(host) not in self._allowed:
                raise AddressRefused("images may not be downloaded from this host")
        elif _looks_numeric(host) and not is_public(host):
            raise AddressRefused("images may only be downloaded from public addresses")

    def permitted(self, host: str, results: list[ResolveResult]) -> list[ResolveResult]:
        """Those of a name's addresses that may be connected to; raises AddressRefused if there is none."""
        self.check_host(host)
        if self._allowed:
            return results
        public = [result for result in results if is_public(result["host"])]
        if results and not public:
            raise AddressRefused("images may only be downloaded from public addresses")
        return public


class GuardedResolver(AbstractResolver):
    def __init__(self, inner: AbstractResolver, guard: AddressGuard) -> None:
        self._inner = inner
        self._guard = guard

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return self._guard.permitted(host, await self._inner.resolve(host, port, family))

    async def close(self) -> None:
        await self._inner.close()


def is_public(text: str) -> bool:
    """Whether this is the literal address of a host on the public internet. Anything odd is not: IPv4 inside IPv6 in
    any form, scope ids, short or octal IPv4."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and (address.scope_id or address.is_site_local or address in _6TO4):
        return False
    # Reserved holds all of ::/8, and with it IPv4-mapped and -compatible addresses and NAT64; private holds Teredo.
    refused = address.is_private or address.is_loopback or address.is_link_local or address.is_multicast
    return address.is_global and not (refused or address.is_reserved or address.is_unspecified)


def _looks_numeric(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()


def _normal_host(host: str) -> str:
    host = host.strip().strip("[]").rstrip(".").lower()
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return host
