"""The hooks. Each has a test here and a section in docs/plugins.md, as the last tests check."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from corefw import hookspecs
from corefw.channel import Channel, Interrupt, Listener, Transport, TransportContext, TransportFeatures
from corefw.declarations import Capability, Declarations
from corefw.errors import ChannelError, PluginError, SettingsError, UriError
from corefw.hookcalls import PluginCommand
from corefw.hookspecs import hookimpl
from corefw.plugins import HOOKS, Plugins
from corefw.section import IncomingContext, LiveLoader, SectionKey, StateSaver
from corefw.settings import Settings
from corefw.states import MigrationStatus, Side
from corefw.testing.blockers import BlockersCase, check_blockers
from corefw.testing.commands import CommandsCase, check_commands
from corefw.testing.settings import check_settings
from corefw.uri import MigrationUri
from corefw.wire.stream import StreamReader, StreamWriter
from tests.helpers.machines import CountingMachine

if TYPE_CHECKING:
    from corefw.control import MigrationControl
    from corefw.machine import Machine

PAGE = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
MACHINE = cast("Machine", object())  # handed through to the hooks, which do not look at it
CONTROL = cast("MigrationControl", types.SimpleNamespace(name="demo"))


class NoTransport(Transport):
    """Refuses to connect: the tests only look at which plugin makes it."""

    features = TransportFeatures(return_path=False, multi_channel=False)

    def connect(self, interrupt: Interrupt) -> Channel:
        raise ChannelError("no way")

    def listen(self) -> Listener:
        raise ChannelError("no way")


class Saver(StateSaver):
    version_id = 1

    def __init__(self, idstr: str, priority: int = 0) -> None:
        self.idstr = idstr
        self.priority = priority

    def blocked(self) -> str | None:
        return None

    def needed(self) -> bool:
        return False

    def save(self, writer: StreamWriter) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {}


class Loader(LiveLoader):
    version_id = minimum_version = 1

    def __init__(self, idstr: str) -> None:
        self.idstr = idstr

    def required(self) -> bool:
        return False

    def setup(self, context: IncomingContext) -> None:
        pass

    def load(self, reader: StreamReader, version_id: int) -> None:
        pass

    def cleanup(self) -> None:
        pass


class Plugin:
    """An object whose hooks are the given functions."""

    def __init__(self, **hooks: Callable[..., object]) -> None:
        for name, function in hooks.items():
            setattr(self, name, hookimpl(function))


def plugins(**named: object) -> Plugins:
    """Plugins that are called in this order: registered in reverse, because pluggy calls the last one first."""
    made = Plugins()
    for name, plugin in reversed(named.items()):
        made.register(plugin, name)
    return made


def fail(message: str) -> Any:
    raise ZeroDivisionError(message)


def test_corefw_transport() -> None:
    asked: list[str] = []

    def of(name: str, scheme: str) -> Plugin:
        def corefw_transport(uri: MigrationUri, context: TransportContext) -> Transport | None:
            asked.append(name)
            return NoTransport(uri, context) if uri.scheme == scheme else None

        return Plugin(corefw_transport=corefw_transport)

    found = plugins(one=of("one", "x-one"), two=of("two", "x-two"))
    assert isinstance(found.transport("x-one:there"), NoTransport)
    assert asked == ["one"], "the first answer counts"
    assert str(found.transport(MigrationUri("x-two", "there")).uri) == "x-two:there"
    assert asked == ["one", "one", "two"]
    with pytest.raises(UriError, match=r"'x-three:y': no installed plugin has the scheme 'x-three' \(installed: .*tcp"):
        found.transport("x-three:y")


def test_corefw_transport_that_fails_is_passed_over() -> None:
    broken = Plugin(corefw_transport=lambda uri: fail("oh"))
    wrong = Plugin(corefw_transport=lambda uri: 5)
    good = Plugin(corefw_transport=lambda uri, context: NoTransport(uri, context))
    assert isinstance(plugins(wrong=wrong, broken=broken, good=good).transport("x:y"), NoTransport)
    with pytest.raises(PluginError, match=r"plugin 'broken' \(corefw_transport\) failed: ZeroDivisionError: oh"):
        plugins(broken=broken).transport("x:y")
    with pytest.raises(PluginError, match=r"plugin 'wrong' \(corefw_transport\) gave int, expected a Transport"):
        plugins(wrong=wrong).transport("x:y")


def test_corefw_transport_says_what_is_wrong_with_a_uri() -> None:
    def corefw_transport(uri: MigrationUri) -> Transport | None:
        raise UriError(f"'{uri}': no")

    with pytest.raises(UriError, match="'x:y': no"):
        plugins(picky=Plugin(corefw_transport=corefw_transport)).transport("x:y")


def test_corefw_section_savers() -> None:
    found = plugins(
        b=Plugin(corefw_section_savers=lambda machine, settings: [Saver("b1"), Saver("b2", 10)]),
        a=Plugin(corefw_section_savers=lambda settings: (Saver(name) for name in ("a1",))),
        none=Plugin(corefw_section_savers=lambda: None),
    )
    savers = found.section_savers(MACHINE, Settings())
    assert [saver.idstr for saver in savers] == ["b2", "b1", "a1"], "by priority, then in the order of the calls"
    assert savers.find(SectionKey("a1", 0)) is not savers.find(SectionKey("b1", 0))
    again = found.section_savers(MACHINE, Settings())
    assert not set(map(id, again)) & set(map(id, savers)), "new ones each time"


def test_corefw_section_loaders() -> None:
    found = plugins(
        b=Plugin(corefw_section_loaders=lambda machine: [Loader("b1"), Loader("b2")]),
        a=Plugin(corefw_section_loaders=lambda: (Loader("a1"),)),
    )
    loaders = found.section_loaders(MACHINE, Settings())
    assert [loader.idstr for loader in loaders] == ["b1", "b2", "a1"]
    assert loaders.find(SectionKey("unknown", 0)) is None


def generator_that_fails() -> Iterable[object]:
    yield from ()
    fail("midway")


@pytest.mark.parametrize(("hook", "kind"), [("corefw_section_savers", Saver), ("corefw_section_loaders", Loader)])
@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda kind: fail("oh"), r"plugin 'it' \({hook}\) failed: ZeroDivisionError: oh"),
        (lambda kind: generator_that_fails(), r"plugin 'it' \({hook}\) failed: ZeroDivisionError: midway"),
        (lambda kind: 5, r"plugin 'it' \({hook}\) gave int, expected a list"),
        (lambda kind: ["x"], "plugin 'it': 'x' is not a Section(Saver|Loader)"),
        (lambda kind: [kind("x"), kind("x")], r"two plugins claim section 'x' \(instance 0\)"),
    ],
)
def test_section_hooks_that_fail(hook: str, kind: type, ask: Callable[[type], object], message: str) -> None:
    found = plugins(it=Plugin(**{hook: lambda machine: ask(kind)}))
    with pytest.raises(PluginError, match=message.replace("{hook}", hook)):
        found.section_savers(MACHINE, Settings())
        found.section_loaders(MACHINE, Settings())


def test_corefw_blockers() -> None:
    found = plugins(
        one=Plugin(corefw_blockers=lambda machine, settings: ["'grid' is attached to a GPU (detach it first)"]),
        free=Plugin(corefw_blockers=lambda: ()),
        broken=Plugin(corefw_blockers=lambda: fail("no idea")),
        two=Plugin(corefw_blockers=lambda: (reason for reason in ("a", "b"))),
    )
    assert found.blockers(MACHINE, Settings()) == [
        "'grid' is attached to a GPU (detach it first)",
        "plugin 'broken' (corefw_blockers) failed: ZeroDivisionError: no idea",
        "a",
        "b",
    ]


def test_corefw_settings() -> None:
    asked: list[str] = []

    def corefw_settings() -> Declarations:
        asked.append("once")
        return Declarations((Capability("x-mine", "mine"),), implements=frozenset({"x-mine", "xbzrle"}))

    found = plugins(mine=Plugin(corefw_settings=corefw_settings))
    settings = found.settings()
    settings.set_capabilities({"x-mine": True, "xbzrle": True})
    assert not found.settings().capability("x-mine"), "each engine has its own values"
    assert asked == ["once"]
    with pytest.raises(SettingsError, match="capability 'multifd' is not supported by any installed plugin"):
        settings.set_capabilities({"multifd": True})


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (lambda: fail("oh"), r"plugin 'it' \(corefw_settings\) failed: ZeroDivisionError: oh"),
        (lambda: None, r"plugin 'it' \(corefw_settings\) gave NoneType, expected Declarations"),
        (lambda: Declarations((Capability("events", "again"),)), "plugin 'it': 'events' is declared by two plugins"),
        (
            lambda: Declarations(implements=frozenset({"evnts"})),
            "plugin 'it': plugins implement settings that no plugin declares",
        ),
        (
            lambda: Declarations(capabilities=cast("Any", ("x",))),
            "plugin 'it': its Declarations are not in order: AttributeError",
        ),
    ],
)
def test_corefw_settings_that_are_wrong_leave_the_plugin_out(hook: Callable[..., object], message: str) -> None:
    found = plugins(other=Plugin(corefw_blockers=lambda: ["other"]))
    before = found.settings().capabilities()
    with pytest.raises(PluginError, match=message):
        found.register(Plugin(corefw_settings=hook, corefw_blockers=lambda: ["it"]), "it")
    assert found.settings().capabilities() == before
    assert found.blockers(MACHINE, Settings()) == ["other"], "as a whole"


def test_corefw_state_changed(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[object, ...]] = []
    found = plugins(
        all=Plugin(corefw_state_changed=lambda side, old, new: heard.append((side, old, new))),
        broken=Plugin(corefw_state_changed=lambda: fail("oh")),
        some=Plugin(corefw_state_changed=lambda new: heard.append((new,))),
    )
    found.state_changed(Side.SOURCE, MigrationStatus.NONE, MigrationStatus.SETUP)
    assert heard == [(Side.SOURCE, MigrationStatus.NONE, MigrationStatus.SETUP), (MigrationStatus.SETUP,)]
    assert "plugin 'broken' failed in corefw_state_changed" in caplog.text


def test_corefw_commands(caplog: pytest.LogCaptureFixture) -> None:
    def one() -> int:
        return 1

    def two() -> int:
        return 2

    found = plugins(
        first=Plugin(corefw_commands=lambda control: {"x-one": one}),
        broken=Plugin(corefw_commands=lambda: fail("oh")),
        wrong=Plugin(corefw_commands=lambda: ["x-two"]),
        late=Plugin(corefw_commands=lambda: {"x-one": two, "x-two": two}),
    )
    assert {name: added.function for name, added in found.commands(CONTROL).items()} == {"x-one": one, "x-two": two}
    assert "plugin 'broken' failed in corefw_commands" in caplog.text
    assert "plugin 'wrong' (corefw_commands) gave list, expected a mapping" in caplog.text
    assert "plugin 'late' adds the command 'x-one' that another plugin has" in caplog.text


# -- wrappers and order ------------------------------------------------------------------------------------------------


class Wrapper:
    """A third party's plugin that wraps every hook with many implementers, sees the results and changes them."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    @hookimpl(wrapper=True)
    def corefw_section_savers(self, machine: Machine) -> Generator[None, list[list[StateSaver]], object]:
        results = yield
        self.seen.append([saver.idstr for savers in results for saver in savers])
        return [*results, [Saver("added")]]

    @hookimpl(wrapper=True)
    def corefw_section_loaders(self) -> Generator[None, list[list[LiveLoader]], object]:
        results = yield
        self.seen.append([loader.idstr for loaders in results for loader in loaders])
        return [*results, (Loader(name) for name in ("added",))]

    @hookimpl(wrapper=True)
    def corefw_blockers(self) -> Generator[None, list[list[str]], object]:
        results = yield
        self.seen.append(results)
        return [[reason for reasons in results for reason in reasons if reason != "waived"]]

    @hookimpl(wrapper=True)
    def corefw_settings(self) -> Generator[None, list[Declarations], object]:
        results = yield
        (declared,) = results
        self.seen.append([one.name for one in declared.capabilities])
        return [replace(declared, implements=frozenset({"xbzrle"}))]

    @hookimpl(wrapper=True)
    def corefw_state_changed(self, new: MigrationStatus) -> Generator[None, list[object], object]:
        self.seen.append(f"before {new}")
        results = yield
        self.seen.append(f"after {new}")
        return results

    @hookimpl(wrapper=True)
    def corefw_commands(self) -> Generator[None, list[Mapping[str, PluginCommand]], object]:
        results = yield
        self.seen.append([(name, one.plugin) for commands in results for name, one in commands.items()])
        return [*({f"x-{name}": one for name, one in commands.items()} for commands in results), {"added": len}]


def test_a_wrapper_sees_and_changes_the_results_of_all() -> None:
    heard: list[MigrationStatus] = []
    wrapper = Wrapper()
    inner = Plugin(
        corefw_section_savers=lambda: [Saver("mine")],
        corefw_section_loaders=lambda: [Loader("mine")],
        corefw_blockers=lambda: ["waived", "kept"],
        corefw_settings=lambda: Declarations((Capability("x-mine", "mine"),)),
        corefw_state_changed=lambda new: heard.append(new),
        corefw_commands=lambda: {"mine": max},
    )
    found = plugins(inner=inner, wrapper=wrapper)
    found.settings().set_capabilities({"xbzrle": True})
    with pytest.raises(SettingsError):
        found.settings().set_capabilities({"x-mine": True})
    assert [saver.idstr for saver in found.section_savers(MACHINE, Settings())] == ["mine", "added"]
    assert [loader.idstr for loader in found.section_loaders(MACHINE, Settings())] == ["mine", "added"]
    assert found.blockers(MACHINE, Settings()) == ["kept"]
    found.state_changed(Side.SOURCE, MigrationStatus.NONE, MigrationStatus.SETUP)
    assert found.commands(CONTROL) == {"x-mine": PluginCommand("inner", max), "added": PluginCommand("wrapper", len)}
    assert wrapper.seen == [
        ["x-mine"],
        ["mine"],
        ["mine"],
        [["waived", "kept"]],
        "before setup",
        "after setup",
        [("mine", "inner")],
    ]
    assert heard == ["setup"]
    wrapped = {name for name in HOOKS if hasattr(wrapper, name)}
    assert wrapped == set(HOOKS) - {"corefw_transport"}, "which has one answer: see below"


def test_a_wrapper_of_corefw_transport_sees_the_first_answer() -> None:
    class Renaming:
        @hookimpl(wrapper=True)
        def corefw_transport(
            self, uri: MigrationUri, context: TransportContext
        ) -> Generator[None, Transport | None, Transport | None]:
            made = yield
            return made or NoTransport(MigrationUri("x-other", uri.rest), context)

    one = Plugin(corefw_transport=lambda uri, context: NoTransport(uri, context) if uri.scheme == "x-one" else None)
    found = plugins(renaming=Renaming(), one=one)
    assert str(found.transport("x-one:there").uri) == "x-one:there"
    assert str(found.transport("x-two:there").uri) == "x-other:there"


class Broken:
    """Wrappers that fail before or after their yield, yield twice, or do not yield."""

    def __init__(self, how: str) -> None:
        self._how = how

    def _wrap(self) -> Generator[None, Any, Any]:
        if self._how == "before":
            fail("oh")
        if self._how == "never":
            return
        results = yield
        if self._how == "behind":
            fail("oh")
        if self._how == "twice":
            yield
        return 5 if self._how == "no list" else results

    @hookimpl(wrapper=True)
    def corefw_section_savers(self) -> Generator[None, Any, Any]:
        return (yield from self._wrap())

    @hookimpl(wrapper=True)
    def corefw_blockers(self) -> Generator[None, Any, Any]:
        return (yield from self._wrap())

    @hookimpl(wrapper=True)
    def corefw_state_changed(self) -> Generator[None, Any, Any]:
        return (yield from self._wrap())

    @hookimpl(wrapper=True)
    def corefw_transport(self) -> Generator[None, Any, Any]:
        return (yield from self._wrap())


WRONG: Mapping[str, str] = {
    "before": "failed: ZeroDivisionError: oh",
    "behind": "failed: ZeroDivisionError: oh",
    "never": "failed: TypeError: a hook wrapper has to yield once",
    "twice": "failed: a hook wrapper has to yield once",
    "no list": "gave int, expected the list of results",
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrapper_that_fails_is_named_and_the_others_are_called(how: str, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[MigrationStatus] = []
    inner = Plugin(
        corefw_section_savers=lambda: [Saver("mine")],
        corefw_blockers=lambda: ["mine"],
        corefw_state_changed=lambda new: heard.append(new),
        corefw_transport=lambda uri, context: NoTransport(uri, context),
    )
    found = plugins(broken=Broken(how), inner=inner)
    with pytest.raises(PluginError) as caught:
        found.section_savers(MACHINE, Settings())
    assert str(caught.value) == f"plugin 'broken' (corefw_section_savers) {WRONG[how]}"
    assert found.blockers(MACHINE, Settings()) == ["mine", f"plugin 'broken' (corefw_blockers) {WRONG[how]}"]
    found.state_changed(Side.SOURCE, MigrationStatus.NONE, MigrationStatus.SETUP)
    assert heard == ["setup"]
    assert f"plugin 'broken' failed in corefw_state_changed: plugin 'broken' (corefw_state_changed) {WRONG[how]}" in (
        caplog.text
    )
    assert isinstance(found.transport("x-one:there"), NoTransport)


def test_a_wrapper_may_handle_what_a_plugin_raised() -> None:
    class Forgiving:
        @hookimpl(wrapper=True)
        def corefw_section_savers(self) -> Generator[None, Any, list[list[StateSaver]]]:
            try:
                return cast("list[list[StateSaver]]", (yield))
            except PluginError as error:
                return [[Saver(str(error))]]

    class Passing:
        @hookimpl(wrapper=True)
        def corefw_section_savers(self) -> Generator[None, Any, Any]:
            return (yield)

    broken = Plugin(corefw_section_savers=lambda: fail("oh"))
    (saver,) = plugins(forgiving=Forgiving(), passing=Passing(), broken=broken).section_savers(MACHINE, Settings())
    reason = "plugin 'broken' (corefw_section_savers) failed: ZeroDivisionError: oh"
    assert saver.idstr == reason
    with pytest.raises(PluginError) as caught:
        plugins(passing=Passing(), broken=broken).section_savers(MACHINE, Settings())
    assert str(caught.value) == reason


def test_a_wrapper_has_to_be_a_generator_function() -> None:
    class Plain:
        @hookimpl(wrapper=True)
        def corefw_blockers(self) -> list[str]:
            return []

    with pytest.raises(PluginError, match=r"plugin 'it' \(corefw_blockers\) is no hook wrapper: expected a generator"):
        plugins(it=Plain())


def test_plugins_are_called_in_the_order_that_they_ask_for() -> None:
    class First:
        @hookimpl(tryfirst=True)
        def corefw_blockers(self) -> list[str]:
            return ["first"]

    class Last:
        @hookimpl(trylast=True)
        def corefw_blockers(self) -> list[str]:
            return ["last"]

    between = Plugin(corefw_blockers=lambda: ["between"])
    assert plugins(last=Last(), between=between, first=First()).blockers(MACHINE, Settings()) == [
        "first",
        "between",
        "last",
    ]


def test_calls_are_traced_at_the_level_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "corefw.plugins")
    found = plugins(one=Plugin(corefw_blockers=lambda: ["in the way"]))
    found.blockers(MACHINE, Settings())
    assert "corefw_blockers [hook]" in caplog.text
    assert "finish corefw_blockers --> [['in the way']] [hook]" in caplog.text


# -- the page ------------------------------------------------------------------------------------------------------


def sections() -> Mapping[str, list[str]]:
    """Hook -> arguments, as the page's headings have them."""
    headings = re.findall(r"^### (corefw_\w+)\((.*)\)$", PAGE, re.MULTILINE)
    return {name: [argument for argument in arguments.split(", ") if argument] for name, arguments in headings}


def test_every_hook_has_a_section_with_its_arguments() -> None:
    assert sections() == {name: list(signature(getattr(hookspecs, name)).parameters) for name in HOOKS}


def test_every_hook_has_a_test() -> None:
    assert [name for name in HOOKS if f"test_{name}" not in globals()] == []


def test_every_hook_says_what_it_is_for() -> None:
    assert all(getattr(hookspecs, name).__doc__ for name in HOOKS)


def night() -> types.ModuleType:
    """The plugin on the page."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    module = types.ModuleType("night")
    exec(compile(source, "docs/plugins.md", "exec"), vars(module))
    return module


def test_the_plugin_on_the_page_passes_the_kits_as_the_page_runs_them() -> None:
    (source,) = re.findall(r"```text\n(check_settings.*?)```", PAGE, re.DOTALL)
    names = {
        "night": night(),
        "machine": lambda: CountingMachine(pages=16),
        "check_settings": check_settings,
        "BlockersCase": BlockersCase,
        "check_blockers": check_blockers,
        "CommandsCase": CommandsCase,
        "check_commands": check_commands,
    }
    exec(compile(source, "docs/plugins.md", "exec"), names)


def test_the_plugin_on_the_page_works() -> None:
    module = night()
    found = Plugins()
    found.register(module)
    settings = found.settings()
    assert found.blockers(MACHINE, settings) == []
    settings.set_capabilities({"x-night-only": True})
    assert found.blockers(MACHINE, settings) == ["it is not night yet (wait, or switch x-night-only off)"]
    settings.set_parameters({"x-night-begins": 0})
    assert found.blockers(MACHINE, settings) == []
    found.state_changed(Side.SOURCE, MigrationStatus.DEVICE, MigrationStatus.COMPLETED)
    assert found.commands(CONTROL)["x-query-finished"].function(side="source") == {
        "guest": "demo",
        "times": 1,
    }
