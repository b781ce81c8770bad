"""Data travels one way: HTTP -> memory -> plan -> engine -> kernels. Read from the imports of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "amem"
BARE_MACHINE = {"torch", "triton", "numpy", "safetensors", "transformers", "tokenizers", "msgpack", "xxhash"}
ENGINE_BORDER = {"amem.engine.client", "amem.engine.launch", "amem.engine.messages", "amem.engine.types"}
MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top, in a function or for type checking alone."""
    found: set[str] = set()
    package = path.parent.parts
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            source = (base + (node.module or "")).rstrip(".")
            found.add(source)
            # `from amem.engine import client` names a module behind the package
            found |= {f"{source}.{alias.name}" for alias in node.names if is_module(f"{source}.{alias.name}")}
    return found


def is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def foreign(names: set[str]) -> set[str]:
    """Top-level packages that are neither ours nor Python's."""
    return {name.partition(".")[0] for name in names} - {"amem"} - sys.stdlib_module_names


def inside(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def files(*rooms: str) -> list[Path]:
    return [path for path in MODULES if inside(module_name(path), *rooms)]


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if inside(name, "amem")} - {"amem"}


def test_every_room_is_looked_at() -> None:
    for room in ("amem.client", "amem.text", "amem.engine", "amem.kernels", "amem.memory", "amem.server", "amem.cli"):
        assert files(room), room


@pytest.mark.parametrize("path", files("amem.engine", "amem.kernels"), ids=module_name)
def test_the_engine_runs_on_a_bare_gpu_machine(path: Path) -> None:
    assert foreign(imports(path)) <= BARE_MACHINE
    assert not [name for name in ours(path) if not inside(name, "amem.engine", "amem.kernels")]


@pytest.mark.parametrize("path", files("amem.kernels"), ids=module_name)
def test_kernels_know_no_engine(path: Path) -> None:
    assert not [name for name in ours(path) if not inside(name, "amem.kernels")]


@pytest.mark.parametrize("path", files("amem.memory", "amem.text", "amem.server", "amem.client"), ids=module_name)
def test_the_front_never_imports_torch(path: Path) -> None:
    assert not foreign(imports(path)) & {"torch", "triton", "safetensors", "transformers"}


@pytest.mark.parametrize("path", files("amem.server"), ids=module_name)
def test_the_server_reaches_the_engine_through_messages_only(path: Path) -> None:
    reached = {name for name in ours(path) if inside(name, "amem.engine")} - {"amem.engine"}
    assert reached <= ENGINE_BORDER
    assert not [name for name in ours(path) if inside(name, "amem.kernels", "amem.cli", "amem.demo", "amem.bench")]


@pytest.mark.parametrize("path", files("amem.memory", "amem.text"), ids=module_name)
def test_memory_knows_text_and_the_types_of_the_border(path: Path) -> None:
    allowed = ("amem.memory", "amem.text", "amem.engine.types")
    assert not [name for name in ours(path) - {"amem.engine"} if not inside(name, *allowed)]


@pytest.mark.parametrize("path", files("amem.client"), ids=module_name)
def test_the_sdk_needs_the_standard_library_and_for_asyncio_aiohttp(path: Path) -> None:
    allowed = {"aiohttp", "yarl"} if path.name == "asynchronous.py" else set()
    assert foreign(imports(path)) <= allowed
    assert not [name for name in ours(path) if not inside(name, "amem.client")]


def loaded_by(statement: str) -> set[str]:
    """Modules in sys.modules of a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    return set(done.stdout.split())


def test_the_sdk_loads_nothing_heavy() -> None:
    assert not loaded_by("from amem import Amem, AmemError, AsyncAmem\nAmem()") & {"torch", "aiohttp", "numpy"}


def test_no_module_of_the_front_loads_torch() -> None:
    names = [
        module_name(path) for path in files("amem.memory", "amem.text", "amem.server", "amem.client", "amem.cli")
    ]
    names += sorted(ENGINE_BORDER)
    assert not loaded_by(f"import {', '.join(names)}") & {"torch", "triton", "transformers", "safetensors"}


def test_border_types_load_nothing_foreign() -> None:
    assert not loaded_by("import amem.engine.types") & {"torch", "numpy", "msgpack", "aiohttp"}


def test_the_border_check_sees_what_it_should(tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text("def f():\n    from amem.engine import client\n    import torch.nn as nn\n")
    found = imports(sample)
    assert {"amem.engine.client", "torch.nn"} <= found
    assert foreign(found) == {"torch"}
