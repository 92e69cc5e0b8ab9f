"""Two hosts, as far as the network goes: two network namespaces with their own addresses and a link between them."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from live_runs import Live, Runs, comparable
from test_preflight import preflight_of

HANG_SECONDS = 8.0
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)


@dataclass
class Hosts:
    """Network namespaces trainyard0 and trainyard1; neither has another way out."""

    names: tuple[str, ...] = field(default=("trainyard0", "trainyard1"))

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip(
            "link",
            "add",
            "veth0",
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            "veth1",
            "netns",
            self.names[1],
        )
        for number, (name, address) in enumerate(zip(self.names, ADDRESSES, strict=True)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"veth{number}")
            ip("-n", name, "link", "set", f"veth{number}", "up")

    def link(self, state: str) -> None:
        ip("-n", self.names[1], "link", "set", "veth1", state)

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=10)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    two = Hosts()
    two.remove()  # what a killed test left
    try:
        two.make()
    except (OSError, subprocess.CalledProcessError) as error:
        two.remove()
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}")
    yield two
    two.remove()


def start(runs: Runs, hosts: Hosts, log: str) -> list[Live]:
    """One rank on each host."""
    return [
        runs.start("cut_off", "--nodes", "2", "--node-rank", str(node), "--rendezvous", f"{ADDRESSES[0]}:29511",
                   processes=1, log=f"-{log}-{node}", prefix=("ip", "netns", "exec", name),
                   faults={"hang_seconds": HANG_SECONDS}, checkpoint={"every_steps": 2})
        for node, name in enumerate(hosts.names)
    ]  # fmt: skip


@pytest.mark.full
def test_a_host_that_is_cut_off_is_named_and_the_run_goes_on_when_it_is_back(reference: Runs, hosts: Hosts) -> None:
    cut = start(reference, hosts, "cut_off")
    cut[0].wait_until(lambda: cut[0].has_checkpoint(2))
    hosts.link("down")
    cut_at = time.monotonic()
    for node, live in enumerate(cut):
        assert live.process.wait(timeout=60) == 86, live.log.read_text()
        last = live.log.read_text().strip().splitlines()[-1]
        print(f"host {node} ended {time.monotonic() - cut_at:.1f} s after it was cut off: {last}")
    assert cut[0].last_step() < 20, "the run was at its end before the link was down"
    assert HANG_SECONDS < time.monotonic() - cut_at < HANG_SECONDS + 12
    first, second = (live.log.read_text() for live in cut)
    other, this = rf"node 1 \(\S+@{ADDRESSES[1]}\)", rf"node 0 \(\S+@{ADDRESSES[0]}\)"
    assert re.search(rf"error: no progress for \d+ s: {other} gave no sign over the network for \d+ s: lost or", first)
    assert re.search(
        rf"error: no progress for \d+ s: {this} gave no answer over .*: it or this host is cut off", second
    )
    assert reference.events("cut_off")[-1]["event"] == "failed"
    assert "node 1" in reference.events("cut_off")[-1]["reason"]

    hosts.link("up")
    whole = start(reference, hosts, "whole")
    for live in whole:
        assert live.process.wait(timeout=120) == 0, live.log.read_text()
    assert re.search(r"resumed at step \d+, .*PASS", whole[0].log.read_text(), re.DOTALL)
    assert comparable(reference.metrics("cut_off")) == comparable(reference.metrics("reference"))


@pytest.mark.full
def test_preflight_names_a_wrong_interface(runs: Runs, hosts: Hosts) -> None:
    """Host 1's ranks would use the loopback interface."""
    recipe = runs.write_recipe("wrong-interface")
    looks = [
        preflight_of(runs, recipe, node, f"{ADDRESSES[0]}:29512", prefix=("ip", "netns", "exec", name), **variables)
        for (node, name), variables in zip(enumerate(hosts.names), ({}, {"GLOO_SOCKET_IFNAME": "lo"}), strict=True)
    ]
    answers = [look.communicate(timeout=100) for look in looks]
    assert [look.returncode for look in looks] == [1, 1], answers
    for report in (json.loads(out) for out, _ in answers):
        first, second = (item["message"] for item in report["items"] if item["state"] == "failed")
        assert re.match(rf"rank 0 on \S+@{ADDRESSES[0]}: from {ADDRESSES[0]} \(.*=veth0\) it does not reach 127", first)
        assert re.match(
            rf"rank 1 on \S+@{ADDRESSES[1]}: from 127.0.0.1 \(.*=lo\) it does not reach {ADDRESSES[0]}", second
        )
        assert "Set GLOO_SOCKET_IFNAME on each to the interface between the hosts" in second
