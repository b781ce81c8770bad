"""Who may call: every route with every way of not having the key, and a page that tries to borrow a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serverlib import JSON, Client, ServerThread, config_in, error_of

from amem.server.config import ConfigError

KEY = "sk-secret-key"
ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/amem"),
    ("POST", "/v1/memories"),
    ("GET", "/v1/memories?user=a"),
    ("DELETE", "/v1/memories?user=a"),
    ("GET", "/v1/memories/a"),
    ("DELETE", "/v1/memories/a"),
    ("GET", "/v1/memories/a/b"),
    ("PATCH", "/v1/memories/a/b"),
    ("DELETE", "/v1/memories/a/b"),
    ("POST", "/v1/recall"),
    ("POST", "/v1/sessions"),
    ("GET", "/v1/sessions/a"),
    ("DELETE", "/v1/sessions/a"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/stats"),
    ("GET", "/v1/users"),
    ("GET", "/nowhere"),
]
WRONG = [
    {},
    {"Authorization": ""},
    {"Authorization": KEY},
    {"Authorization": "Bearer"},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": f"Bearer {KEY[:-1]}"},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": "Bearer " + "x" * 4000},
    {"x-api-key": KEY},
]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    running = ServerThread(config_in(tmp_path_factory.mktemp("locked") / "data", api_key=KEY), engine=False)
    yield running
    running.stop()


@pytest.mark.parametrize("headers", WRONG, ids=str)
def test_every_route_asks_for_the_key(locked: ServerThread, headers: dict[str, str]) -> None:
    stranger = Client(locked.url)
    for method, path in ROUTES:
        answer = stranger.request(method, path, b'{"user": "a", "texts": ["x"]}', headers=JSON | headers)
        assert answer.status == 401, (method, path)
        assert error_of(answer)["code"] == "invalid_api_key"
        assert KEY not in answer.text
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    stranger.close()
    assert locked.texts("a") == []


def test_the_key_opens_and_health_needs_none(locked: ServerThread) -> None:
    assert locked.remember("b", "Inside.")
    for scheme in ("Bearer", "bearer", "BEARER"):
        answer = Client(locked.url).get("/v1/users", headers={"Authorization": f"{scheme} {KEY}"})
        assert answer.status == 200
    health = Client(locked.url).get("/health")
    assert health.status == 503  # this one runs without its engine
    assert str(locked.server.services.config.data_dir) not in health.text
    assert "b" not in health.json()


def test_a_key_in_the_query_is_no_key(locked: ServerThread) -> None:
    assert Client(locked.url).get("/v1/users", params={"api_key": KEY}).status == 401


def test_two_authorizations_are_none(locked: ServerThread) -> None:
    import http.client

    connection = http.client.HTTPConnection(locked.url.removeprefix("http://"))
    connection.putrequest("GET", "/v1/users")
    connection.putheader("Authorization", f"Bearer {KEY}")
    connection.putheader("Authorization", "Bearer other")
    connection.endheaders()
    assert connection.getresponse().status == 401
    connection.close()


def test_without_a_key_anything_goes_on_loopback_names_only(start: Callable[..., ServerThread]) -> None:
    server = start(engine=False)
    assert server.get("/v1/users", headers={"Authorization": "Bearer anything"}).status == 200
    for host in ("localhost", "localhost:8000", "127.0.0.1", "127.0.0.1:1", "[::1]:80", "LOCALHOST"):
        assert server.get("/v1/users", headers={"Host": host}).status == 200
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.0.7", "", "localhost.evil"):
        answer = server.get("/v1/users", headers={"Host": host})
        assert answer.status == 403, host
        assert error_of(answer)["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_an_open_address_needs_a_key(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="AMEM_API_KEY"):
        config_in(tmp_path, host=host)
    assert config_in(tmp_path, host=host, api_key="k").host == host
    with pytest.raises(ConfigError):
        config_in(tmp_path, api_key=" ")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_loopback_needs_none(host: str, tmp_path: Path) -> None:
    assert config_in(tmp_path, host=host).api_key is None
