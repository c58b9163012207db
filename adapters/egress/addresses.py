"""Which addresses are public.

Own tables, from the IANA special-purpose registries: `ipaddress.is_global` calls public what leads back inside
(6to4, NAT64, site-local, multicast), and differs between Python versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Network = IPv4Network | IPv6Network

_IPV4_DENIED = [
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared, behind a carrier's NAT
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # a cloud's host agent, reachable from every guest
        "169.254.0.0/16",  # link-local, instance metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
]
# Everything outside is denied: loopback, mapped and embedded IPv4, NAT64 64:ff9b::/96, discard, segment routing,
# unique local, link-local, site-local fec0::/10, multicast.
_IPV6_GLOBAL_UNICAST = IPv6Network("2000::/3")
_IPV6_DENIED = [
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarks
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: carries any IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
]

EVERYWHERE: tuple[Network, ...] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether anybody on the internet could reach the address."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _IPV4_DENIED)
    if address.scope_id is not None or address not in _IPV6_GLOBAL_UNICAST:
        return False
    return not any(address in network for network in _IPV6_DENIED)


class AddressPolicy:
    """Public addresses, and those that the operator opened."""

    def __init__(self, allow: Sequence[Network | str] = ()) -> None:
        self._allow = [ip_network(network) for network in allow]

    def permits(self, address: str) -> bool:
        """Whether a connection to `address`, in canonical notation, may be made."""
        try:
            parsed = ip_address(address)
        except ValueError:
            return False
        return is_public(parsed) or any(parsed in network for network in self._allow)
