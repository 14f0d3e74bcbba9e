"""Tests of API keys and the metrics token: headers, local access without keys, cross-site requests, rate limits."""

import hashlib
from collections.abc import Sequence

import pytest
from starlette.requests import HTTPConnection

from access.local import is_local
from serving.auth import LOCAL_TENANT, ApiKeyAuth
from serving.errors import ApiError
from settings import Settings, SettingsError

KEY, OTHER_KEY = "a-key-of-20-letters-", "another-of-20-letter"
METRICS_TOKEN = "token-for-prometheus"


def connection(peer: str = "127.0.0.1", **headers: str) -> HTTPConnection:
    named = {"host": "localhost:7860"} | {name.replace("_", "-"): text for name, text in headers.items()}
    raw = [(name.lower().encode(), text.encode()) for name, text in named.items()]
    return HTTPConnection({"type": "http", "client": (peer, 5), "headers": raw})


def create_auth(*keys: str, **settings: object) -> ApiKeyAuth:
    return ApiKeyAuth(Settings.from_env({"PLAYGROUND_API_KEYS": ",".join(keys)}).api_keys, **settings)  # type: ignore[arg-type]


def rejection_status(auth: ApiKeyAuth, connection: HTTPConnection) -> int:
    with pytest.raises(ApiError) as caught:
        auth.authenticate(connection)
    assert KEY not in str(caught.value.detail)
    return caught.value.status_code


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "127.8.9.1"])
@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860"])
def test_local_requests_are_allowed_without_keys(peer: str, host: str) -> None:
    assert create_auth().authenticate(connection(peer, host=host)) == LOCAL_TENANT


@pytest.mark.parametrize(
    "remote",
    [
        connection("10.0.0.8"),
        connection("testclient"),
        connection(host="rebound.example:7860"),
        connection(host="localhost.example"),
        connection(origin="https://somewhere.example"),
        connection(origin="null"),
    ],
)
def test_remote_requests_are_rejected_without_keys(remote: HTTPConnection) -> None:
    assert not is_local(remote)
    assert rejection_status(create_auth(), remote) == 401


def test_key_is_accepted_from_any_address_in_either_header() -> None:
    auth = create_auth(OTHER_KEY, KEY)
    tenant = auth.authenticate(connection("10.0.0.8", x_moondream_auth=KEY))
    assert tenant == auth.authenticate(connection("10.0.0.8", authorization=f"Bearer {KEY}"))
    assert tenant != auth.authenticate(connection(x_moondream_auth=OTHER_KEY)) and KEY not in tenant


@pytest.mark.parametrize("headers", [{}, {"x_moondream_auth": KEY[:-1]}, {"authorization": f"Basic {KEY}"}])
def test_wrong_or_missing_key_is_rejected_even_locally(headers: dict[str, str]) -> None:
    assert rejection_status(create_auth(KEY), connection(**headers)) == 401


def test_digest_in_the_settings_accepts_its_key_only() -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    assert create_auth(f"sha256:{digest}").authenticate(connection(x_moondream_auth=KEY)) == digest[:16]
    assert rejection_status(create_auth(f"sha256:{digest}"), connection(x_moondream_auth=digest)) == 401


def test_settings_do_not_contain_keys() -> None:
    settings = Settings.from_env({"PLAYGROUND_API_KEYS": f" {KEY} , {OTHER_KEY}", "PLAYGROUND_API_RATE": "3"})
    assert len(settings.api_keys) == 2 and KEY not in repr(vars(settings)) and settings.api_rate == 3.0


@pytest.mark.parametrize("text", ["short", "with space in the key", "sha256:abc", KEY + ",x"])
def test_invalid_key_is_rejected_without_showing_it(text: str) -> None:
    with pytest.raises(SettingsError, match="PLAYGROUND_API_KEYS") as caught:
        Settings.from_env({"PLAYGROUND_API_KEYS": text})
    assert text not in str(caught.value)


def request_statuses(auth: ApiKeyAuth, times: int, key: str = KEY) -> Sequence[int]:
    """Authenticate several times. Return the status of each request."""
    statuses = []
    for _ in range(times):
        try:
            auth.authenticate(connection(x_moondream_auth=key))
            statuses.append(200)
        except ApiError as error:
            assert error.status_code != 429 or int((error.headers or {})["Retry-After"]) >= 1
            statuses.append(error.status_code)
    return statuses


def test_each_key_has_its_own_rate_limit() -> None:
    now = [0.0]
    auth = create_auth(KEY, OTHER_KEY, rate=2.0, clock=lambda: now[0])
    assert request_statuses(auth, 10) == [200] * 8 + [429] * 2
    assert request_statuses(auth, 1, OTHER_KEY) == [200]
    now[0] = 1.0
    assert request_statuses(auth, 3) == [200, 200, 429]


def test_tenant_of_a_key_does_not_count_against_its_rate_limit() -> None:
    auth = create_auth(KEY, OTHER_KEY, rate=0.25, clock=lambda: 0.0)
    keyed = connection("10.0.0.8", x_moondream_auth=KEY)
    assert len({auth.tenant_of(keyed) for _ in range(20)}) == 1
    assert auth.tenant_of(keyed) == auth.authenticate(keyed)
    assert rejection_status(auth, keyed) == 429 and auth.tenant_of(keyed) is not None


@pytest.mark.parametrize("headers", [{}, {"x_moondream_auth": KEY[:-1]}, {"authorization": "Bearer ü"}])
def test_request_without_a_valid_key_has_no_tenant(headers: dict[str, str]) -> None:
    assert create_auth(KEY).tenant_of(connection(**headers)) is None
    assert create_auth().tenant_of(connection(**headers)) is None


def metrics_auth(token: str) -> ApiKeyAuth:
    settings = Settings.from_env({"PLAYGROUND_API_KEYS": KEY, "METRICS_TOKEN": token})
    return ApiKeyAuth(settings.api_keys, settings.api_rate, settings.metrics_token)


def test_metrics_token_is_no_api_key() -> None:
    auth = metrics_auth(METRICS_TOKEN)
    bearer = connection("10.0.0.8", authorization=f"Bearer {METRICS_TOKEN}")
    assert auth.is_metrics_token(bearer)
    assert auth.tenant_of(bearer) is None and rejection_status(auth, bearer) == 401


def test_metrics_token_can_be_configured_as_a_digest() -> None:
    auth = metrics_auth("sha256:" + hashlib.sha256(METRICS_TOKEN.encode()).hexdigest())
    assert auth.is_metrics_token(connection(authorization=f"bearer {METRICS_TOKEN}"))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"Basic {METRICS_TOKEN}"},
        {"x_moondream_auth": METRICS_TOKEN},
    ],
)
def test_other_headers_are_no_metrics_token(headers: dict[str, str]) -> None:
    assert not metrics_auth(METRICS_TOKEN).is_metrics_token(connection(**headers))
    assert not metrics_auth("").is_metrics_token(connection(**headers))


@pytest.mark.parametrize("text", ["short", "with space in the token", "sha256:abc"])
def test_invalid_metrics_token_is_rejected_without_showing_it(text: str) -> None:
    with pytest.raises(SettingsError, match="METRICS_TOKEN: ") as caught:
        Settings.from_env({"METRICS_TOKEN": text})
    assert text not in str(caught.value)


def test_settings_do_not_contain_the_metrics_token() -> None:
    settings = Settings.from_env({"METRICS_TOKEN": METRICS_TOKEN})
    assert METRICS_TOKEN not in repr(vars(settings)) and settings.metrics_token not in repr(settings)
