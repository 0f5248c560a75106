"""docs/write-a-section.md: its code runs, its sections move with a guest, and it mentions every method."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from corefw.hookspecs import hookimpl
from corefw.plugins import Plugins
from corefw.section import LiveLoader, LiveSaver, MultiChannelLoader, StateLoader, StateSaver
from corefw.wire import vmstate
from tests.helpers.engines import Pair, arrived, counting, ended, query_migrate

PAGE = Path(__file__).parents[2] / "docs" / "write-a-section.md"


@pytest.fixture(scope="module")
def code() -> ModuleType:
    """The page's blocks, run one after the other as one module; the last of them runs the contract kit."""
    module = ModuleType("weather_plugin")
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), vars(module))
    return module


def test_code_runs(code: ModuleType) -> None:
    assert {"WEATHER", "WeatherSaver", "CacheLoader", "check_section"} <= vars(code).keys()


def test_sections_move_with_a_guest(code: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through two engines, the destination's loaders get what the source's savers have."""
    weather, cache = code.Weather(remark=b"fog", alarm=1), {number: number for number in range(300)}
    arrived_weather, arrived_cache = code.Weather(), dict[int, int]()
    savers, loaders = "corefw_section_savers", "corefw_section_loaders"
    monkeypatch.setattr(code, savers, hookimpl(lambda: (code.WeatherSaver(weather), code.CacheSaver(cache))))
    monkeypatch.setattr(
        code, loaders, hookimpl(lambda: (code.WeatherLoader(arrived_weather), code.CacheLoader(arrived_cache)))
    )
    plugins = Plugins.load()
    plugins.register(code, "weather")
    with Pair(plugins) as pair:
        source, destination = pair.source(), pair.destination()
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        assert ended(source) == "completed", query_migrate(source)
        assert arrived(destination) == "completed", query_migrate(destination)
        assert counting(source).check() > 0
    assert (arrived_weather, arrived_cache) == (weather, cache)


def test_page_names_every_method_of_a_section() -> None:
    text = PAGE.read_text()
    for kind in (LiveSaver, StateSaver, LiveLoader, StateLoader, MultiChannelLoader):
        assert kind.__name__ in text
        names = kind.__abstractmethods__ | {"covers", "statistics", "committed", "abandoned"}
        missing = [name for name in names if f"{name}(" not in text]
        assert not missing, f"the page does not speak of {kind.__name__}'s {missing}"


def test_page_names_every_field() -> None:
    text = PAGE.read_text()
    fields = [
        name
        for name, kind in vars(vmstate).items()
        if inspect.isclass(kind) and issubclass(kind, vmstate.Field) and not inspect.isabstract(kind)
    ]
    assert len(fields) >= 7
    assert [name for name in fields if f"`{name}(" not in text] == []
