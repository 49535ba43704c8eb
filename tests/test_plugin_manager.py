"""Finding plugins, and surviving bad ones."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest

import autoflux
from autoflux import hookspecs
from autoflux.cli.main import run
from autoflux.errors import PluginConflict, UnknownName
from autoflux.plugin_manager import BUILT_IN, load_plugins

ROOT = Path(__file__).parents[1]
HOOKS = [name for name in vars(hookspecs) if name.startswith("register_")]


class Plugin:
    """A plugin offering one frontend."""

    def __init__(self, name: str) -> None:
        self.offer = SimpleNamespace(name=name, description="", missing=lambda: None)

    @autoflux.hookimpl
    def register_frontends(self, register):
        register(self.offer)


class Broken:
    """A plugin whose hook fails."""

    @autoflux.hookimpl
    def register_models(self, register):
        raise RuntimeError("no models today")


class Misspelt:
    """A plugin for a hook that does not exist."""

    @autoflux.hookimpl
    def register_model(self, register):
        raise AssertionError


def test_what_a_plugin_offers_is_found_by_name():
    plugins = load_plugins(Plugin("mine"), entry_points=False)
    assert plugins.frontends.get("mine").name == "mine"
    assert plugins.problems == []
    with pytest.raises(UnknownName, match="mine") as caught:
        plugins.frontends.get("mime")
    assert "did you mean 'mine'" in caught.value.hint


def test_two_offers_of_one_name_are_an_error_naming_both_plugins():
    first, second = Plugin("mine"), Plugin("mine")
    with pytest.raises(PluginConflict) as caught:
        load_plugins(first, second, entry_points=False)
    for plugin in (first, second):
        assert repr(str(id(plugin))) in caught.value.message


def test_a_broken_plugin_is_reported_and_the_rest_works():
    plugins = load_plugins(Broken(), Misspelt(), Plugin("mine"), entry_points=False)
    assert "mine" in plugins.frontends.names()
    assert "sample" in plugins.models.names()
    messages = [p.message for p in plugins.problems]
    assert any("no models today" in m for m in messages)
    assert any("register_model" in m for m in messages)
    assert all("Traceback" in p.details or "Error" in p.details for p in plugins.problems)


def test_a_plugin_that_does_not_import_is_listed(monkeypatch, tmp_path, capsys):
    (tmp_path / "explosive_plugin.py").write_text("raise ImportError('needs [unobtainium]')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("AUTOFLUX_PLUGINS", "explosive_plugin,absent_plugin")
    assert run(["plugins"]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "broken: explosive_plugin: ImportError: needs [unobtainium]" in out
    assert "broken: absent_plugin: ModuleNotFoundError" in out


def test_every_built_in_offers_something(capsys):
    plugins = load_plugins(entry_points=False)
    assert plugins.problems == []
    owners = {
        registry.owner(name)
        for registry in (plugins.backends, plugins.frontends, plugins.models, plugins.profiles, plugins.commands)
        for name in registry.names()
    }
    assert owners == set(BUILT_IN)
    assert run(["plugins"]) == 0
    out = capsys.readouterr().out
    for name in ("diffusers", "gradio", "sample", "cuda-turing", "doctor"):
        assert name in out


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_documented_and_used_by_a_built_in(hook):
    assert (getattr(hookspecs, hook).__doc__ or "").strip()
    assert f"### {hook}\n" in (ROOT / "docs" / "plugins.md").read_text()
    users = [f.name for f in (ROOT / "plugins").glob("*.py") if f"def {hook}(" in f.read_text()]
    assert users, hook
    assert list(inspect.signature(getattr(hookspecs, hook)).parameters) == ["register"]


def test_a_plugin_cannot_replace_a_built_in_command(capsys):
    import click

    class Thief:
        @autoflux.hookimpl
        def register_commands(self, register):
            register(click.Command("plan"))

    assert run(["--help"], load_plugins(Thief(), entry_points=False)) == 1
    assert "'plan', which is built in" in capsys.readouterr().err
