"""The tables have all of QEMU's migration settings. Changes are checked together, and all of them apply or none."""

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corefw.declarations import Capability, Declarations, Kind, Parameter, Value
from corefw.errors import SettingsError, UsageError
from corefw.plugins import Plugins
from corefw.quantities import format_size
from corefw.settings import CAPABILITIES, IMPLEMENTED_BY_CORE, PARAMETERS, PROPERTIES, Settings, as_json

SURFACE_CAPABILITIES = {
    *("xbzrle", "rdma-pin-all", "auto-converge", "zero-blocks", "compress", "events", "postcopy-ram", "x-colo"),
    *("release-ram", "block", "return-path", "pause-before-switchover", "multifd", "dirty-bitmaps"),
    *("postcopy-blocktime", "late-block-activate", "x-ignore-shared", "validate-uuid", "background-snapshot"),
    *("zero-copy-send", "postcopy-preempt", "switchover-ack", "dirty-limit", "mapped-ram"),
}

MIB = 1 << 20

# name: (default, smallest that fits, largest that fits)
SURFACE_INTEGERS = {
    "compress-level": (1, 0, 9),
    "compress-threads": (8, 1, 255),
    "decompress-threads": (2, 1, 255),
    "cpu-throttle-initial": (20, 1, 99),
    "cpu-throttle-increment": (10, 1, 99),
    "max-bandwidth": (128 * MIB, 0, 2**64 - 1),
    "downtime-limit": (300, 0, 2_000_000),
    "announce-initial": (50, 0, 100_000),
    "announce-max": (550, 0, 100_000),
    "announce-rounds": (5, 1, 1000),
    "announce-step": (100, 1, 10_000),
    "throttle-trigger-threshold": (50, 1, 100),
    "max-cpu-throttle": (99, 1, 99),
    "avail-switchover-bandwidth": (0, 0, 2**64 - 1),
    "max-postcopy-bandwidth": (0, 0, 2**64 - 1),
    "multifd-zlib-level": (1, 0, 9),
    "multifd-zstd-level": (1, 0, 20),
    "multifd-qatzip-level": (1, 1, 9),
    "x-vcpu-dirty-limit-period": (1000, 1, 1000),
    "vcpu-dirty-limit": (1, 1, 2**63 - 1),
    "x-rdma-chunk-size": (MIB, 4096, 2**62),
    "x-checkpoint-delay": (20_000, 0, 2**32 - 1),
    "multifd-channels": (2, 1, 255),
    "x-multifd-page-count": (16, 1, 10000),
    "xbzrle-cache-size": (64 * MIB, 4096, 2**62),
}
SURFACE_OTHERS: dict[str, Value] = {"tls-creds": "", "tls-hostname": "", "block-incremental": False}
FURTHER: dict[str, Value] = {
    "compress-wait-thread": True,
    "cpu-throttle-tailslow": False,
    "tls-authz": "",
    "multifd-compression": "none",
    "block-bitmap-mapping": None,
    "mode": "normal",
    "zero-page-detection": "multifd",
    "direct-io": False,
    "cpr-exec-command": (),
}
OWN: dict[str, Value] = {
    "x-migfw-timeout": 0,
    "x-migfw-max-passes": 0,
    "x-migfw-on-timeout": "cancel",
    "x-migfw-postcopy-start": "on-command",
    "x-migfw-confirm-timeout": 300_000,
    "x-migfw-incoming-timeout": 60_000,
    "x-migfw-liveness": 60,
    "x-migfw-prealloc": True,
    "x-migfw-reconnect": 0,
}
"""Parameters that QEMU does not have."""

EVERYTHING = Declarations(
    implements=frozenset(SURFACE_CAPABILITIES | SURFACE_INTEGERS.keys() | SURFACE_OTHERS.keys() | FURTHER.keys())
)


@pytest.fixture
def settings() -> Settings:
    """Settings with everything implemented."""
    return Settings([EVERYTHING])


def test_every_capability_of_the_surface_is_there_and_off() -> None:
    assert Settings().capabilities() == dict.fromkeys(SURFACE_CAPABILITIES, False)


def test_every_parameter_of_the_surface_is_there_with_its_default() -> None:
    defaults = {name: default for name, (default, _, _) in SURFACE_INTEGERS.items()}
    assert Settings().parameters() == defaults | SURFACE_OTHERS | FURTHER | OWN


@pytest.mark.parametrize("name", SURFACE_INTEGERS)
def test_the_range_of_a_parameter(settings: Settings, name: str) -> None:
    _, smallest, largest = SURFACE_INTEGERS[name]
    for value in (smallest, largest):
        settings.set_parameters({name: value})
        assert settings.integer(name) == value
    for value in (smallest - 1, largest + 1):
        with pytest.raises(SettingsError, match=f"parameter '{name}' expects"):
            settings.set_parameters({name: value})
        assert settings.integer(name) == largest
    for junk in (True, 1.5, "5", None, [1]):
        with pytest.raises(SettingsError, match=f"parameter '{name}' expects an integer, got"):
            settings.set_parameters({name: junk})


def test_the_cache_size_is_a_power_of_two(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="parameter 'xbzrle-cache-size' expects a power of two, got 5000"):
        settings.set_parameters({"xbzrle-cache-size": 5000})


def test_strings_and_booleans(settings: Settings) -> None:
    settings.set_parameters({"tls-creds": "mine", "block-incremental": True})
    assert settings.parameter("tls-creds") == "mine"
    assert settings.parameter("block-incremental") is True
    settings.set_parameters({"tls-creds": None})  # QMP's null takes it away
    assert settings.parameter("tls-creds") == ""
    with pytest.raises(SettingsError, match="parameter 'tls-creds' expects a string, got 5"):
        settings.set_parameters({"tls-creds": 5})
    with pytest.raises(SettingsError, match="parameter 'block-incremental' expects true or false, got 1"):
        settings.set_parameters({"block-incremental": 1})


def test_choices_and_lists(settings: Settings) -> None:
    settings.set_parameters({"multifd-compression": "zstd", "cpr-exec-command": ["qemu", "-S"]})
    assert settings.parameter("multifd-compression") == "zstd"
    assert settings.parameter("cpr-exec-command") == ("qemu", "-S")
    with pytest.raises(
        SettingsError, match=r"'mode' expects normal or cpr-reboot or .*, got 'norml' \(did you mean normal"
    ):
        settings.set_parameters({"mode": "norml"})
    with pytest.raises(SettingsError, match=r"parameter 'mode' expects normal or .*, got 5"):
        settings.set_parameters({"mode": 5})
    with pytest.raises(SettingsError, match="parameter 'cpr-exec-command' expects a list, got 'qemu'"):
        settings.set_parameters({"cpr-exec-command": "qemu"})


@pytest.mark.parametrize("name", sorted(SURFACE_CAPABILITIES - IMPLEMENTED_BY_CORE))
def test_a_capability_that_nobody_implements_is_refused_by_name(name: str) -> None:
    settings = Settings()
    with pytest.raises(SettingsError) as caught:
        settings.set_capabilities({"events": True, name: True})
    assert str(caught.value) == f"capability '{name}' is not supported by any installed plugin"
    assert not any(settings.capabilities().values())
    settings.set_capabilities({name: False})  # that it stays off is true
    assert not settings.implemented(name)


def test_a_parameter_that_nobody_implements_is_refused_unless_it_stays_as_it_is() -> None:
    settings = Settings()
    with pytest.raises(SettingsError, match="parameter 'multifd-channels' is not supported by any installed plugin"):
        settings.set_parameters({"downtime-limit": 5, "multifd-channels": 4})
    assert settings.integer("downtime-limit") == 300
    settings.set_parameters({"downtime-limit": 5, "multifd-channels": 2})
    assert settings.integer("downtime-limit") == 5


@pytest.mark.parametrize("name", sorted(IMPLEMENTED_BY_CORE & SURFACE_CAPABILITIES))
def test_what_the_core_implements_can_be_enabled(name: str) -> None:
    settings = Settings()
    settings.set_capabilities({"return-path": True, name: True})
    assert settings.capability(name)


@pytest.mark.parametrize(("alias", "name"), [("x-multifd", "multifd"), ("x-multifd-channels", "multifd-channels")])
def test_earlier_names_are_accepted_and_the_later_one_answers(settings: Settings, alias: str, name: str) -> None:
    if name in SURFACE_CAPABILITIES:
        settings.set_capabilities({alias: True})
        assert settings.capability(alias)
        assert settings.capabilities()[name]
        assert alias not in settings.capabilities()
        assert settings.declared_capability(alias).name == name
    else:
        settings.set_parameters({alias: 7})
        assert settings.integer(alias) == settings.parameters()[name] == 7
        assert alias not in settings.parameters()
        assert settings.declared_parameter(alias).name == name


def test_unknown_names_are_told_with_those_that_are_known(settings: Settings) -> None:
    hint = r" \(did you mean x-colo\?\)"
    with pytest.raises(SettingsError, match=rf"unknown capability 'colo'{hint}: expected one of xbzrle, .*, x-colo, "):
        settings.set_capabilities({"colo": True})
    with pytest.raises(SettingsError, match=r"'down-time-limit' \(did you mean downtime-limit\?\): expected one of"):
        settings.set_parameters({"down-time-limit": 1})
    with pytest.raises(SettingsError, match="unknown parameter 'events': expected one of announce-initial, "):
        settings.set_parameters({"events": 1})
    with pytest.raises(SettingsError, match="unknown parameter 'speed'"):
        settings.declared_parameter("speed")
    hint = r" \(did you mean send-section-footer\?\)"
    with pytest.raises(
        SettingsError, match=rf"no property 'section-footer'{hint}: expected one of store-global-state, "
    ):
        settings.set_property("section-footer", True)
    assert issubclass(SettingsError, UsageError)


def test_a_capability_is_true_or_false(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="capability 'xbzrle' expects true or false, got 'on'"):
        settings.set_capabilities({"xbzrle": "on"})


def test_what_does_not_go_together_is_refused_whichever_comes_first(settings: Settings) -> None:
    message = "Postcopy is not currently compatible with compression"
    with pytest.raises(SettingsError, match=message):
        settings.set_capabilities({"postcopy-ram": True, "compress": True})
    for first, second in (("postcopy-ram", "compress"), ("compress", "postcopy-ram")):
        settings.set_capabilities({first: True})
        with pytest.raises(SettingsError, match=message):
            settings.set_capabilities({second: True})
        assert settings.capability(first)
        assert not settings.capability(second)
        settings.set_capabilities({first: False})
    settings.set_capabilities({"postcopy-ram": True})
    settings.set_capabilities({"postcopy-ram": False, "compress": True})  # only the result counts
    assert settings.capability("compress")


def test_the_machine_properties_and_their_defaults() -> None:
    settings = Settings()
    qemu = {"store-global-state": True, "only-migratable": False, "send-configuration": True}
    assert {name: settings.property(name) for name in PROPERTIES} == qemu | {
        "send-section-footer": True,
        "send-vmdescription": True,
        "allow-any-user": False,
    }
    settings.set_property("only-migratable", True)
    assert settings.property("only-migratable")


# -- what plugins declare ------------------------------------------------------------------------------------------


def ours() -> Declarations:
    return Declarations(
        capabilities=(Capability("x-mine", "mine", aliases=("x-my",)),),
        parameters=(Parameter("x-mine-level", Kind.INTEGER, 3, "how much", 1, 5),),
        implements=frozenset({"x-mine", "x-mine-level", "xbzrle"}),
        checks=(lambda capabilities, values: "no level 5 without x-mine" if not_ours(capabilities, values) else None,),
    )


def not_ours(capabilities: object, values: object) -> bool:
    assert isinstance(capabilities, dict)
    assert isinstance(values, dict)
    return values["x-mine-level"] == 5 and not capabilities["x-mine"]


def test_a_plugin_declares_its_own_and_implements_what_was_known() -> None:
    settings = Settings([ours()])
    settings.set_capabilities({"x-my": True, "xbzrle": True})
    settings.set_parameters({"x-mine-level": 5})
    assert settings.capability("x-mine")
    assert settings.integer("x-mine-level") == 5
    with pytest.raises(SettingsError, match="no level 5 without x-mine"):
        settings.set_capabilities({"x-mine": False})
    with pytest.raises(SettingsError, match="parameter 'x-mine-level' expects an integer from 1 to 5, got 6"):
        settings.set_parameters({"x-mine-level": 6})


@pytest.mark.parametrize(
    "declared",
    [
        Declarations(capabilities=(Capability("x-mine", "another"),)),
        Declarations(parameters=(Parameter("x-my", Kind.STRING, "", "another"),)),
    ],
)
def test_a_name_belongs_to_one_plugin(declared: Declarations) -> None:
    with pytest.raises(SettingsError, match="is declared by two plugins"):
        Settings([ours(), declared])


def test_nobody_implements_what_nobody_declares() -> None:
    with pytest.raises(SettingsError, match="plugins implement settings that no plugin declares: multi-fd, zstd"):
        Settings([Declarations(implements=frozenset({"zstd", "multi-fd"}))])


# -- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max-bandwidth", "100MB/s", 100 * MIB),
        ("max-bandwidth", "0", 0),
        ("downtime-limit", "0.5s", 500),
        ("downtime-limit", "500", 500),
        ("x-migfw-liveness", "10", 10),
        ("x-migfw-liveness", "10s", 10),
        ("x-migfw-liveness", "2m", 120),
        ("xbzrle-cache-size", "1G", 1 << 30),
        ("compress-level", "9", 9),
        ("block-incremental", "on", True),
        ("block-incremental", "No", False),
        ("tls-hostname", "", ""),
    ],
)
def test_a_value_is_read_as_people_write_it(settings: Settings, name: str, text: str, value: Value) -> None:
    assert settings.declared_parameter(name).parse(text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("max-bandwidth", "fast", "expects bytes per second (K, M, G), got 'fast'"),
        ("downtime-limit", "1 day", "expects a time in milliseconds, got '1 day'"),
        ("downtime-limit", "1h", "expects a time in milliseconds, got '1h'"),
        ("downtime-limit", "40m", "expects a time in milliseconds from 0 to 2000000, got 2400000"),
        ("x-migfw-liveness", "soon", "expects a time in seconds (10, 10s, 2m), got 'soon'"),
        ("x-migfw-liveness", "2000m", "expects a time in seconds (10, 10s, 2m) from 0 to 86400, got 120000"),
        ("xbzrle-cache-size", "3M", "expects a power of two, got 3145728"),
        ("compress-level", "high", "expects an integer, got 'high'"),
        ("block-incremental", "1", "expects on or off, got '1'"),
    ],
)
def test_a_value_that_does_not_fit_is_told_with_the_unit(
    settings: Settings, name: str, text: str, message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        settings.declared_parameter(name).parse(text)
    assert str(caught.value) == f"parameter '{name}' {message}"


def test_everything_has_one_line_of_help() -> None:
    helps = {one.name: one.help for one in CAPABILITIES} | {one.name: one.help for one in PARAMETERS}
    helps |= {name: help_text for name, (_, help_text) in PROPERTIES.items()}
    assert all(text and "\n" not in text for text in helps.values())


def test_all_of_it_as_json(settings: Settings) -> None:
    shown = as_json(settings)
    assert shown == {
        "capabilities": settings.capabilities(),
        "parameters": settings.parameters(),
        "properties": {name: default for name, (default, _) in PROPERTIES.items()},
    }


# -- all or none ---------------------------------------------------------------------------------------------------

names = st.sampled_from([*SURFACE_INTEGERS, *SURFACE_OTHERS, "nonsense"])
values = st.one_of(st.integers(-2, 10001), st.booleans(), st.text(max_size=2), st.none())


@given(st.lists(st.dictionaries(names, values, max_size=4), max_size=6))
def test_parameters_change_all_together_or_not_at_all(changes: list[dict[str, object]]) -> None:
    settings = Settings([EVERYTHING])
    for change in changes:
        before = settings.parameters()
        try:
            settings.set_parameters(change)
        except SettingsError:
            assert settings.parameters() == before
        else:
            after = before | {name: "" if value is None else value for name, value in change.items()}
            assert settings.parameters() == after


switches = st.dictionaries(st.sampled_from([*sorted(SURFACE_CAPABILITIES), "nonsense"]), st.booleans(), max_size=5)


@given(st.lists(switches, max_size=6))
def test_capabilities_change_all_together_or_not_at_all(changes: list[dict[str, bool]]) -> None:
    settings = Settings([EVERYTHING])
    for change in changes:
        before = settings.capabilities()
        try:
            settings.set_capabilities(change)
        except SettingsError:
            assert settings.capabilities() == before
        else:
            assert settings.capabilities() == before | change
        now = settings.capabilities()
        assert not (now["postcopy-ram"] and now["compress"])


def test_changes_by_many_threads_are_each_whole(settings: Settings) -> None:
    def change(level: int) -> None:
        for _ in range(200):
            settings.set_parameters({"cpu-throttle-initial": level, "cpu-throttle-increment": level})

    threads = [threading.Thread(target=change, args=(level,)) for level in (1, 50, 99)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen = settings.parameters()
        assert seen["cpu-throttle-initial"] == seen["cpu-throttle-increment"] or seen["cpu-throttle-initial"] == 20
    for thread in threads:
        thread.join()


# -- the page ------------------------------------------------------------------------------------------------------


def rows() -> list[str]:
    """The tables of docs/settings.md, from the tables of the code and what the repository's plugins implement."""
    settings = Plugins.load().settings()
    made = [
        f"| `{one.name}` | {'yes' if settings.implemented(one.name) else 'refused'} | {one.help} |"
        for one in CAPABILITIES
    ]
    made += [
        f"| `{one.name}` | {_default(one)} | {_range(one)} | "
        f"{'yes' if settings.implemented(one.name) else 'refused'} | {one.help} |"
        for one in PARAMETERS
    ]
    return made + [f"| `{name}` | {'on' if on else 'off'} | {text} |" for name, (on, text) in PROPERTIES.items()]


def _default(one: Parameter) -> str:
    if isinstance(one.default, bool):
        return "on" if one.default else "off"
    if one.kind is Kind.LIST:
        return "empty"
    if one.default is None:
        return "not set"
    return format_size(one.default) if isinstance(one.default, int) and one.kind in SIZES else str(one.default)


def _range(one: Parameter) -> str:
    if one.kind in TEXTS:
        return TEXTS[one.kind]
    if one.kind is Kind.CHOICE:
        return ", ".join(one.choices)
    units = {Kind.SECONDS: " s", Kind.SIZE: " bytes, a power of two", Kind.RATE: " bytes/s", Kind.MILLISECONDS: " ms"}
    unit = units.get(one.kind, "")
    return f"{one.minimum} to {one.maximum}{unit}"


SIZES = (Kind.SIZE, Kind.RATE)
TEXTS = {Kind.BOOLEAN: "on or off", Kind.STRING: "text", Kind.LIST: "a list", Kind.OBJECTS: "a list of objects"}


def test_the_page_has_every_setting() -> None:
    page = (Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    missing = [row for row in rows() if row not in page]
    assert missing == [], "docs/settings.md lacks:\n" + "\n".join(missing)
