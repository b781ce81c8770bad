"""`amem kv-serve` and `amem serve`: options to a configuration, progress while loading, the banner when ready."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amem.cli.console import MISUSED, Failure, print_json, print_line

if TYPE_CHECKING:
    from amem.server.config import ReadyInfo, ServerConfig

ENGINE_PACKAGES = ("torch", "safetensors", "tokenizers", "jinja2", "xxhash")
BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "models" / "demo"


class EngineName(str, Enum):
    NATIVE = "native"


class Level(str, Enum):
    EXACT = "exact"
    HIGH = "high"
    BALANCED = "balanced"
    FAST = "fast"


class Dtype(str, Enum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def register(app: typer.Typer) -> None:
    """Add both commands to the application: one server, two presets."""
    exact = "Serve with exact prefix reuse alone: kv-serve with --fidelity exact."
    app.command("kv-serve", rich_help_panel="Serve")(kv_serve)
    app.command("serve", rich_help_panel="Serve", help=exact)(kv_serve)


def need_engine(command: str) -> None:
    """Raises Failure naming the extra, where the packages that run a model are missing."""
    missing = [name for name in ENGINE_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        why = f"it runs a model here, and these packages are missing: {', '.join(missing)}"
        raise Failure(f"`{command}` needs the engine", why, "pip install 'atelya[selfhost]'")


def kv_serve(
    context: typer.Context,
    engine: Annotated[EngineName, typer.Option(help="What runs the model.")] = EngineName.NATIVE,
    model: Annotated[Path | None, typer.Option(help="Checkpoint directory; the bundled demo model if absent.")] = None,
    host: Annotated[str, typer.Option(help="Address to bind; needs a key unless loopback.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="AMEM_API_KEY", help="Ask every client for this key.")] = None,
    data_dir: Annotated[Path | None, typer.Option(envvar="AMEM_DATA_DIR", help="Where memories and KV lie.")] = None,
    fidelity: Annotated[Level | None, typer.Option(help="How near to full prefill.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: float32 on a CPU, the checkpoint's on a GPU.")] = Dtype.AUTO,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    kv_pool_gb: Annotated[float, typer.Option(min=0.001, help="KV of running requests, GiB.")] = 0.5,
    kv_ram_gb: Annotated[float, typer.Option(min=0, help="Stored KV in RAM, GiB.")] = 0.5,
    kv_disk_gb: Annotated[float, typer.Option(min=0, help="Stored KV on disk, GiB; 0 for none.")] = 8.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line when ready.")] = False,
) -> None:
    """Serve a model with memory kept in its KV cache.

    amem kv-serve
    amem kv-serve --model ./Llama-3.1-8B-Instruct --device cuda
    """
    need_engine(f"amem {context.info_name}")
    level = fidelity or (Level.EXACT if context.info_name == "serve" else Level.BALANCED)
