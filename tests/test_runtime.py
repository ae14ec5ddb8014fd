"""What is set before MLX starts, on each kind of machine; what the user has set stays."""

import pytest

from mlx_loraplus import _runtime

WIDTH, PATIENCE = "MLX_BFS_MAX_WIDTH", "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a new process; MLX itself is not touched."""
    found: dict[str, str] = {}
    monkeypatch.setattr(_runtime.os, "environ", found)
    monkeypatch.setattr(_runtime, "_load_openblas", lambda: None)
    monkeypatch.setattr(_runtime, "_keep_freed_memory", lambda: None)
    monkeypatch.setattr(_runtime, "_installed", lambda package, name: [])
    monkeypatch.delitem(_runtime.sys.modules, "mlx.core", raising=False)
    return found


def set_in(environment: dict[str, str]) -> dict[str, str]:
    """Return what is set for MLX and macOS."""
    return {name: environment[name] for name in (WIDTH, PATIENCE) if name in environment}


def test_a_mac_gets_a_wider_search_and_more_patience(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_runtime.sys, "platform", "darwin")
    _runtime.prepare()
    assert set_in(environment) == {WIDTH: "10", PATIENCE: "1"}


def test_cuda_gets_a_wider_search(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_runtime.sys, "platform", "linux")
    monkeypatch.setattr(_runtime, "_installed", lambda package, name: ["libmlx.so"])
    _runtime.prepare()
    assert set_in(environment) == {WIDTH: "10"}


def test_a_cpu_gets_the_narrow_search(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_runtime.sys, "platform", "linux")
    _runtime.prepare()
    assert set_in(environment) == {WIDTH: "1"}


def test_what_the_user_has_set_stays(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    environment |= {WIDTH: "3", PATIENCE: "0"}
    monkeypatch.setattr(_runtime.sys, "platform", "darwin")
    _runtime.prepare()
    assert set_in(environment) == {WIDTH: "3", PATIENCE: "0"}
