"""The life of a job on a real Slurm: whatever ends its launchers, it goes on in the same directory and ends right."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from live_runs import comparable, trainyard
from slurm_runs import MINI_CLUSTER, NODES, SlurmRuns, command, fields, scontrol

from launch.submitted import submitted_jobs

OWN_NODES = ("--extra-line", "#SBATCH --nodelist=n[1-2]")
TWO = ("--nodes", "2", "--processes-per-node", "1")
SHORT = ("--time", "4", "--extra-line", "#SBATCH --time=2")  # submit itself refuses what leaves no time to save
OFTEN = {"checkpoint": {"every_steps": 5}}


@pytest.mark.full
def test_a_run_on_two_nodes_ends_and_is_not_requeued(reference: SlurmRuns) -> None:
    assert reference.decisions("reference") == ["finished"]
    assert max(reference.metrics("reference")) == 20
    start = next(event for event in reference.events("reference") if event["event"] == "start")
    assert start["world_size"] == 2
    [began] = reference.job_events("reference", "job started")
    assert fields(began["job"])["Restarts"] == "0"
    for when in ("start", "end"):
        kept = reference.directory("reference") / "logs" / f"job_{began['job']}_0_{when}.txt"
        assert f"JobId={began['job']} " in kept.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def timed(reference: SlurmRuns) -> dict[str, str]:
    """The jobs of two runs that do not end within their time limit of two minutes. One gets a warning signal, the other
    only one that changes nothing."""
    options = (*TWO, *OWN_NODES, *SHORT, "--extra-line")
    signals = {"warned": "#SBATCH --signal=USR1@15", "unwarned": "#SBATCH --signal=CONT@1"}
    return {
        name: reference.submit(name, *options, line, pace_seconds=6.0, paced_starts=1, **OFTEN)
        for name, line in signals.items()
    }


@pytest.mark.full
def test_signals_preemption_and_lost_processes_and_nodes(reference: SlurmRuns, timed: dict[str, str]) -> None:
    """One run, ended in four ways, is the run that nothing happened to."""
    name = "disturbed"
    job = reference.submit(name, *TWO, "--extra-line", "#SBATCH --exclude=n[1-2]", pace_seconds=1.0)

    def trains(restart: int) -> list[str]:
        """Wait until that start has trained two steps; the job's nodes."""
        reference.wait_restart(name, job, restart)
        before = reference.last_step(name) if restart else 0
        reference.wait_until(name, job, lambda: reference.last_step(name) >= before + 2)
        return command("scontrol", "show", "hostnames", fields(job)["NodeList"]).split()

    def decided(*decisions: str) -> None:
        reference.wait_until(name, job, lambda: len(reference.decisions(name)) >= len(decisions))
        assert reference.decisions(name) == list(decisions), reference.output(name, job)

    trains(0)
    command("scancel", "--signal=USR1", job)
    decided("go on")
    nodes = trains(1)
    command("sbatch", "--partition=urgent", f"--nodelist={nodes[0]}", "--exclusive", "--output=none", "--wrap=sleep 2")
    decided("go on", "go on")
    trains(2)
    [rank] = [process for process in psutil.process_iter() if _is_rank(process, job, 1)]
    rank.kill()
    decided("go on", "go on", "failed")
    nodes = trains(3)
    reference.pace_file(name).write_text("5", encoding="utf-8")  # it must not end before Slurm notices
    slurmd = Path(os.environ["SLURM_CONF"]).with_name(f"{nodes[1]}.pid")
    os.kill(int(slurmd.read_text()), signal.SIGKILL)
    reference.wait_restart(name, job, 4)
    reference.pace_file(name).unlink()
    subprocess.run([MINI_CLUSTER, "up", "--nodes", str(NODES)], check=True, capture_output=True, timeout=60)
    reference.wait_end(name, job)
    # whether the job script had time to say something depends on which of its nodes was lost, and how
    [node_failure] = reference.job_events(name, "job ended")[3:-1]
    assert node_failure["decision"] == "lost" or "Slurm put the job back" in node_failure["reason"]
    decided("go on", "go on", "failed", node_failure["decision"], "finished")
    assert "SIGKILL" in reference.job_events(name, "job ended")[2]["reason"]
    assert comparable(reference.metrics(name)) == comparable(reference.metrics("reference"))


def _is_rank(process: psutil.Process, job: str, rank: int) -> bool:
    try:
        variables = process.environ()
    except psutil.Error:
        return False
    return variables.get("SLURM_JOB_ID") == job and variables.get("RANK") == str(rank)


@pytest.mark.full
@pytest.mark.parametrize(("name", "words"), [("warned", "USR1"), ("unwarned", "two saves and a step take")])
def test_before_the_time_limit_a_run_saves_and_goes_on(
    reference: SlurmRuns, timed: dict[str, str], name: str, words: str
) -> None:
    job = timed[name]
    reference.wait_end(name, job)
    assert reference.decisions(name) == ["go on", "finished"], reference.output(name, job)
    stopped = reference.job_events(name, "job ended")[0]
    assert 2 < stopped["checkpoint"] == stopped["step"] < 20, "nothing that was trained is trained again"
    assert words in reference.output(name, job)
    assert comparable(reference.metrics(name)) == comparable(reference.metrics("reference"))


@pytest.mark.full
def test_a_job_that_cannot_work_fails_once_and_says_why(reference: SlurmRuns) -> None:
    shutil.copytree(reference.folder / "data", reference.folder / "moved")
    data = {"train": [{"path": "moved/train"}], "validation": None, "sequence_length": 64}
    options = ("--nodes", "1", "--processes-per-node", "1", "--extra-line", "#SBATCH --hold")
    no_data = reference.submit("no-data", *options, data=data)
    shutil.rmtree(reference.folder / "moved")
    scontrol("release", no_data)
    few_nodes = reference.submit("few-nodes", *TWO, "--extra-line", "#SBATCH --nodes=1")
    for name, job, words in (("no-data", no_data, "moved/train"), ("few-nodes", few_nodes, "has 1 nodes, but")):
        reference.wait_end(name, job, 60, state="FAILED")
        assert fields(job)["Restarts"] == "0"
        assert reference.decisions(name) == ["refused"]
        assert reference.output(name, job).count("trainyard: error:") == 1 and words in reference.output(name, job)
        status, why = (trainyard(command, f"runs/{name}", cwd=reference.folder).stdout for command in ("status", "why"))
        assert words in status and words in why


@pytest.mark.full
def test_a_run_of_two_nodes_goes_on_on_one_and_on_three(reference: SlurmRuns) -> None:
    steps = {"train": {"global_batch_tokens": 512, "micro_batch_sequences": 2, "steps": 24, "seed": 3}}
    jobs = {}
    for nodes, chain in ((1, "2"), (3, "1")):
        reference.copy("reference", f"on-{nodes}")
        options = ("--nodes", str(nodes), "--processes-per-node", "1", "--chain", chain)
        jobs[nodes] = reference.submit(f"on-{nodes}", *options, **steps)
    records = {}
    for nodes, job in jobs.items():
        reference.wait_end(f"on-{nodes}", job)
        started = reference.job_events(f"on-{nodes}", "start", "continue")[-1]
        assert started["event"] == "continue" and started["world_size"] == nodes
        assert "resumed at step 20, written by 2 ranks" in reference.output(f"on-{nodes}", job)
        records[nodes] = reference.metrics(f"on-{nodes}")
        assert comparable(records[nodes])[20] == comparable(reference.metrics("reference"))[20]
    for step in range(21, 25):
        one, three = records[1][step], records[3][step]
        assert one["sample_digest"] == three["sample_digest"]
        assert one["train/loss"] == pytest.approx(three["train/loss"], abs=2e-3)
    [*_, submitted] = submitted_jobs(reference.directory("on-1"))
    first, second = submitted.job_ids
    reference.wait_end("on-1", second)
    assert f"nothing to do: job {first} ended with: the run is finished" in reference.output("on-1", second)
    assert reference.decisions("on-1") == ["finished", "finished"], "of the reference, and of the chain's first job"
