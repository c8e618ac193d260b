"""``launch/``: scripts and manifests, with programs that only write down how they were called."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from vembed_ds.launching.flags import require_consistent, split
from vembed_ds.launching.hostfile import read_hostfile
from vembed_ds.train import build_parser

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
RUN = ["--ds_config", "d.json", "--config", "my run.yaml"]

Run = Callable[..., subprocess.CompletedProcess[str]]


def parse_train(words: Sequence[str]) -> dict[str, Any]:
    """The launcher's flags of ``vembed-ds train ...``; everything must be understood."""
    assert list(words[:2]) == ["vembed-ds", "train"]
    flags, rest = split(words[2:], prog="vembed-ds train")
    require_consistent(flags)
    assert build_parser().parse_args(rest).resume == "auto"
    return flags


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a script of ``launch/`` with programs that are only pretended; ``codes``: how they end."""

    def call(
        script: str, *words: str, codes: dict[str, int] | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        ends = {"vembed-ds": 0, "srun": 0, "scontrol": 0} | (codes or {})
        for name, code in ends.items():
            program = tmp_path / name
            program.write_text(
                f"#!/bin/bash\n{{ printf '%q ' {name} \"$@\"; echo; }} >> {tmp_path}/called\n"
                f'echo "exit {code}" >> "${{VEMBED_STATUS_FILE:-/dev/null}}"\nexit {code}\n'
            )
            program.chmod(0o755)
        return subprocess.run(
            ["bash", str(LAUNCH / script), *words],
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return call


def called(folder: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (folder / "called").read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        command = ["shellcheck", "-x", "-e", "SC1091", str(script)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stdout


def test_one_machine(run: Run, tmp_path: Path) -> None:
    assert run("single_node.sh", *RUN).returncode == 0
    [words] = called(tmp_path)
    assert words == ["vembed-ds", "train", *RUN, "--resume", "auto"]
    parse_train(words)


def test_a_host_file(run: Run, tmp_path: Path) -> None:
    assert run("hostfile.sh", "hosts", *RUN, codes={"vembed-ds": 75}).returncode == 75
    [words] = called(tmp_path)
    assert parse_train(words) == {"hostfile": "hosts"}
    assert run("hostfile.sh").returncode != 0


def test_the_example_of_a_host_file() -> None:
    assert read_hostfile(LAUNCH / "hosts.example") == {"node1": 8, "node2": 8}


def test_by_ssh_every_machine_starts_its_share(run: Run, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two\n  node1 slots=4\n\nnode2 slots=4\n")
    ssh = tmp_path / "fake-ssh"
    # Its flags, the host, and a line that a shell there gets.
    ssh.write_text('#!/bin/bash\n[ "${@: -2:1}" != node1 ] || sleep 0.5\nexec sh -c "${@: -1}"\n')
    ssh.chmod(0o755)
    done = run("ssh.sh", "hosts", *RUN, codes={"vembed-ds": 75}, SSH=str(ssh))
    assert done.returncode == 75, done.stderr
    flags = sorted((parse_train(words) for words in called(tmp_path)), key=lambda f: f["node_rank"])
    assert [one["node_rank"] for one in flags] == [0, 1]
    for one in flags:
        assert one["no_ssh"]
        assert (one["master_addr"], one["master_port"]) == ("node1", 29500)
        assert one["hostfile"] == str(tmp_path / "hosts")


def test_a_share_needs_its_number(run: Run, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=4\n")
    done = run("no_ssh.sh", "hosts", *RUN)
    assert done.returncode != 0
    assert "the place of this machine in the host file" in done.stderr


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (2, False), (1, False)])
def test_slurm_queues_a_stopped_run_again(
    run: Run, tmp_path: Path, code: int, requeued: bool
) -> None:
    done = run(
        "slurm.sbatch",
        *RUN,
        codes={"srun": code},
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID="17",
    )
    assert done.returncode == code, done.stderr
    first, *more = called(tmp_path)
    assert first[:2] == ["srun", "--kill-on-bad-exit=0"]
    assert parse_train(first[2:]) == {}
    assert more == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_slurms_own_lines() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    given = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert given["signal"] == "USR1@600"
    assert given["ntasks-per-node"] == given["gpus-per-node"]
    assert "requeue" in given
    assert "gpus-per-task" not in given


def container_of(pod: dict[str, Any]) -> dict[str, Any]:
    [container] = pod["spec"]["containers"]
    return dict(container)


def test_the_indexed_job() -> None:
    service, hosts, job = yaml.safe_load_all((LAUNCH / "kubernetes" / "job.yaml").read_text())
    spec = job["spec"]
    container = container_of(spec["template"])
    words = [*container["command"], *container["args"]]
    flags = parse_train([word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in words])
    assert (flags["no_ssh"], flags["node_rank"]) == (True, 1)

    names = [line.split() for line in hosts["data"]["hosts"].splitlines()]
    assert spec["completions"] == spec["parallelism"] == len(names)
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert [slots for _, slots in names] == [f"slots={gpus}"] * len(names)
    # What Kubernetes calls the pods of an Indexed Job, behind a service without an address.
    job_name, subdomain = job["metadata"]["name"], spec["template"]["spec"]["subdomain"]
    assert subdomain == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job_name}
    assert [name for name, _ in names] == [f"{job_name}-{i}.{subdomain}" for i in (0, 1)]
    assert flags["master_addr"] == names[0][0]
    assert flags["hostfile"] == "/etc/vembed/hosts"

    assert spec["completionMode"] == "Indexed"
    mend = spec["podFailurePolicy"]["rules"][0]
    assert (mend["action"], mend["onExitCodes"]["values"]) == ("FailJob", [2])
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy wants it"
    require_volumes(spec["template"]["spec"])


def test_the_mpi_job() -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes" / "mpijob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    replicas = job["spec"]["mpiReplicaSpecs"]
    worker = replicas["Worker"]["template"]["spec"]
    ranks = replicas["Worker"]["replicas"] * job["spec"]["slotsPerWorker"]
    [line] = container_of(replicas["Launcher"]["template"])["args"]
    words = shlex.split(line)
    assert words[words.index("-n") + 1] == str(ranks)
    assert any(word.startswith("MASTER_ADDR=$(head -n 1 /etc/mpi/hostfile") for word in words)
    assert parse_train(words[words.index("vembed-ds") :]) == {}
    [container] = worker["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == job["spec"]["slotsPerWorker"]
    require_volumes(worker)


def require_volumes(pod: dict[str, Any]) -> None:
    """All that is mounted is there, and shared memory is not the default's 64 MiB."""
    [container] = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounted.values()) == set(volumes)
    assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in volumes[mounted["/shared"]]


def test_the_container_file_copies_what_is_there() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists(), name
    assert ["vembed_ds"] in copied
    assert any("pdsh" in line and "openssh-client" in line for line in lines)


def test_what_is_exported_reaches_the_machines(tmp_path: Path) -> None:
    from vembed_ds.launching.remote import exported

    text = (LAUNCH / "environment.sh").read_text()
    names = {
        name
        for line in re.findall(r"^(?:# )?export (.*)$", text, re.MULTILINE)
        for name in re.findall(r"(\w+)=", line)
    }
    assert "NCCL_SOCKET_IFNAME" in names
    assert exported(dict.fromkeys(names, "x"), [], by_pdsh=True).keys() == names
