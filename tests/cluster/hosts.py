"""Two hosts on one machine, n1 and n2: namespaces of their own for network, name, mounts and processes.

They share the file system, are joined by a cable and reach each other by name. What differs from the machine, such as
/etc/hosts, is mounted over it in their view alone, so there is nothing to put back; and all their processes, daemons too, live
in one process namespace whose first process ends when this one does. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES = ("n1", "n2")
ADDRESSES = {"n1": "10.231.7.1", "n2": "10.231.7.2"}

# In either host, after `unshare`. $1: its name. $2: the folder of all.
_SETTLE = """
set -e
mount --make-rprivate /
hostname $1
mount --bind $2/hosts /etc/hosts
mount --bind $2/scratch.$1 $2/scratch
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
[ ! -d /etc/ssh/ssh_config.d ] || mount --bind $2/ssh_config.d /etc/ssh/ssh_config.d
ip link set lo up
"""

_FIRST = (
    _SETTLE
    + """
unshare --mount --net --uts bash -c "$3" settle n2 $2 & second=$!
until [ -e $2/n2.settled ]; do sleep 0.05; kill -0 $second; done
ip link add eth0 type veth peer name eth0 netns $second
ip address add 10.231.7.1/24 dev eth0
ip link set eth0 up
nsenter --target $second --net ip address add 10.231.7.2/24 dev eth0
nsenter --target $second --net ip link set eth0 up
echo $second > $2/n2.pid
read -r _ || true  # until the test process closes its end, or is gone
"""
)
_SECOND = _SETTLE + "\ntouch $2/n2.settled\nexec sleep infinity\n"


class Hosts:
    """Runs programs on n1 and n2.

    Args:
        folder: Where their files are: ``hosts``, ``scratch``, what the daemons write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._first = 0

    @contextlib.contextmanager
    def up(self) -> Iterator[Hosts]:
        """Bring them up, and take everything down that runs on them."""
        for name in (*(f"scratch.{name}" for name in NAMES), "scratch", "ssh_config.d"):
            (self.folder / name).mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in ADDRESSES.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        unshare = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--mount", "--net", "--uts"]
        log = (self.folder / "hosts.log").open("w")
        process = subprocess.Popen(
            [*unshare, "bash", "-c", _FIRST, "settle", "n1", str(self.folder), _SECOND],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
        try:
            wait_for(
                lambda: (self.folder / "n2.pid").exists() or process.poll() is not None, 30, "hosts do not come up"
            )
            assert process.poll() is None, (self.folder / "hosts.log").read_text()
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            self._first = int(children[0])
            yield self
        finally:
            process.kill()  # its child, the first process of the namespace, goes with it, and with that all others
            process.communicate()
            if self._first:
                wait_for(lambda: not Path(f"/proc/{self._first}").exists(), 30, "hosts do not go down")

    def run(
        self,
        host: str,
        *command: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout_s: float = 60,
    ) -> str:
        """What a command prints on a host."""
        done = subprocess.run(
            [*self._enter(host), "env", f"--chdir={cwd or self.folder}", *map(str, command)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def die(self, host: str) -> None:
        """Kill all that runs on a host, as when its power fails. It can be used again."""
        mine = "readlink /proc/self/ns/uts"
        self.run(
            host,
            "bash",
            "-c",
            f'for p in /proc/[0-9]*; do [ "$(readlink $p/ns/uts)" != "$({mine})" ] || echo ${{p#/proc/}}; done | '
            f"grep -vx -e $$ -e $(cat {self.folder}/n2.pid) | xargs kill -KILL; true",
        )

    def _enter(self, host: str) -> Sequence[str]:
        first = ["nsenter", "--target", str(self._first), "--pid", "--mount", "--net", "--uts", "--"]
        if host == "n1":
            return first
        second = (self.folder / "n2.pid").read_text().strip()  # as n1 sees it
        return [*first, "nsenter", "--target", second, "--mount", "--net", "--uts", "--"]


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> None:
    """Until ``condition()`` is true.

    Raises:
        AssertionError: It has not become true.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_s:.0f} s: {what}"
        time.sleep(0.2)


def missing(programs: Sequence[str]) -> str | None:
    """Why these hosts cannot be had, or cannot run ``programs``; None if they can."""
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in ("unshare", "nsenter", "ip", *programs) if shutil.which(name, path=path) is None]
    if absent:
        return f"needs {', '.join(absent)}; `make test-cluster` installs them"
    done = subprocess.run(["unshare", "--pid", "--fork", "--mount", "--net", "--uts", "true"], capture_output=True)
    return None if done.returncode == 0 else f"needs namespaces: {done.stderr.decode().strip()}"
