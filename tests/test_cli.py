"""The command line as people use it: through a shell, against a real server, piped and wrong."""

from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from amem import __version__
from amem.child import ServerChild
from amem.cli import app, console
from amem.residue import Samples

VERBS = "kv-serve serve proxy demo remember recall list forget ask users stats bench version".split()


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def amem(*arguments: str, text: str | None = None, **environment: str) -> Done:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AMEM_")}
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
    done = subprocess.run(
        [sys.executable, "-m", "amem", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=kept | environment,
        **given,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def at(running_server: ServerChild) -> Callable[..., Done]:
    return lambda *arguments, text=None: amem(*arguments, text=text, AMEM_URL=running_server.url)


def test_help_lists_every_verb_and_no_other() -> None:
    said = CliRunner().invoke(app, ["--help"])
    assert said.exit_code == 0
    for verb in VERBS:
        assert f" {verb} " in said.output
    assert "mcp" not in said.output
    for verb in set(VERBS) - {"bench"}:
        said = CliRunner().invoke(app, [verb, "--help"])
        assert said.exit_code == 0
        assert "--json" in said.output


def processor_seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert amem(*arguments).status == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_version_is_quick() -> None:
    assert amem("version").out == f"amem {__version__}\n"
    assert amem("version", "--json").json["amem"] == __version__
    # processor time: on an idle machine what the clock shows, on a busy one nearly the same
    assert any(processor_seconds("version") < 0.3 for _ in range(4))


def test_remember_recall_list_forget(at: Callable[..., Done]) -> None:
    user = ("-u", "cli one/two")
    added = at("remember", *user, "Ann lives in Rome.", "Ann works at Fiat.", "--json")
    ids = [item["id"] for item in added.json]
    assert [item["outcome"] for item in added.json] == ["added", "added"]
    assert at("remember", *user, "Ann lives in Rome.", "--json").json[0]["outcome"] == "seen"
    found = at("recall", *user, "Where does Ann live?", "-k", "1", "--explain", "--json").json
    assert [item["text"] for item in found] == ["Ann lives in Rome."]
    assert found[0]["explain"]
    (line,) = at("recall", *user, "Where does Ann live?", "-k", "1", "--explain").out.splitlines()
    assert json.loads(line.split("\t")[3]) == found[0]["explain"]
    listed = at("list", *user)
    assert [line.split("\t")[:2] for line in listed.out.splitlines()] == [
        [ids[0], "Ann lives in Rome."],
        [ids[1], "Ann works at Fiat."],
    ]
    page = at("list", *user, "--limit", "1", "--json").json
    rest = at("list", *user, "--after", page["next"], "--json").json
    assert [item["id"] for item in page["memories"] + rest["memories"]] == ids
    assert page["next"] in at("list", *user, "--limit", "1").err
    assert at("forget", *user, ids[0], "--yes").status == 0
    assert [item["id"] for item in at("list", *user, "--json").json["memories"]] == ids[1:]
    assert at("forget", *user, "--all", "--yes", "--json").status == 0
    assert at("list", *user).out == ""


def test_remember_reads_lines(at: Callable[..., Done]) -> None:
    done = at("remember", "-u", "cli-lines", "--json", text="One fact.\n\n  Another fact.  \n")
    assert len(done.json) == 2
    texts = [item["text"] for item in at("list", "-u", "cli-lines", "--json").json["memories"]]
    assert texts == ["One fact.", "Another fact."]


def test_a_key_supersedes(at: Callable[..., Done]) -> None:
    user = ("-u", "cli-key")
    at("remember", *user, "Bo lives in Oslo.", "--key", "home")
    done = at("remember", *user, "Bo lives in Bergen.", "--key", "home", "--json")
    assert done.json[0]["outcome"] == "superseded"
    assert [item["text"] for item in at("list", *user, "--json").json["memories"]] == ["Bo lives in Bergen."]


def test_ask_users_stats(at: Callable[..., Done]) -> None:
    user = ("-u", "cli-ask")
    at("remember", *user, "Cleo lives in Cairo.")
    answer = at("ask", *user, "Where does Cleo live?", "--max-tokens", "8", "--json").json
    assert answer["amem"]["memories"]
    assert sum(answer["amem"]["tokens"].values()) == answer["usage"]["prompt_tokens"]
    streamed = at("ask", *user, "Where does Cleo live?", "--max-tokens", "8")
    assert (streamed.status, streamed.err) == (0, "")
    assert streamed.out == answer["choices"][0]["message"]["content"] + "\n"
    names = [item["user"] for item in at("users", "--json").json]
    assert "cli-ask" in names
    first = at("users", "--limit", "1", "--json")
    assert ([item["user"] for item in first.json], names[0] in first.err) == (names[:1], True)
    assert [item["user"] for item in at("users", "--after", names[0], "--json").json] == names[1:]
    assert at("stats", "--json").json["server"]["chat_requests"] >= 2
    assert "server.chat_requests\t" in at("stats").out


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (("forget", "-u", "x"), "amem list"),
        (("forget", "-u", "x", "id", "--all"), "amem list"),
        (("forget", "-u", "x", "--all"), "--yes"),
        (("remember", "-u", "x", "a", "b", "--key", "k"), "one by one"),
    ],
)
def test_misuse_is_2_and_says_the_way_out(arguments: tuple[str, ...], fix: str) -> None:
    done = amem(*arguments, AMEM_URL="http://127.0.0.1:9")
    assert done.status == 2
    assert fix in done.err
    assert done.out == ""


@pytest.mark.parametrize("arguments", [("list",), ("nonsense",), ("kv-serve", "--port", "70000"), ("ask",)])
def test_wrong_words_are_2(arguments: tuple[str, ...]) -> None:
    done = amem(*arguments)
    assert done.status == 2
    assert "Traceback" not in done.err


def test_nobody_there_is_1_and_names_the_command() -> None:
    done = amem("list", "-u", "x", "--url", "http://127.0.0.1:9")
    assert done.status == 1
    assert done.err.startswith("error: no amem server answers at http://127.0.0.1:9\n")
    assert "amem kv-serve" in done.err
    failed = json.loads(amem("list", "-u", "x", "--url", "http://127.0.0.1:9", "--json").err)
    assert set(failed["error"]) == {"what", "why", "fix"}


def test_a_refusal_is_1_and_explained(at: Callable[..., Done]) -> None:
    for arguments in (
        ("forget", "-u", "nobody", "mem-0", "--yes"),
        ("list", "-u", "bad\x01name"),
        ("list", "-u", ""),
    ):
        done = at(*arguments)
        assert done.status == 1, arguments
        assert "the server refused this (status 4" in done.err
        assert "Traceback" not in done.err


def test_a_key_is_asked_for(new_server: Callable[..., ServerChild]) -> None:
    server = new_server("--api-key", "secret")
    server.start()
    done = amem("list", "-u", "x", AMEM_URL=server.url)
    assert done.status == 1
    assert "AMEM_API_KEY" in done.err
    assert amem("list", "-u", "x", AMEM_URL=server.url, AMEM_API_KEY="secret").status == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--host", "0.0.0.0"), "AMEM_API_KEY"),
        (("--api-key", ""), "AMEM_API_KEY"),
        (("--model", "/does/not/exist"), "--model"),
        (("--model", "."), "safetensors"),
        (("--host", "256.1.1.1", "--api-key", "k"), "256.1.1.1"),
    ],
)
def test_a_server_that_cannot_start_says_why(arguments: tuple[str, ...], word: str, tmp_path: Path) -> None:
    done = amem("kv-serve", "--port", "0", "--data-dir", str(tmp_path / "data"), *arguments)
    assert done.status == 1
    assert word in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("arguments", "word"), [(("--api-key", ""), "key is empty"), (("--host", "0.0.0.0"), "AMEM_API_KEY")]
)
def test_a_proxy_that_must_not_start_says_why(arguments: tuple[str, ...], word: str, tmp_path: Path) -> None:
    done = amem("proxy", "--upstream", "http://127.0.0.1:9/v1", "--data-dir", str(tmp_path / "data"), *arguments)
    assert (done.status, done.out) == (1, "")
    assert word in done.err
    assert "Traceback" not in done.err


def test_a_second_server_is_kept_from_port_and_data(running_server: ServerChild, tmp_path: Path) -> None:
    port = running_server.url.rpartition(":")[2]
    for arguments in (
        ("--port", port, "--data-dir", str(tmp_path)),
        ("--data-dir", running_server.ready["data_dir"]),
    ):
        done = amem("kv-serve", "--port", "0", *arguments)
        assert done.status == 1
        assert done.err.startswith("error: ")
        assert "Traceback" not in done.err


def test_stored_text_cannot_steer_a_terminal(at: Callable[..., Done], running_server: ServerChild) -> None:
    at("remember", "-u", "cli-escape", "red \x1b[31malert\x1b]0;title\x07 [bold]not markup[/bold]")
    leader, follower = pty.openpty()
    kept = os.environ | {"AMEM_URL": running_server.url, "COLUMNS": "200", "TERM": "xterm"}
    command = [sys.executable, "-m", "amem", "list", "-u", "cli-escape"]
    subprocess.run(command, stdout=follower, stdin=subprocess.DEVNULL, env=kept, timeout=60, check=True)
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert "\x1b[31m" not in shown
    assert "\x1b]0;" not in shown
    assert "[bold]not markup[/bold]" in shown


def test_an_answer_cannot_steer_a_terminal() -> None:
    class Hostile(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            chunk = {"choices": [{"index": 0, "delta": {"content": "red \x1b[31malert"}, "finish_reason": "stop"}]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode())

        def log_message(self, format: str, *args: Any) -> None:
            return

    leader, follower = pty.openpty()
    with HTTPServer(("127.0.0.1", 0), Hostile) as peer:
        threading.Thread(target=peer.handle_request, daemon=True).start()
        kept = os.environ | {"AMEM_URL": f"http://127.0.0.1:{peer.server_port}", "TERM": "xterm"}
        command = [sys.executable, "-m", "amem", "ask", "What now?"]
        subprocess.run(command, stdout=follower, stdin=subprocess.DEVNULL, env=kept, timeout=60, check=True)
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert "red \ufffd[31malert" in shown
    assert "\x1b[31m" not in shown


def test_what_is_shown() -> None:
    assert console.shown("a\tb\nc\x1b[0m\x00é😀") == "a\tb\nc\ufffd[0m\ufffdé😀"


def test_residue_is_found_and_missed(tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    directory.mkdir()
    data = os.urandom(1 << 16)
    (directory / "chunk").write_bytes(bytes(4096) + data)
    samples = Samples.of(directory)
    assert len(samples.blocks) > 32
    assert samples.found_in(tmp_path) == len(samples.blocks)
    (directory / "chunk").write_bytes(b"")
    (tmp_path / "elsewhere").write_bytes(b"x" * 77 + data[: 1 << 15])
    assert 0 < samples.found_in(tmp_path) < len(samples.blocks)
    (tmp_path / "elsewhere").unlink()
    assert samples.found_in(tmp_path) == 0
