"""`amem demo` in one command: every step happens, is measured, and the answers are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def demo(*arguments: str, directory: Path) -> str:
    environment = os.environ | {"TMPDIR": str(directory), "AMEM_DATA_DIR": "/does/not/exist", "AMEM_API_KEY": "other"}
    command = [sys.executable, "-m", "amem", "demo", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_demo(tmp_path: Path) -> None:
    began = time.monotonic()
    result = json.loads(demo("--json", directory=tmp_path))
    assert result["seconds"] <= time.monotonic() - began
    steps = {step["name"]: step for step in result["steps"]}
    assert list(steps) == [
        "start",
        "remember",
        "ask, first",
        "ask, same session",
        "restart",
        "ask, after a restart",
        "forget",
        "ask, forgotten",
    ]
    assert sum(step["seconds"] for step in steps.values()) <= result["seconds"]
    assert "Denver" in steps["ask, first"]["detail"]
    assert "Boeing" in steps["ask, same session"]["detail"]
    assert "Denver" in steps["ask, after a restart"]["detail"]
    assert "Denver" not in steps["ask, forgotten"]["detail"]
    assert steps["ask, same session"]["tokens"]["prefix"] > steps["ask, same session"]["tokens"]["fresh"]
    assert steps["ask, after a restart"]["tokens"]["disk"] > 0
    forgotten = steps["ask, forgotten"]["tokens"]
    assert sum(forgotten.values()) == forgotten["fresh"]
    assert list(tmp_path.iterdir()) == []


def test_piped_it_is_plain(tmp_path: Path) -> None:
    said = demo(directory=tmp_path)
    assert "\x1b" not in said
    assert "none is left" in said
    assert "tokens: " in said
