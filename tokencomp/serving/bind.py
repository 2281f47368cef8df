"""Address of a server, and requirements on its clients."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from tokencomp.errors import OptionError

logger = logging.getLogger("tokencomp.serving")


@dataclass(frozen=True)
class Bind:
    """Address of a server, and requirements on its clients.

    `api_key` None accepts all requests. `allowed_hosts` are names besides "localhost" and numeric
    addresses; empty: all, except at a loopback address. Running requests have `shutdown_timeout`
    seconds after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    shutdown_timeout: int = 60

    @property
    def loopback(self) -> bool:
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # another host name, or the empty one, which means all addresses
            return False

    def warn_if_open(self) -> None:
        """Log a warning if other machines can use the server without a key."""
        if not self.api_key and not self.loopback:
            logger.warning(
                "the server listens at %s without an API key: everyone who can reach this address "
                "can use it. Set TOKENCOMP_API_KEY, or use --host 127.0.0.1.",
                self.host or "all addresses",
            )

    def take_port(self) -> socket.socket:
        """Take the port, which refuses connections until a server runs on the socket.

        Raises `OptionError` if it cannot be had.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        result = socket.socket(family)
        result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            result.bind((self.host, self.port))
        except OSError as error:
            result.close()
            where = f"{self.host or 'all addresses'}, port {self.port}"
            raise OptionError(
                f"cannot listen at {where}: {error}. Choose another --port."
            ) from None
        return result

    def accepts(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        # Servers decode headers as Latin-1, whatever the client has encoded.
        sent = token.strip().encode("latin-1", "replace")
        return not self.api_key or (
            scheme.lower() == "bearer" and hmac.compare_digest(sent, self.api_key.encode("utf-8"))
        )

    def refusal(self, header: str) -> str:
        """Return why a request with this Host header is refused, or "".

        Protects against DNS rebinding: a web page that resolves its name to the address of a local
        server could use the server through the browser of a visitor. Numeric addresses are safe.
        """
        try:
            host = urlsplit("//" + header).hostname or ""
        except ValueError:
            host = "?"
        if host in ("", "localhost", self.host, *self.allowed_hosts):
            return ""
        if not self.allowed_hosts and not self.loopback:
            return ""
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return f"Host {host!r} is not a name of this server (start it with --allowed-host)."
        return ""
