"""The other hosts of a run, over the network: by which address and interface they are reached, and which are silent."""

import contextlib
import ipaddress
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import psutil
from torch.distributed import DistError, TCPStore

SIGN_SECONDS = 1.0
"""Between two signs of life of a host."""


@dataclass(frozen=True)
class Route:
    """How this host reaches the meeting point of a run. Addresses, since the hosts' names need not resolve."""

    address: str
    """Of host 0."""
    port: int
    own_address: str
    """By which the other hosts reach this one."""
    interface: str | None
    """The network interface with that address; None where it cannot be told."""

    @property
    def endpoint(self) -> str:
        """ADDRESS:PORT."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def find_route(rendezvous: str, node_rank: int) -> Route:
    """Resolve --rendezvous HOST:PORT on this host.

    Raises:
        ValueError: it is none, or its name is only this host's own in a network of its own.
        OSError: the name is unknown, or there is no way to its address.
    """
    host, colon, port = rendezvous.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"--rendezvous is {rendezvous!r}, not HOST:PORT with a port from 1 to 65535")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)
    except OSError as error:
        raise OSError(
            f"--rendezvous is {rendezvous}, but this host ({socket.gethostname()}) cannot resolve {host!r}: {error}. "
            "Give host 0's address instead of its name"
        ) from error
    # Debian gives a host's own name the address 127.0.1.1, at which no other host finds it
    found.sort(key=lambda entry: ipaddress.ip_address(entry[4][0]).is_loopback)
    family, _, _, _, place = found[0]
    address = str(place[0])
    if ipaddress.ip_address(address).is_loopback and host not in ("localhost", address):
        raise ValueError(
            f"--rendezvous is {rendezvous}, but on this host ({socket.gethostname()}) {host!r} is {address}, which no "
            "other host reaches: give host 0's address instead of its name"
        )
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent: the kernel only chooses the way
        try:
            probe.connect(place)
        except OSError as error:
            raise OSError(
                f"there is no way from this host ({socket.gethostname()}) to --rendezvous {rendezvous}: {error}"
            ) from error
        own_address = str(probe.getsockname()[0])
    if node_rank == 0 and own_address != address:
        raise ValueError(
            f"--rendezvous is {rendezvous}, but this host ({socket.gethostname()}, {own_address}), which has "
            f"--node-rank 0, has not the address {address}: give an address of this host"
        )
    return Route(address, int(port), own_address, _interface_of(own_address))


def _interface_of(address: str) -> str | None:
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        address = "::1" if ":" in address else "127.0.0.1"  # the whole network 127.0.0.0/8 is the one interface's
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


class HostSigns:
    """Signs of life of the hosts of a run, exchanged once a second over the network alone.

    They go through the store that host 0's agent keeps at the meeting point. A lost host may still be seen in the run
    directory, and where it is the network that is lost, so may be the file system of the run directory.

    Args:
        label: this host's name, for the others to print.
    """

    def __init__(self, route: Route, node_rank: int, nodes: int, label: str) -> None:
        self._route, self._node_rank, self._nodes, self._label = route, node_rank, nodes, label
        self._labels: dict[int, str] = {}
        self._counts = dict.fromkeys(range(nodes), 0)
        self._heard: dict[int, float] = {}  # monotonic time of a node's last sign, while it takes part
        self._stop = threading.Event()
        self._give_up: threading.Timer | None = None

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """While inside."""
        thread = threading.Thread(target=self._exchange, name="host signs", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(2 * SIGN_SECONDS)  # while the network is down it waits for an answer, for up to minutes
            if self._give_up is not None:
                self._give_up.cancel()

    def silent(self, seconds: float) -> str | None:
        """Which hosts gave no sign for more than `seconds`, in a sentence; None: each one that had begun to did."""
        now = time.monotonic()
        ages = {node: now - heard for node, heard in self._heard.copy().items() if now - heard > seconds}
        if 0 in ages:  # the others' signs come by it
            name = self._labels.get(0, self._route.address)
            return f"node 0 ({name}) gave no answer over the network for {ages[0]:.0f} s: it or this host is cut off"
        if not ages:
            return None
        names = ", ".join(f"node {node} ({self._labels.get(node)})" for node in sorted(ages))
        return f"{names} gave no sign over the network for {max(ages.values()):.0f} s: lost or cut off"

    def end_process_after(self, seconds: float, exit_code: int, reason: str) -> None:
        """End this process then, unless it has left `exchanged` before: with the network its disk may have gone, and
        whatever touches that waits without end."""

        def end() -> None:
            print(f"trainyard: error: {reason}", file=sys.stderr, flush=True)
            os._exit(exit_code)

        self._give_up = threading.Timer(seconds, end)
        self._give_up.daemon = True
        self._give_up.start()

    def _exchange(self) -> None:
        try:
            store = self._connect()
            store.set(self._key("label", self._node_rank), self._label)
            while not self._stop.wait(SIGN_SECONDS):
                self._exchange_once(store)
            store.set(self._key("left", self._node_rank), "1")
        except (DistError, OSError):
            # Host 0's launcher has ended, or nobody met. A host that is cut off gives no error, but no answer either.
            self._heard.clear()

    def _connect(self) -> TCPStore:
        place, timeout = (self._route.address, self._route.port), timedelta(seconds=SIGN_SECONDS)
        while True:
            try:
                # torch would print a stack trace for each time that nobody listens
                socket.create_connection(place, SIGN_SECONDS).close()
                return TCPStore(*place, is_master=False, timeout=timeout)
            except (DistError, OSError):  # host 0 is not there yet; how long one waits for it is the agent's to say
                if self._stop.wait(SIGN_SECONDS):
                    raise

    def _exchange_once(self, store: TCPStore) -> None:
        store.add(self._key("count", self._node_rank), 1)
        for node in range(self._nodes):
            if node == self._node_rank:
                continue
            count = store.add(self._key("count", node), 0)
            if count > 0 and node not in self._labels:
                self._labels[node] = store.get(self._key("label", node)).decode()
            if store.check([self._key("left", node)]):
                self._heard.pop(node, None)
            elif count > self._counts[node]:
                self._counts[node], self._heard[node] = count, time.monotonic()

    def _key(self, kind: str, node: int) -> str:
        return f"trainyard/host/{kind}/{node}"
