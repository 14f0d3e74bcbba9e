"""Tests of which models a visitor may use, and whose key pays for them."""

from __future__ import annotations

import threading
from dataclasses import asdict, replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from PIL import Image
from pydantic import SecretStr

from access.roles import LOCAL_ADMIN, Role, Visitor
from inference.registry import MODELS
from inference.types import InferenceError, Request
from storage.database import Database
from tests.support import fake_backend
from tests.support.runs import make_config
from training.runs.adapters import AdapterRegistry
from training.runs.run import RunStore
from ui.playground import models as models_module
from ui.playground.compare import ComparisonMeter, compare
from ui.playground.link import PlaygroundSettings, read_link
from ui.playground.models import parse_key, public_models, visitor_models
from ui.playground.picker import check_models, choices
from ui.playground.tab import run
from usage.analytics import UsageAnalytics
from usage.events import Deployment
from usage.prices import Prices
from usage.recorder import Recorder
from usage.time_window import UsageFilter
from usage.visitors import VisitorHasher

GUEST, USER = Visitor(Role.GUEST, "guest:a", "", "a"), Visitor(Role.USER, "hf:1", "ann", "b")
SPACE_ADMIN = Visitor(Role.ADMIN, "hf:2", "owner", "c")
DEPLOYMENT_KEY, OWN_KEY = "md-deployment", "md-own"


@pytest.fixture
def adapters(tmp_path: Path) -> AdapterRegistry:
    return AdapterRegistry(RunStore(tmp_path / "runs"))


@pytest.fixture(autouse=True)
def cloud_model(fake_models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the fake model cloud, which needs a key and has the deployment's."""
    spec = fake_backend.fake_spec("cloud", needs_key=True, key=SecretStr(DEPLOYMENT_KEY))
    monkeypatch.setitem(MODELS, "cloud", spec)


@pytest.mark.parametrize("visitor", [GUEST, USER])
def test_deployments_key_is_for_administrators_only(adapters: AdapterRegistry, visitor: Visitor) -> None:
    models = visitor_models(adapters, visitor)
    assert models.specs["cloud"].key is None and models.payer == "deployment"
    reason = next(choice["reason"] for choice in choices(models) if choice["name"] == "cloud")
    assert "Enter your own under “Moondream API key”" in reason and "only an administrator" in reason


@pytest.mark.parametrize("visitor", [LOCAL_ADMIN, SPACE_ADMIN])
def test_administrators_use_the_deployments_key(adapters: AdapterRegistry, visitor: Visitor) -> None:
    models = visitor_models(adapters, visitor)
    assert models.specs["cloud"].key == SecretStr(DEPLOYMENT_KEY) and models.payer == "deployment"
    assert models.unavailable("cloud") is None


@pytest.mark.parametrize("visitor", [GUEST, USER, LOCAL_ADMIN])
def test_visitors_own_key_is_used_and_pays(adapters: AdapterRegistry, visitor: Visitor) -> None:
    models = visitor_models(adapters, visitor, SecretStr(OWN_KEY))
    assert models.specs["cloud"].key == SecretStr(OWN_KEY) and models.payer == "visitor"
    assert models.specs["one"].key is None
    assert models.unavailable("cloud") is None


def test_guests_comparison_never_uses_the_deployments_key(
    adapters: AdapterRegistry, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is in the call itself: a request can name any model, whatever the picker shows."""
    used = []
    monkeypatch.setattr(models_module, "answer", lambda spec, request, cancel: used.append(spec) or iter(()))
    request, models = Request(photo, "caption", n=1), visitor_models(adapters, GUEST)
    *_, last = compare(["cloud"], request, threading.Event(), models.answer, interval=0.0)
    assert last.columns[0].status == "failed" and "Enter your own under “Moondream API key”" in last.columns[0].error
    assert used == []
    list(compare(["cloud"], request, threading.Event(), visitor_models(adapters, GUEST, SecretStr(OWN_KEY)).answer))
    assert [spec.key for spec in used] == [SecretStr(OWN_KEY)]


@pytest.mark.parametrize(("key", "payer"), [(SecretStr(OWN_KEY), "visitor"), (None, "deployment")])
def test_usage_names_the_payer_and_the_visitors_hash(
    adapters: AdapterRegistry, photo: np.ndarray, tmp_path: Path, key: SecretStr | None, payer: str
) -> None:
    visitor_hash = VisitorHasher(tmp_path).hash("secret")
    recorder = Recorder(Database(f"sqlite:///{tmp_path / 'x.sqlite3'}"), tmp_path / "spool", Deployment("topic", "c0"))
    Image.fromarray(photo).save(tmp_path / "photo.png")
    inputs = asdict(PlaygroundSettings()) | {"models": ["cloud"], "n": 1, "upload": str(tmp_path / "photo.png")}
    inputs |= {"key": "", "reasoning": False}
    models = visitor_models(adapters, SPACE_ADMIN, key)
    *_, last = run(inputs, models, ComparisonMeter(recorder, Prices(), "cpu-upgrade"), visitor_hash)
    recorder.flush()
    (event,) = UsageAnalytics(recorder._database).recent(UsageFilter("week"))
    assert (event.outcome, event.payer, event.session) == ("ok", payer, visitor_hash)
    assert last[1].comparison.status == "done"


def test_tuned_models_of_others_are_neither_offered_nor_named(
    adapters: AdapterRegistry, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = adapters.runs.create(make_config(), owner=USER.id)
    name = f"run-{run.id}"
    monkeypatch.setitem(MODELS, name, replace(MODELS["one"], name=name, title="Ann's model"))
    own, other = visitor_models(adapters, USER), visitor_models(adapters, GUEST)
    assert check_models([name], own.specs) == [name] and read_link({"models": name}, own.specs)[1] == []
    assert all(name not in models.specs for models in (other, public_models()))
    assert read_link({"models": name}, other.specs)[1] == ["models: unknown model"]
    for names in ([name], ["nonsense"]):
        with pytest.raises(gr.Error, match="Unknown model") as raised:
            check_models(names, other.specs)
        assert f", {name}" not in raised.value.message
    with pytest.raises(InferenceError, match="no model called"):
        list(other.answer(name, Request(photo, "caption", n=1), threading.Event()))


def test_invalid_key_is_refused_without_being_repeated() -> None:
    assert parse_key("  ") is None and parse_key(" md-1 ") == SecretStr("md-1")
    with pytest.raises(gr.Error) as raised:
        parse_key("md secret\u202e")
    assert "secret" not in str(raised.value)
