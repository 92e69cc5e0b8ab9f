"""What rank 0 makes of what the ranks found."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recipe_samples import make_recipe

from gpt import distributed, metrics, preflight, train
from gpt.preflight import Facts, Item, Needs, can_meet, describe, judge, judge_disk, judge_memory, refuse

GIB = 2**30


def facts(rank: int, **changes: Any) -> Facts:
    """Of a rank that has its host for itself."""
    good = Facts(
        rank=rank, node=rank, host=f"host{rank}", asked_ranks=2, versions={"torch": "2.13.0"}, recipe={"train.seed": 1},
        problem=None, data="d1", threads=2, cores=2, memory_bytes=8 * GIB, available_bytes=4 * GIB, device_bytes=None,
        network=None, directory=None,
    )  # fmt: skip
    return dataclasses.replace(good, **changes)


def failed(everyone: list[Facts], clocks: tuple[float | None, ...] = (100.0, 100.1)) -> list[str]:
    return [str(item) for item in judge(everyone, clocks, make_recipe()) if item.state == "failed"]


def test_nothing_is_said_of_two_good_ranks() -> None:
    items = judge([facts(0), facts(1)], (100.0, 100.1), make_recipe())
    assert {item.state for item in items} == {"passed"}
    assert can_meet(items)
    refuse(items)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"asked_ranks": 4}, "ranks: 2 ranks have met, but host1 was told 4"),
        ({"versions": {"torch": "2.12.0"}}, "versions: rank 1 on host1: it has torch '2.12.0' and not '2.13.0'"),
        ({"versions": {}}, "versions: rank 1 on host1: it has torch None and not '2.13.0'"),
        ({"recipe": {"train.seed": 2}}, "recipe: rank 1 on host1: it has train.seed 2 and not 1"),
        ({"data": "d2"}, "data: rank 1 on host1: it sees other data than rank 0 on host0"),
        ({"problem": "no such file", "data": None}, "recipe and data: rank 1 on host1: no such file"),
        ({"network": "no way"}, "network: rank 1 on host1: no way"),
        ({"directory": "read-only"}, "run directory: rank 1 on host1: read-only"),
    ],
)
def test_one_rank_differs(changes: dict[str, Any], sentence: str) -> None:
    [found] = failed([facts(0), facts(1, **changes)])
    assert found.startswith(sentence)


def test_a_commit_that_a_host_cannot_tell_is_no_other_one() -> None:
    versions = [{"git_commit": commit} for commit in ("abc", None, "abc+changes")]
    assert failed([facts(0, versions=versions[0]), facts(1, versions=versions[1])]) == []
    [other] = failed([facts(0, versions=versions[0]), facts(1, versions=versions[2])])
    assert "git_commit 'abc+changes' and not 'abc'" in other


def test_what_all_ranks_say_is_said_once() -> None:
    assert failed([facts(0, problem="bad"), facts(1, problem="bad")]) == ["recipe and data: all ranks: bad"]


def test_of_one_host_no_rank_is_named() -> None:
    assert failed([facts(0, problem="bad"), facts(1, node=0)]) == ["recipe and data: bad"]


def test_all_that_failed_is_refused_together() -> None:
    items = judge([facts(0), facts(1, data="d2", network="no way")], (0.0, 90.0), make_recipe())
    with pytest.raises(ValueError, match=r"for 3 reasons:\n  data: .*\n  network: .*\n  clocks: .* host1 is \+90\.0 s"):
        refuse(items)
    assert not can_meet(items)
    with pytest.raises(ValueError, match=r"^data: rank 1 on host1: it sees other data"):
        refuse(judge([facts(0), facts(1, data="d2")], (0.0, 0.0), make_recipe()))


def test_small_skews_and_crowded_cores_are_warnings() -> None:
    items = judge([facts(0, threads=3), facts(1)], (100.0, 104.0), make_recipe())
    refuse(items)
    threads, clocks = sorted((str(item) for item in items if item.state == "warning"), reverse=True)
    assert threads.startswith("threads: host0 has 2 cores for 3 threads") and "4.0 s" in clocks
    assert describe(items, ranks=1) == [f"warning: {clocks}", f"warning: {threads}"]
    assert describe(items, ranks=2) == ["ranks: 2 on 2 hosts", f"warning: {clocks}", f"warning: {threads}"]


@pytest.mark.parametrize(("bf16", "state", "precision"), [(0.7e9, "warning", "fp32"), (80e9, "passed", "bf16")])
def test_a_processor_that_is_slow_with_bf16_is_told(
    monkeypatch: pytest.MonkeyPatch, bf16: float, state: str, precision: str
) -> None:
    speeds = {torch.bfloat16: bf16, torch.float32: 50e9}
    monkeypatch.setattr(metrics, "measure_matmul_flops", lambda device, dtype, **_: speeds[dtype])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [item] = preflight.check_precision("bf16")
    assert item.state == state and f"products of bf16 run at {bf16 / 1e9:.1f} GFLOP/s" in item.message
    assert preflight.check_precision("fp32") == []
    assert metrics.fast_precision() == precision
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert preflight.check_precision("bf16") == [] and metrics.fast_precision() == "bf16"


def test_clocks_are_those_of_hosts() -> None:
    one_host = [facts(0), facts(1, node=0, host="host0")]
    assert failed(one_host, (100.0, None)) == [], "ranks of a host wake up when they can"
    recipe = make_recipe({"faults": {"hang_seconds": 1}})
    states = {item.name: item.state for item in judge([facts(0), facts(1)], (100.0, 101.9), recipe)}
    assert states["clocks"] == "passed", "no finer than what waking up takes"


def needs(**changes: Any) -> Needs:
    """1 GiB parameters, 2 ranks."""
    good = Needs(
        checkpoint_bytes=12 * GIB, planned_bytes=48 * GIB, rank_state_bytes=7 * GIB, rank_gradient_bytes=GIB,
        on_device=False,
    )  # fmt: skip
    return dataclasses.replace(good, **changes)


@pytest.mark.parametrize(
    ("recipe", "stage", "expected"),
    [
        ({}, 3, (12, 36, 7, 1)),
        ({"model": {"pretrained": "base"}, "lora": {"rank": 1}}, 3, (6, 18, 4, 0)),
        ({}, 2, (12, 36, 8, 1)),
        ({}, 1, (12, 36, 8, 2)),
        ({"precision": "fp32"}, 3, (12, 36, 8, 2)),
        ({"checkpoint": {"keep_last": 2, "weights_only_after": 1, "every_steps": 1}}, 3, (12, 28, 7, 1)),
        ({"checkpoint": {"keep_last": 2, "budget_bytes": 30 * GIB, "every_steps": 1}}, 3, (12, 30, 7, 1)),
    ],
)
def test_what_is_counted_is_certain(recipe: dict[str, Any], stage: int, expected: tuple[int, ...]) -> None:
    """Bytes a parameter: two checkpoints are kept and one is written, on 2 ranks; an adapter has half of all."""
    changed = {"checkpoint": {"keep_last": 2, "every_steps": 1}} | recipe
    saved = GIB // 2 if "lora" in recipe else GIB
    found = Needs.of(make_recipe(changed), GIB, saved, 50, {"zero_optimization": {"stage": stage}}, 2)
    sizes = (found.checkpoint_bytes, found.planned_bytes, found.rank_state_bytes, found.rank_gradient_bytes)
    assert tuple(size // GIB for size in sizes) == expected


def test_memory_is_refused_only_where_it_is_certain() -> None:
    def states(one: Facts, **changes: Any) -> list[str]:
        return [item.state for item in judge_memory([facts(0, available_bytes=8 * GIB), one], needs(**changes))]

    assert states(facts(1, available_bytes=8 * GIB)) == ["passed"]
    assert states(facts(1, available_bytes=7 * GIB)) == ["warning"]
    assert states(facts(1, memory_bytes=6 * GIB, available_bytes=6 * GIB)) == ["failed"]
    assert states(facts(1, node=0)) == ["failed"], "two ranks on one host"
    devices = [facts(rank, node=0, device_bytes=8 * GIB) for rank in (0, 1)]
    assert [item.state for item in judge_memory(devices, needs(on_device=True))] == ["passed"], "a GPU is one rank's"


def test_room_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(free: int) -> str:
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage)
        [item] = judge_disk(tmp_path / "run", needs(checkpoint_bytes=100, planned_bytes=400))
        return item.state

    spare = preflight.SPARE_BYTES
    assert state(spare + 400) == "passed"
    assert state(spare + 399) == "warning"
    assert state(spare + 99) == "failed"
    for name in (".tmp-step_00000003-1", "step_00000002"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / name / "rank_00000.safetensors").write_bytes(bytes(50))
    assert state(spare + 99) == "warning", "what an unfinished save left is removed at the start"
    assert state(spare + 49) == "failed"
    assert state(spare + 300) == "passed", "what is there already is part of the plan"


def test_a_setting_that_names_no_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert preflight._own_address() == ("127.0.0.1", None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    address, problem = preflight._own_address()
    assert address is None and str(problem).startswith(
        "GLOO_SOCKET_IFNAME is 'eth9', which is no network interface with an"
    )
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert preflight._own_address() == (None, None)


def test_a_host_that_cannot_listen_or_write_says_so_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    meeting: Any = SimpleNamespace(
        nodes=2,
        node=1,
        local_rank=0,
        hear=lambda name, of: None,
        tell=lambda name, value, of: told.update({name: value}),
    )
    monkeypatch.setattr(preflight, "_own_address", lambda: ("192.0.2.1", None))  # of no interface here
    with preflight._listening(meeting) as problem:
        assert str(problem).startswith("it cannot listen at 192.0.2.1 (GLOO_SOCKET_IFNAME): Cannot assign")
    (tmp_path / "file").touch()
    monkeypatch.setattr(preflight, "_nearest_folder", lambda run: tmp_path / "file")
    with preflight._probe_files(meeting, tmp_path / "run") as problem:
        assert "cannot be written to: Not a directory" in str(problem)
    assert told == {"address": None, "file": None}


def test_an_error_of_any_kind_in_the_plan_is_told_to_the_other_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("meta tensors have no data")

    monkeypatch.setattr(train, "plan_run", fail)
    monkeypatch.setattr(distributed, "Meeting", lambda s: SimpleNamespace(local_rank=1, nodes=2, rank=1, world_size=2))
    monkeypatch.setattr(preflight, "check_before", lambda meeting, recipe, problem, data, needs: [problem])
    assert train._look_before(make_recipe()) == (None, ["RuntimeError: meta tensors have no data"])
    assert "Traceback" in capsys.readouterr().err, "with the place, in the rank's log"


def test_the_report_is_for_programs(tmp_path: Path) -> None:
    preflight.write_report(tmp_path / "r.json", [Item("disk", "passed", "there is room")], ["batch: 2"])
    assert (tmp_path / "r.json").read_text() == (
        '{"items": [{"name": "disk", "state": "passed", "message": "there is room"}], "plan": ["batch: 2"]}'
    )
