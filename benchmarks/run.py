"""Compare this project with others, every one at the same gradient, in one launch.

``python -m benchmarks.run W1 W2``; benchmarks/README.md says what the workloads are. Several ranks
send to each other over ``lo``: the command runs in a network of its own, where it may make one, so
that bytes on the wire can be read there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from benchmarks.measuring import QUIET
from benchmarks.options import CODE, Options

ALONE = "BENCHMARKS_IN_OWN_NETWORK"  # in the environment of the process inside it


def main() -> None:
    arguments = _parse()
    _enter_own_network()
    os.environ.update(QUIET)  # read when libraries are imported, here too
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_DATASETS_CACHE"] = str(Path(place) / "cache")  # read at import
        from benchmarks.report import write_report
        from benchmarks.workloads import WORKLOADS

        options = Options(
            scratch=Path(place),
            rounds=1 if arguments.quick else arguments.rounds,
            steps=1 if arguments.quick else arguments.steps,
            quick=arguments.quick,
            peers=frozenset(filter(None, arguments.peers.split(","))),
            code={name: getattr(arguments, name) for name in CODE if getattr(arguments, name)},
        )
        started, results = os.getloadavg()[0], {}
        for number in arguments.workloads:
            workload = WORKLOADS[number]
            print(f"== {number}: {workload.title}", file=sys.stderr, flush=True)
            results[number] = workload, workload.run(options.within(number))
            # After each: a run may take hours.
            text = write_report(
                arguments.output, results, options=options, load=(started, os.getloadavg()[0])
            )
    print(text)
    print(f"Written to {arguments.output}")


def _enter_own_network() -> None:
    """Start this command again in a network namespace that has nothing but ``lo``, if possible."""
    if ALONE in os.environ or shutil.which("unshare") is None:
        return
    script = 'ip link set lo up && exec "$@"'
    inside = ["unshare", "-rn", "sh", "-c", script, "sh"]
    if os.spawnlp(os.P_WAIT, inside[0], *inside, "true") == 0:
        os.environ[ALONE] = "1"
        os.execvp(inside[0], [*inside, sys.executable, "-m", "benchmarks.run", *sys.argv[1:]])
    print("no network of its own: bytes on the wire are not read", file=sys.stderr)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [f"W{number}" for number in range(1, 11)]
    parser.add_argument("workloads", nargs="+", choices=names, metavar="W1 ... W10")
    parser.add_argument("--rounds", type=int, default=2, help="even: as often forwards as back")
    parser.add_argument("--steps", type=int, default=3, help="timed, of a round")
    parser.add_argument(
        "--peers",
        default="",
        help="only these, such as ours,plain,st,ddp,fsdp2,deepspeed,gradcache; default: all",
    )
    for name, meaning in CODE.items():
        parser.add_argument(f"--{name}", type=Path, help=f"{meaning}; nothing is downloaded")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--output", type=Path, help="folder; default: a new one in output/")
    arguments = parser.parse_args()
    for name in CODE:
        path = getattr(arguments, name)
        if path is not None and not path.exists():
            parser.error(f"--{name} {path}: nothing there")
        if path is not None:
            setattr(arguments, name, path.resolve())
    if arguments.output is None:
        arguments.output = Path("output") / f"benchmarks-{datetime.now():%Y%m%d-%H%M%S}"
    return arguments


if __name__ == "__main__":
    main()
