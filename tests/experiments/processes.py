"""Experiments in processes of their own, and what they have recorded at a moment at which they could be killed.

A process runs one experiment after the other, so that packages are imported and common programs compiled but once.
"""

import contextlib
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


class Runs(NamedTuple):
    """Runs of an experiment of the name "run", one after the other in a process."""

    process: subprocess.Popen
    script: str
    options: str

    def start(self, folder: Path, *more_options: str) -> "Runs":
        options = [*self.options.split(), "--folder", str(folder), "--name", "run", *more_options]
        self.process.stdin.write(json.dumps([str(EXPERIMENTS / self.script), *options]) + "\n")
        self.process.stdin.flush()
        return self

    def copy_when(self, is_time: Callable[[], bool], folder: Path, copy: Path) -> None:
        """Copies what the run would leave in its folder if it were killed now; it is but stopped, and goes on."""
        while not is_time():
            assert self.process.poll() is None
            time.sleep(0.005)
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        self.process.send_signal(signal.SIGCONT)

    def finish(self) -> str:
        """What it printed."""
        has_succeeded, output = self._answer()
        assert has_succeeded, output
        return output

    def fail(self) -> str:
        """What it printed."""
        has_succeeded, output = self._answer()
        assert not has_succeeded, output
        return output

    def _answer(self) -> tuple[bool, str]:
        line = self.process.stdout.readline()
        assert line, f"the process ended with {self.process.wait()}"
        return tuple(json.loads(line))


class Processes:
    """Two for the experiments of one device, and two for those of several: started when they are needed.

    What is killed in one goes on in the other. Little time is spent on compiling well, and what one compiles the other
    finds in the cache.
    """

    def __init__(self, cache: Path):
        flags = (flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
        self._environment = os.environ | {
            "XLA_FLAGS": " ".join(flags),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._started: dict[bool, tuple[subprocess.Popen, subprocess.Popen]] = {}

    def __call__(self, script: str, options: str) -> tuple[Runs, Runs]:
        has_several = "jax_num_cpu_devices" in (EXPERIMENTS / script).read_text()
        if has_several not in self._started:
            self._started[has_several] = self._start(), self._start()
        one, other = self._started[has_several]
        return Runs(one, script, options), Runs(other, script, options)

    def _start(self) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, __file__], env=self._environment, **pipes)

    def close(self) -> None:
        for both in self._started.values():
            for process in both:
                process.communicate(timeout=60)


def write_text(folder: Path, modules: int) -> Path:
    """Six files of words in each of so many folders, as a text to train on."""
    for module in range(modules):
        (folder / f"m{module}").mkdir()
        for i in range(6):
            words = " ".join(f"word{(7 * i + module * k) % 23}" for k in range(60))
            (folder / f"m{module}" / f"{i}.txt").write_text(words)
    return folder


def metrics(folder: Path) -> bytes:
    """Reads what is recorded so far; the last line may be unfinished."""
    file = folder / "run" / "metrics.jsonl"
    return file.read_bytes() if file.exists() else b""


def _serve() -> None:
    """Runs the script and options of each line that is read, as a shell would, and answers how it ended."""
    import jax

    update = jax.config.update

    def update_once(name: str, value: object) -> None:
        """A process has as many devices as its first run has asked for, and must not be asked again."""
        if name != "jax_num_cpu_devices" or jax.config.jax_num_cpu_devices != value:
            update(name, value)

    jax.config.update = update_once
    sys.path[0] = str(EXPERIMENTS)
    answers = sys.stdout
    for line in sys.stdin:
        sys.argv = json.loads(line)
        output, has_succeeded = io.StringIO(), True
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except BaseException:
                has_succeeded = False
                traceback.print_exc()
        print(json.dumps([has_succeeded, output.getvalue()]), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
