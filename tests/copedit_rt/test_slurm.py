"""The page's script in a real Slurm of one machine, where Debian's slurmctld, slurmd and munge are installed."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import files, run, study

from copedit_rt import cohort

ROOT = Path(cohort.__file__).parents[1]
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)) or os.geteuid() != 0,
    reason="needs root, and Debian's slurmctld, slurmd and munge",
)
CONFIGURATION = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
NodeName={host} NodeAddr=127.0.0.1 CPUs=1 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def ports(count: int) -> list[int]:
    with ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


@pytest.fixture
def slurm(tmp_path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch finds a Slurm that runs below a folder of the test's own."""
    folder = tmp_path / "slurm"
    for part in ("state", "spool"):
        (folder / part).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, ports=ports(2)))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    places = [f"--{kind}={folder}/munge.{kind.split('-')[0]}" for kind in ("pid-file", "log-file", "seed-file")]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket", *places],
        ["slurmctld", "-D", "-f", str(folder / "slurm.conf")],
        ["slurmd", "-D", "-N", host, "-f", str(folder / "slurm.conf")],
    ]
    started = []
    try:
        for command in commands:
            log = open(folder / f"{command[0]}.log", "w")
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            time.sleep(1)
        until, told = time.monotonic() + 120, ""
        while "State=IDLE" not in told:
            assert time.monotonic() < until, "\n".join(path.read_text() for path in folder.glob("*.log"))
            told = subprocess.run(["scontrol", "show", "node"], env=environment, capture_output=True, text=True).stdout
            time.sleep(0.5)
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(60)


@pytest.mark.parametrize("array", ["0-1", "1-2"])
def test_an_array(tmp_path, brain_model, slurm, array):
    for name in "abc":
        study(tmp_path / "COHORT" / name, name)
    tools = tmp_path / "bin"
    tools.mkdir()
    command = f'exec {sys.executable} -m copedit_rt "$@" --model {brain_model} --device cpu'
    (tools / "copedit").write_text(f"#!/bin/sh\n{command}\n")
    (tools / "copedit").chmod(0o755)
    (text,) = re.findall(r"^```bash\n(.+?)^```", (ROOT / "docs" / "cluster.md").read_text("utf-8"), re.M | re.S)
    (tmp_path / "job.sh").write_text(text)
    environment = slurm | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    options = [f"--array={array}", "--cpus-per-task=1", "--mem=0", "--wait", f"--output={tmp_path}/%a.log"]
    done = subprocess.run(
        ["sbatch", *options, "job.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580
    )
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    assert files(tmp_path / "OUT") == {f"{n}/{n}_t1ce{end}" for n in "abc" for end in (".nii.gz", ".json")}
    told = {path.name for path in (tmp_path / "OUT").glob("copedit_summary*")}
    assert told == {"copedit_summary_1of2.json", "copedit_summary_2of2.json"}
    command = ["synth", tmp_path / "COHORT", "-o", tmp_path / "OUT", "--model", brain_model, "--summary"]
    assert run(*command).exit_code == 0
