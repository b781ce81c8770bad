"""`amem kv-serve` and `amem serve`: options to a configuration, progress while loading, the banner when ready."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amem import __version__
from amem.cli.console import Failure, print_json, print_line

if TYPE_CHECKING:
    from amem.server.config import ReadyInfo, ServerConfig

ENGINE_PACKAGES = ("torch", "safetensors", "tokenizers", "jinja2", "xxhash")
BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "models" / "demo"
GIB = 1 << 30


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
    model: Annotated[Path | None, typer.Option(help="Checkpoint directory; the bundled demo if absent.")] = None,
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
    found = find_model(model)
    where = (data_dir or default_data_dir()).expanduser().absolute()
    memory = _Memory(kv_pool_gb, kv_ram_gb, kv_disk_gb)
    level = fidelity or (Level.EXACT if context.info_name == "serve" else Level.BALANCED)
    with explained():
        config = _config(found, where, memory, dtype, device, level, _Address(host, port, api_key))
        _run(config, as_json)


@dataclass(frozen=True)
class _Memory:
    """GiB for pages of running requests, stored KV in RAM, stored KV on disk."""

    pool: float
    ram: float
    disk: float


@dataclass(frozen=True)
class _Address:
    host: str
    port: int
    api_key: str | None


def find_model(model: Path | None) -> Path:
    """The checkpoint's directory. Raises Failure when it is none."""
    found = (model or BUNDLED_MODEL).expanduser().absolute()
    if not found.is_dir():
        why = f"{found} is not a directory" + ("" if found.exists() else "; nothing is downloaded")
        raise Failure("there is no model", why, "give --model the directory of a Hugging Face checkpoint")
    if not any(found.glob("*.safetensors")):
        raise Failure("there is no model", f"{found} holds no *.safetensors", "convert the weights to safetensors")
    return found


def default_data_dir() -> Path:
    """Where this user's programs keep their data."""
    import platformdirs

    return Path(platformdirs.user_data_dir("amem"))


def _config(
    model: Path, data_dir: Path, memory: _Memory, dtype: Dtype, device: str, level: Level, address: _Address
) -> ServerConfig:
    from amem.engine.config import EngineConfig
    from amem.engine.launch import EngineLaunch
    from amem.engine.types import Fidelity
    from amem.server.config import AnswerDefaults, ServerConfig

    engine = EngineConfig(
        model=str(model),
        dtype=dtype.value,
        device=device,
        kv_bytes=int(memory.pool * GIB),
        kv_dir=str(data_dir / "kv"),
        ram_bytes=int(memory.ram * GIB),
        disk_bytes=int(memory.disk * GIB),
    )
    return ServerConfig(
        model_dir=model,
        data_dir=data_dir,
        engine=EngineLaunch(engine),
        host=address.host,
        port=address.port,
        api_key=address.api_key,
        answers=AnswerDefaults(fidelity=Fidelity(level.value)),
    )


@contextmanager
def explained() -> Iterator[None]:
    """What keeps a server from starting, as failures that say what to do."""
    from amem.engine.config import ConfigError as EngineConfigError
    from amem.engine.types import EngineError
    from amem.memory.errors import DataDirError
    from amem.server.config import ConfigError
    from amem.text import TextError

    try:
        yield
    except (ConfigError, EngineConfigError) as error:
        raise Failure("the server cannot be started like this", str(error)) from error
    except DataDirError as error:
        raise Failure(
            "the data directory cannot be used", str(error), "stop what uses it, or give --data-dir"
        ) from error
    except (EngineError, TextError) as error:
        raise Failure("the model cannot be served", str(error), "give --model another checkpoint") from error
    except OSError as error:
        raise Failure("the server did not start", str(error)) from error


def _run(config: ServerConfig, as_json: bool) -> None:
    from amem.server.app import serve

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    progress = _Progress() if sys.stderr.isatty() and not as_json else None

    def on_ready(ready: ReadyInfo) -> None:
        if progress is not None:
            progress.close()
        if as_json:
            print_json(asdict(ready) | {"data_dir": str(ready.data_dir), "pid": os.getpid()})
        else:
            print_line("\n".join(banner(ready)))
        sys.stdout.flush()

    try:
        serve(config, on_ready, None if progress is None else progress.update)
    finally:
        if progress is not None:
            progress.close()


def banner(ready: ReadyInfo) -> list[str]:
    """What a person wants to know first: model, memory, addresses, and what to type next."""
    at = "" if ready.url.endswith(":8000") else f" --url {ready.url}"
    auth = "on, by key" if ready.auth else "off, this machine only"
    pool = f"{ready.kv_bytes / GIB:.2g} GiB, {ready.kv_tokens:,} tokens at once, context {ready.max_context:,}"
    return [
        f"amem {__version__} ready in {ready.seconds:.1f} s",
        f"  model    {ready.model}, {ready.dtype} on {ready.device}",
        f"  KV       {pool}",
        f"  data     {ready.data_dir} ({ready.users} users)",
        f"  OpenAI   {ready.url}/v1   health {ready.url}/health   auth {auth}",
        f'  try      amem remember -u alice "Alice lives in Seattle."{at}',
        f'           amem ask -u alice "Where does Alice live?"{at}',
    ]


class _Progress:
    """A bar on standard error while the weights are read."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        columns = (TextColumn("loading the model"), BarColumn(), DownloadColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=None)
        self._bar.start()

    def update(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def close(self) -> None:
        self._bar.stop()
