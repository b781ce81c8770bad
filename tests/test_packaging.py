"""The wheel as a stranger gets it: what is inside, what it needs, and that each half works in an empty place."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = ("-m", "pip", "--disable-pip-version-check", "-q")
MODEL_FILES = set("config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json".split())
MODEL_BYTES = 12 << 20


# Installing takes as long as the disk and the index allow.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the tree and nothing left there is packed."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "amem", source / "amem", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    execute(sys.executable, *PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source))
    (found,) = out.glob("*.whl")
    return found


def execute(*command: str, cwd: Path | None = None, timeout: float = 1700) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment(), check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "AMEM_"))}


def empty_venv(path: Path) -> str:
    execute(sys.executable, "-m", "venv", str(path))
    return str(path / "bin" / "python")


def test_the_wheel_holds_the_package_and_the_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        entries = archive.read(next(name for name in sizes if name.endswith("entry_points.txt"))).decode()
    model = {name for name in sizes if name.startswith("amem/models/demo/")}
    assert {name.rpartition("/")[2] for name in model} >= MODEL_FILES
    assert sum(sizes[name] for name in model) <= MODEL_BYTES
    assert "amem = amem.cli:main" in entries
    python = {str(path.relative_to(ROOT)) for path in (ROOT / "amem").rglob("*.py")}
    assert {name for name in sizes if name.endswith(".py")} == python
    assert "amem/py.typed" in sizes
    assert any(name.endswith("licenses/LICENSE") for name in sizes)


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    needs = metadata.get_all("Requires-Dist") or []
    base = {line.split(">")[0].split("=")[0].strip() for line in needs if "extra ==" not in line}
    assert (metadata["Name"], metadata["License-Expression"]) == ("atelya", "Apache-2.0")
    assert metadata["Requires-Python"] == ">=3.10"
    assert base == {"aiohttp", "apsw-sqlite3mc", "msgpack", "numpy", "platformdirs", "rich", "typer"}
    assert set(metadata.get_all("Provides-Extra") or []) >= {"selfhost", "gpu", "bench", "mcp", "langgraph", "dev"}


BASE_WORKS = """
import sys
from pathlib import Path
from amem import Amem, AmemError, AsyncAmem
from amem.memory.service import MemoryService
from amem.memory.types import NewMemory, RecallOptions

service = MemoryService(Path(sys.argv[1]))
texts = ["Alice lives in Seattle and works at Boeing.", "Alice's sister Maria lives in Denver."]
service.add("alice", [NewMemory(text) for text in texts])
found = service.recall("alice", "Where does Alice's sister live?", RecallOptions())
print(found[0].memory.text)
service.close()
try:
    Amem("http://127.0.0.1:1", retries=0).health()
except AmemError as error:
    print(error.status)
print(sorted({"torch", "hnswlib", "transformers"} & sys.modules.keys()))
"""


PROXY_WORKS = """
import json, subprocess, sys, threading, urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from amem import Amem

seen = []

class Upstream(BaseHTTPRequestHandler):
    def do_POST(self):
        seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *arguments):
        pass

upstream = HTTPServer(("127.0.0.1", 0), Upstream)
threading.Thread(target=upstream.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{upstream.server_address[1]}/v1"
command = [sys.executable, "-m", "amem", "proxy", "--json", "--port", "0", "--upstream", address]
proxy = subprocess.Popen([*command, "--data-dir", sys.argv[1]], stdout=subprocess.PIPE, text=True)
url = json.loads(proxy.stdout.readline())["url"]
Amem(url).remember("alice", "Alice's sister Maria lives in Denver.")
chat = {"user": "alice", "messages": [{"role": "user", "content": "Where does Alice's sister live?"}]}
urllib.request.urlopen(urllib.request.Request(url + "/v1/chat/completions", json.dumps(chat).encode())).read()
print(seen[0]["messages"][0]["content"].count("Maria lives in Denver"))
proxy.terminate()
print(proxy.wait(30))
"""


def test_the_base_works_alone_and_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    python = empty_venv(tmp_path / "venv")
    execute(python, *PIP, "install", "--only-binary=:all:", str(wheel))
    said = execute(python, "-c", BASE_WORKS, str(tmp_path / "data"), cwd=tmp_path).splitlines()
    assert said == ["Alice's sister Maria lives in Denver.", "0", "[]"]
    assert execute(python, "-c", PROXY_WORKS, str(tmp_path / "proxy"), cwd=tmp_path).split() == ["1", "0"]
    amem = str(tmp_path / "venv" / "bin" / "amem")
    assert execute(amem, "version").startswith("amem ")
    for command in ("demo", "kv-serve", "serve", "bench"):
        done = subprocess.run([amem, command], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
        assert done.returncode == 1
        assert "pip install 'atelya[selfhost]'" in done.stderr
        assert "torch" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_engine_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    python = empty_venv(tmp_path / "venv")
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    torch = next(line for line in constraints if line.startswith("torch=="))
    execute(python, *PIP, "install", torch)
    execute(python, *PIP, "install", f"{wheel}[selfhost]")
    said = execute(str(tmp_path / "venv" / "bin" / "amem"), "demo", cwd=tmp_path, timeout=300)
    assert "Denver" in said
    assert "Boeing" in said
