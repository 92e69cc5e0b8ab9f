"""The way to the meeting point, signs of life between hosts, and the end of a host that is cut off."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore

from gpt.recipe import Faults
from launch import hosts, watch
from launch.hosts import HostSigns, Route, find_route


def names(monkeypatch: pytest.MonkeyPatch, known: dict[str, list[str]]) -> None:
    """What names resolve to; addresses resolve to themselves."""
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, **options: Any) -> Any:
        if host in known and not known[host]:
            raise socket.gaierror(-2, "Name or service not known")
        return [entry for address in known.get(host, [host]) for entry in real(address, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize(("rendezvous", "own"), [("127.0.0.1:29500", "127.0.0.1"), ("localhost:29500", "127.0.0.1")])
def test_the_way_to_this_host_itself(monkeypatch: pytest.MonkeyPatch, rendezvous: str, own: str) -> None:
    names(monkeypatch, {"localhost": ["127.0.0.1"]})
    assert find_route(rendezvous, 0) == Route(own, 29500, own, "lo")
    assert find_route(rendezvous, 0).endpoint == "127.0.0.1:29500"


def test_addresses_of_version_6() -> None:
    if not any(entry.address == "::1" for entry in psutil.net_if_addrs().get("lo", [])):
        pytest.skip("no IPv6 on this host")
    assert find_route("[::1]:29500", 0).endpoint == "[::1]:29500"


def test_a_name_is_used_by_the_address_that_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian gives a host's own name 127.0.1.1."""
    found = [entry.address for name, entries in psutil.net_if_addrs().items() if name != "lo" for entry in entries
             if entry.family == socket.AF_INET]  # fmt: skip
    if not found:
        pytest.skip("no network interface on this host")
    own = found[0]
    names(monkeypatch, {"head": ["127.0.1.1", own], "alone": ["127.0.1.1"], "unknown": []})
    route = find_route("head:29500", 0)
    assert (route.address, route.own_address) == (own, own)
    assert own in [entry.address for entry in psutil.net_if_addrs()[str(route.interface)]]
    with pytest.raises(ValueError, match=r"'alone' is 127.0.1.1, which no other host reaches: give host 0's address"):
        find_route("alone:29500", 0)
    with pytest.raises(OSError, match=r"cannot resolve 'unknown': .*Give host 0's address instead of its name"):
        find_route("unknown:29500", 1)


def test_the_meeting_point_is_on_host_0() -> None:
    if not any(name != "lo" for name in psutil.net_if_addrs()):
        pytest.skip("no network interface on this host")
    with pytest.raises(
        (ValueError, OSError), match=r"--node-rank 0, has not the address 192\.0\.2\.1|no way from this"
    ):
        find_route("192.0.2.1:29500", 0)


# Signs of life


def two_hosts(monkeypatch: pytest.MonkeyPatch) -> tuple[TCPStore, list[HostSigns]]:
    monkeypatch.setattr(hosts, "SIGN_SECONDS", 0.05)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    route = Route("127.0.0.1", store.port, "127.0.0.1", "lo")
    return store, [HostSigns(route, node, 2, f"host{node}") for node in (0, 1)]


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_host_that_falls_silent_is_named_and_one_that_leaves_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    store, (first, second) = two_hosts(monkeypatch)
    with first.exchanged():
        with second.exchanged():
            wait_for(lambda: 1 in first._heard and 0 in second._heard)
            assert first.silent(5) is None and second.silent(5) is None
            silenced = threading.Event()
            monkeypatch.setattr(second, "_exchange_once", lambda store: silenced.wait(2))
            time.sleep(0.6)
            assert first.silent(0.5) == "node 1 (host1) gave no sign over the network for 1 s: lost or cut off"
            assert second.silent(0.5) == (
                "node 0 (host0) gave no answer over the network for 1 s: it or this host is cut off"
            )
            silenced.set()
        wait_for(lambda: 1 not in first._heard)
        assert first.silent(0.0) is None
    del store


def test_it_waits_quietly_for_host_0(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hosts, "SIGN_SECONDS", 0.5)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first, second = (HostSigns(Route("127.0.0.1", port, "127.0.0.1", "lo"), node, 2, f"host{node}") for node in (0, 1))
    with second.exchanged():
        time.sleep(0.7)
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        with first.exchanged():
            wait_for(lambda: 0 in second._heard)
    del store
    assert capfd.readouterr().err == ""


# A host that is cut off from its file system, too


class Unreachable:
    """Signs of a run whose other host is silent."""

    ended_with: tuple[float, int, str] | None = None

    def silent(self, seconds: float) -> str:
        return "node 0 (host0) is silent"

    def end_process_after(self, *arguments: Any) -> None:
        self.ended_with = arguments


def test_ranks_end_though_the_run_directory_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {**os.environ, "TRAINYARD_ERROR_DIRECTORY": str(tmp_path), "RANK": "1"}
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=variables)
    monkeypatch.setattr(watch, "MEETING_SECONDS", 1.0)
    back, signs = threading.Event(), Unreachable()
    looked = watch.HangWatch(tmp_path, tmp_path, range(1, 2), Faults(hang_seconds=1), signs)  # type: ignore[arg-type]
    monkeypatch.setattr(looked, "_own_beats", lambda: back.wait(60) and [])
    with looked.watching():
        assert rank.wait(timeout=30) == -9
        wait_for(lambda: looked.hang)
        back.set()
    assert str(looked.hang).startswith("no progress for ") and str(looked.hang).endswith("node 0 (host0) is silent")
    assert signs.ended_with == (2 * watch.KILL_SECONDS, 86, looked.hang)
