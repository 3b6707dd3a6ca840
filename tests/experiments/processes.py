"""An experiment as a process of its own: started, ended and killed, and what it has recorded by then."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def starter(script: str, options: str, cache: Path) -> Callable[..., subprocess.Popen]:
    """`start(folder, *more_options)`, of a run of the name "run".

    Little time is spent on compiling well, and what one process compiles the next ones find in the cache.
    """
    flags = (flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    environment = os.environ | {
        "XLA_FLAGS": " ".join(flags),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(folder: Path, *more_options: str) -> subprocess.Popen:
        command = [sys.executable, str(EXPERIMENTS / script), *options.split()]
        return subprocess.Popen(
            [*command, "--folder", str(folder), "--name", "run", *more_options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def write_text(folder: Path, modules: int) -> Path:
    """Six files of words in each of so many folders, as a text to train on."""
    for module in range(modules):
        (folder / f"m{module}").mkdir()
        for i in range(6):
            words = " ".join(f"word{(7 * i + module * k) % 23}" for k in range(60))
            (folder / f"m{module}" / f"{i}.txt").write_text(words)
    return folder


def finish(process: subprocess.Popen) -> str:
    """What it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def fail(process: subprocess.Popen) -> str:
    """What it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0, output
    return output


def kill_when(process: subprocess.Popen, is_time: Callable[[], bool]) -> None:
    while not is_time():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def metrics(folder: Path) -> bytes:
    """As recorded so far; the last line may be unfinished."""
    file = folder / "run" / "metrics.jsonl"
    return file.read_bytes() if file.exists() else b""
