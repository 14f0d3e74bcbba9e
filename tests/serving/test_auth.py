"""Who may ask: keys in two headers, this machine alone without keys, other sites' pages not, and a limit per key."""

import hashlib
from collections.abc import Sequence

import pytest
from starlette.requests import HTTPConnection

from serving.auth import LOCAL, ApiKeyAuth
from serving.errors import ApiError
from settings import Settings, SettingsError

KEY, OTHER = "a-key-of-20-letters-", "another-of-20-letter"


def connection(peer: str = "127.0.0.1", **headers: str) -> HTTPConnection:
    named = {"host": "localhost:7860"} | {name.replace("_", "-"): text for name, text in headers.items()}
    raw = [(name.lower().encode(), text.encode()) for name, text in named.items()]
    return HTTPConnection({"type": "http", "client": (peer, 5), "headers": raw})


def keys(*said: str, **settings: object) -> ApiKeyAuth:
    return ApiKeyAuth(Settings.from_env({"PLAYGROUND_API_KEYS": ",".join(said)}).api_keys, **settings)  # type: ignore[arg-type]


def refusal(keys: ApiKeyAuth, connection: HTTPConnection) -> int:
    with pytest.raises(ApiError) as caught:
        keys.tenant(connection)
    assert KEY not in str(caught.value.detail)
    return caught.value.status_code


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "127.8.9.1"])
@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860"])
def test_without_keys_this_machine_may_ask(peer: str, host: str) -> None:
    assert keys().tenant(connection(peer, host=host)) == LOCAL


@pytest.mark.parametrize(
    "asked",
    [
        connection("10.0.0.8"),
        connection("testclient"),
        connection(host="rebound.example:7860"),
        connection(host="localhost.example"),
        connection(origin="https://somewhere.example"),
        connection(origin="null"),
    ],
)
def test_without_keys_nobody_else_may(asked: HTTPConnection) -> None:
    assert refusal(keys(), asked) == 401


def test_a_key_opens_from_anywhere_in_either_header() -> None:
    ours = keys(OTHER, KEY)
    one = ours.tenant(connection("10.0.0.8", x_moondream_auth=KEY))
    assert one == ours.tenant(connection("10.0.0.8", authorization=f"Bearer {KEY}"))
    assert one != ours.tenant(connection(x_moondream_auth=OTHER)) and KEY not in one


@pytest.mark.parametrize("said", [{}, {"x_moondream_auth": KEY[:-1]}, {"authorization": f"Basic {KEY}"}])
def test_a_wrong_key_or_none_is_refused_even_here(said: dict[str, str]) -> None:
    assert refusal(keys(KEY), connection(**said)) == 401


def test_a_digest_serves_as_well_as_its_key() -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    assert keys(f"sha256:{digest}").tenant(connection(x_moondream_auth=KEY)) == digest[:16]
    assert refusal(keys(f"sha256:{digest}"), connection(x_moondream_auth=digest)) == 401


def test_settings_keep_no_key() -> None:
    read = Settings.from_env({"PLAYGROUND_API_KEYS": f" {KEY} , {OTHER}", "PLAYGROUND_API_RATE": "3"})
    assert len(read.api_keys) == 2 and KEY not in repr(vars(read)) and read.api_rate == 3.0


@pytest.mark.parametrize("said", ["short", "with space in the key", "sha256:abc", KEY + ",x"])
def test_a_key_that_is_none_is_refused_without_being_told(said: str) -> None:
    with pytest.raises(SettingsError, match="PLAYGROUND_API_KEYS") as caught:
        Settings.from_env({"PLAYGROUND_API_KEYS": said})
    assert said not in str(caught.value)


def asks(keys: ApiKeyAuth, times: int, key: str = KEY) -> Sequence[int]:
    """The status of each."""
    found = []
    for _ in range(times):
        try:
            keys.tenant(connection(x_moondream_auth=key))
            found.append(200)
        except ApiError as error:
            assert error.status_code != 429 or int((error.headers or {})["Retry-After"]) >= 1
            found.append(error.status_code)
    return found


def test_each_key_has_a_limit_of_its_own() -> None:
    now = [0.0]
    ours = keys(KEY, OTHER, rate=2.0, clock=lambda: now[0])
    assert asks(ours, 10) == [200] * 8 + [429] * 2
    assert asks(ours, 1, OTHER) == [200]
    now[0] = 1.0
    assert asks(ours, 3) == [200, 200, 429]
