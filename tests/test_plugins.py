"""Installed plugins of third parties: found at once, loaded when needed; a broken one does not affect others."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, cast

import pytest

from corefw.entrypoints import GROUPS
from corefw.errors import MachineError, MigfwError, PluginError, UriError, UsageError
from corefw.machine import MachineConfig
from corefw.plugins import Plugins
from corefw.settings import Settings

TRANSPORT = """
    from corefw.channel import Transport, TransportFeatures
    from corefw.errors import ChannelError, UriError

    class Made(Transport):
        features = TransportFeatures(return_path=False, multi_channel=False)

        def __init__(self, uri, context):
            super().__init__(uri, context)
            if uri.rest == "wrong":
                raise UriError(f"'{uri}': wrong")

        def connect(self, interrupt):
            raise ChannelError("no way")

        def listen(self):
            raise ChannelError("no way")
"""
BLOCKER = """
    from corefw.hookspecs import hookimpl

    @hookimpl
    def corefw_blockers():
        return [__name__]
"""

if TYPE_CHECKING:
    from corefw.machine import Machine

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(distribution, source, group={name: object})` installs a distribution with one module.

    The module's name is returned; "{module}" in an object stands for it.
    """
    numbers = itertools.count()
    modules: list[str] = []

    def make(distribution: str, source: str, **groups: dict[str, str]) -> str:
        module = f"installed_{next(numbers)}"
        site = tmp_path / module
        about = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
        about.mkdir(parents=True)
        (site / f"{module}.py").write_text(dedent(source))
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        lines = [
            f"[corefw.{group}]\n"
            + "".join(f"{name} = {target.format(module=module)}\n" for name, target in names.items())
            for group, names in groups.items()
        ]
        (about / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(str(site))
        modules.append(module)
        return module

    yield make
    for module in modules:
        sys.modules.pop(module, None)


def blockers(plugins: Plugins) -> list[str]:
    """The blockers of the plugins that the test installed; the repository's own need a machine."""
    machine = cast("Machine", object())
    return [reason for reason in plugins.blockers(machine, Settings()) if reason.startswith("installed_")]


# -- a scheme, a machine -------------------------------------------------------------------------------------------


def test_a_scheme_is_found_as_soon_as_it_is_installed(install: Install) -> None:
    plugins = Plugins.load()
    with pytest.raises(UriError, match="no installed plugin has the scheme 'x-late'"):
        plugins.transport("x-late:there")
    module = install("late", TRANSPORT, transport={"x-late": "{module}:Made"})
    made = plugins.transport("x-late:there")
    assert type(made).__module__ == module
    assert made.uri.rest == "there"
    with pytest.raises(UriError, match="'x-late:wrong': wrong"):
        plugins.transport("x-late:wrong")


def test_a_layer_is_an_entry_point_with_a_plus(install: Install) -> None:
    layer = install("layer", TRANSPORT, transport={"x-layer+": "{module}:Made"})
    exact = install("exact", TRANSPORT, transport={"x-layer+tcp": "{module}:Made"})
    plugins = Plugins.load()
    made = plugins.transport("x-layer+unix:/run/sock")
    assert type(made).__module__ == layer
    assert str(made.uri) == "x-layer+unix:/run/sock"
    assert type(plugins.transport("x-layer+tcp:there")).__module__ == exact, "the scheme itself comes first"
    for uri in ("x-layer:there", "tcp+unix:/run/sock"):
        with pytest.raises(UriError, match="no installed plugin has the scheme"):
            plugins.transport(uri)


def test_a_transport_sees_the_settings_and_makes_inner_transports() -> None:
    plugins = Plugins.load()
    settings = plugins.settings()
    context = plugins.transport("tcp:localhost:1", settings).context
    assert context.settings is settings
    assert not context.any_user
    inner = context.transport("unix:/run/sock")
    assert (str(inner.uri), inner.context) == ("unix:/run/sock", context)
    assert plugins.transport("tcp:localhost:1").context.settings.parameters() == plugins.settings().parameters()


def test_only_the_scheme_that_is_asked_for_is_imported(install: Install) -> None:
    asked = install("asked", TRANSPORT, transport={"x-asked": "{module}:Made"})
    other = install("other", TRANSPORT, transport={"x-other": "{module}:Made"})
    Plugins.load().transport("x-asked:there")
    assert asked in sys.modules
    assert other not in sys.modules


def test_a_scheme_of_the_repository_does_not_import_the_others() -> None:
    script = """
        import sys
        from corefw.plugins import Plugins
        Plugins.load().transport("tcp:localhost:1")
        print(*sorted({"paramiko", "zmq"} & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], check=True, capture_output=True, text=True)
    assert done.stdout == "\n"


FACTORIES = {
    "raises on import": ("raise ValueError('two\\nlines')", PluginError, "failed to load: ValueError: two lines"),
    "asserts on import": ("assert False, 'bug'", PluginError, "failed to load: AssertionError: bug"),
    "exits on import": ("raise SystemExit(3)", PluginError, "failed to load: SystemExit: 3"),
    "needs what is not there": ("import not_there", PluginError, "ModuleNotFoundError: No module named 'not_there'"),
    "is not there": ("", PluginError, "failed to load: AttributeError: module"),
    "cannot be called": ("Made = 5", PluginError, "gives int, expected a class or function"),
    "makes something else": ("Made = lambda *x: str()", PluginError, "gave str, expected a "),
    "raises when called": ("def Made(*x): return 1 // 0", PluginError, "failed: ZeroDivisionError"),
    "takes no argument": ("def Made(): pass", PluginError, "failed: TypeError"),
    "says what is wrong": (
        "from corefw.errors import MachineError\ndef Made(*x): raise MachineError('no RAM')",
        MachineError,
        "no RAM",
    ),
}


@pytest.mark.parametrize("case", FACTORIES)
def test_a_driver_that_breaks_is_an_error_that_names_it(install: Install, case: str) -> None:
    source, kind, message = FACTORIES[case]
    module = install("broken", source, transport={"x-broken": "{module}:Made"}, machine={"x-broken": "{module}:Made"})
    plugins = Plugins.load()
    for ask in (lambda: plugins.transport("x-broken:y"), lambda: plugins.machine("x-broken", MachineConfig())):
        sys.modules.pop(module, None)
        with pytest.raises(MigfwError) as caught:
            ask()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert type(caught.value) is kind
        if kind is PluginError:
            assert "'x-broken'" in str(caught.value)
    assert plugins.transport("tcp:localhost:1").uri.scheme == "tcp", "the others go on"


def test_a_factory_that_is_false_is_called_all_the_same(install: Install) -> None:
    falsy = """

    class Factory:
        def __len__(self):
            return 0

        def __call__(self, uri, context):
            return Empty(uri, context)

    class Empty(Made):
        def __bool__(self):
            return False

    factory = Factory()
    """
    install("falsy", dedent(TRANSPORT) + dedent(falsy), transport={"x-falsy": "{module}:factory"})
    made = Plugins.load().transport("x-falsy:there")
    assert type(made).__name__ == "Empty"


def test_two_distributions_with_one_scheme_are_both_named(install: Install) -> None:
    one = install("one", TRANSPORT, transport={"x-both": "{module}:Made"})
    two = install("two", TRANSPORT, transport={"x-both": "{module}:Made"})
    with pytest.raises(PluginError) as caught:
        Plugins.load().transport("x-both:there")
    assert str(caught.value) == (
        f"'x-both' is claimed more than once in corefw.transport: {one}:Made of one, {two}:Made of two "
        "(uninstall all but one)"
    )


def test_an_unknown_machine_is_reported_with_those_that_are_installed() -> None:
    with pytest.raises(UsageError, match=r"no installed plugin has a machine 'vax' \(installed: .*python.*qemu.*\)"):
        Plugins.load().machine("vax", MachineConfig())


# -- hooks ---------------------------------------------------------------------------------------------------------


BROKEN = {
    "raises on import": ("raise ValueError('two\\nlines')", "failed to load: ValueError: two lines"),
    "asserts on import": ("assert False", "failed to load: AssertionError"),
    "exits on import": ("import sys; sys.exit('bye')", "failed to load: SystemExit: bye"),
    "has a syntax error": ("def", "failed to load: SyntaxError"),
    "misspells a hook": (
        BLOCKER.replace("corefw_blockers", "corefw_blocker"),
        "unknown hook 'corefw_blocker' in plugin",
    ),
    "wants other arguments": (BLOCKER.replace("blockers()", "blockers(guest)"), "guest"),
    "clashes in settings": (
        """
        from corefw.hookspecs import hookimpl
        from corefw.declarations import Capability, Declarations

        @hookimpl
        def corefw_settings():
            return Declarations((Capability("events", "again"),))
        """,
        "'events' is declared by two plugins",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_plugin_that_breaks_takes_no_other_down(
    install: Install, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, message = BROKEN[case]
    before = install("before", BLOCKER, plugins={"a-good": "{module}"})
    broken = install("broken", source, plugins={"m-broken": "{module}"})
    after = install("after", BLOCKER, plugins={"z-good": "{module}"})
    plugins = Plugins.load()
    assert list(plugins.failures) == [f"m-broken = {broken}"]
    reason = plugins.failures[f"m-broken = {broken}"]
    assert message in reason
    assert reason in caplog.text
    assert {
        info.name: info.error for info in plugins.inventory() if info.distribution in ("before", "broken", "after")
    } == {
        "a-good": None,
        "m-broken": reason,
        "z-good": None,
    }
    assert blockers(plugins) == [before, after], "in the order of their names, the broken one left out as a whole"


def test_a_transport_that_breaks_is_reported_once(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("broken", "raise ValueError('two\\nlines')", transport={"brk": "{module}:Made"})
    plugins = Plugins.load()
    with pytest.raises(PluginError, match="failed to load: ValueError: two lines"):
        plugins.transport("brk:x")
    assert caplog.text == ""


def test_a_misspelt_hook_is_reported_with_the_nearest(install: Install) -> None:
    module = install("broken", BLOCKER.replace("corefw_blockers", "corefw_blocker"), plugins={"broken": "{module}"})
    plugins = Plugins.load()
    assert plugins.failures[f"broken = {module}"].endswith("(did you mean corefw_blockers?)")


def test_a_name_that_is_taken_belongs_to_the_first(install: Install) -> None:
    one = install("one", BLOCKER, plugins={"same": "{module}"})
    two = install("two", BLOCKER, plugins={"same": "{module}"})
    plugins = Plugins.load()
    already = "plugin 'same' is already registered: choose another name for this one"
    assert plugins.failures == {f"same = {two}": already}
    errors = {info.distribution: info.error for info in plugins.inventory() if info.name == "same"}
    assert errors == {"one": None, "two": plugins.failures[f"same = {two}"]}
    assert blockers(plugins) == [one]


def test_a_plugin_may_be_an_object_but_not_a_class(install: Install) -> None:
    source = """
        from corefw.hookspecs import hookimpl

        class Hooks:
            def __len__(self):
                return 0

            @hookimpl
            def corefw_blockers(self):
                return ["installed_object that is false"]

        hooks = Hooks()
    """
    module = install("objects", source, plugins={"an-object": "{module}:hooks", "a-class": "{module}:Hooks"})
    plugins = Plugins.load()
    assert "expected a module or an object with hooks, not a class" in plugins.failures[f"a-class = {module}:Hooks"]
    assert blockers(plugins) == ["installed_object that is false"]


def test_registering_from_inside_a_program_is_all_or_nothing() -> None:
    plugins = Plugins()

    class Misspelt:
        pass

    for wrong in (None, Misspelt):
        with pytest.raises(PluginError, match="expected a module or an object with hooks"):
            plugins.register(wrong, "it")
    one = Misspelt()
    plugins.register(one, "it")
    with pytest.raises(PluginError, match="plugin 'it' is already registered"):
        plugins.register(Misspelt(), "it")
    with pytest.raises(PluginError, match="plugin 'other' is already registered"):
        plugins.register(one, "other")
    assert plugins.failures == {}, "who registers gets the error"


# -- inventory -----------------------------------------------------------------------------------------------------


def test_the_repository_s_own_plugins_are_all_there() -> None:
    found = {(info.group, info.name): info for info in Plugins.load().inventory()}
    schemes = {name for group, name in found if group == "corefw.transport"}
    assert {"tcp", "unix", "exec", "fd", "file", "ssh", "zmq"} <= schemes
    assert {name for group, name in found if group == "corefw.machine"} >= {"python", "qemu"}
    assert {name for group, name in found if group == "corefw.plugins"} >= {"devices", "ram"}
    assert {info.group for info in found.values()} <= set(GROUPS)
    assert [info for info in found.values() if info.distribution.startswith("migfw") and info.error] == []


def test_a_kernel_that_does_not_load_is_listed_and_blocks_nothing(install: Install) -> None:
    module = install("broken", "raise OSError('kernel.so: wrong ELF class')", kernel={"x-fast": "{module}:receive"})
    plugins = Plugins.load()
    (info,) = (info for info in plugins.inventory() if info.name == "x-fast")
    assert (info.group, info.target) == ("corefw.kernel", f"{module}:receive")
    assert "kernel.so: wrong ELF class" in str(info.error)
    assert blockers(plugins) == []


def test_the_inventory_says_where_each_comes_from_and_what_is_wrong(install: Install) -> None:
    module = install(
        "third-party",
        TRANSPORT,
        transport={"x-good": "{module}:Made", "x-gone": "{module}:Gone"},
        machine={"x-none": "nowhere:Machine"},
    )
    mine = {info.name: info for info in Plugins.load().inventory() if info.distribution == "third-party"}
    good = mine["x-good"]
    assert (good.group, good.target, good.version, good.error) == ("corefw.transport", f"{module}:Made", "1.2", None)
    assert f"module '{module}' has no attribute 'Gone'" in str(mine["x-gone"].error)
    assert "No module named 'nowhere'" in str(mine["x-none"].error)
