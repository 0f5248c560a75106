"""Names of programs and options: valid ones load, and errors for others say what would be valid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from corefw_machine_python import PythonMachine, guest
from corefw_machine_python.declarations import Declarations, FieldType
from corefw_machine_python.loading import load_program
from corefw_machine_python.programs.life import Life
from corefw_machine_python.programs.stress import Stress

from corefw.errors import UsageError
from corefw.machine import MachineConfig

PLAIN = Path(__file__).parent / "programs" / "plain.py"


def test_bundled_names_files_and_modules() -> None:
    assert load_program("stress") is Stress
    assert load_program("corefw_machine_python.programs.life:Life") is Life
    assert load_program(f"{PLAIN}:Plain").__name__ == "Plain"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("heat", "'heat' is not a program: expected FILE.py:CLASS, PACKAGE.MODULE:CLASS, or one of life, stress"),
        ("heat.py:Heat", "no file 'heat.py'"),
        ("no.such.module:Heat", "no module 'no.such.module' can be imported here"),
        ("http://heat:Heat", "'http://heat:Heat' is not a program: expected FILE.py:CLASS"),
        ("corefw.errors:MigfwError", "is not a program: expected a subclass of guest.Program (its programs: none)"),
        ("corefw_machine_python.programs.life:Lief", "has no class 'Lief' (its programs: Life)"),
        (f"{PLAIN}:NoProgram", "is not a program: expected a subclass of guest.Program (its programs: Plain, "),
        (f"{PLAIN}:NoTick", "program 'NoTick' in '"),
        (f"{PLAIN}:NoTick", "plain.py' has no tick(): expected a method that does one step"),
        (str(PLAIN), "does not name a class: expected "),
        (f"{PLAIN}:", "does not name a class: expected "),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_program(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0\n", "ZeroDivisionError: division by zero ("),
        ("x = (\n", "SyntaxError: '(' was never closed ("),
        ("import no_such_thing\n", "ModuleNotFoundError: No module named 'no_such_thing' ("),
        (
            "from corefw_machine_python import guest\nclass P(guest.Program):\n  a = guest.field('u63')\n",
            "'u63' is not a field type",
        ),
        (
            "from corefw_machine_python import guest\nclass P(guest.Program):\n  a = guest.array('a', 3, 'O')\n",
            "objects",
        ),
    ],
)
def test_modules_that_do_not_load(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_program(f"{path}:P")
    assert f"cannot load '{path}': " in str(caught.value)
    assert message in str(caught.value)
    assert f"{path}, line " in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.py"
    path.write_bytes(b"\x7fELF\0\0")
    with pytest.raises(UsageError) as caught:
        load_program(f"{path}:P")
    message = str(caught.value)
    assert message.startswith(f"cannot load '{path}': ")
    assert message.endswith("null bytes")


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (None, {}, "which program? expected FILE.py:CLASS"),
        ("stress", {"rma": "1M"}, "has no option 'rma' (its options: ram, dirty-rate, working-set, seed)"),
        ("stress", {"ram": "much"}, "option 'ram': 'much' is not a size: expected a number with K, M, G or T"),
        (
            "stress",
            {"ram": "1M", "working-set": "2M"},
            "option 'working-set': expected from a page (4096 bytes) to all of the RAM (1048576)",
        ),
        ("stress", {"seed": "x"}, "option 'seed': 'x' is no int (as in seed=1)"),
        ("life", {"size": "big"}, "option 'size': 'big' is no world_size"),
        (f"{PLAIN}:Plain", {"rows": "0"}, "array 'small' would have the shape (0, 7)"),
        (f"{PLAIN}:Plain", {"fast": "maybe"}, "option 'fast': 'maybe' is not a switch: expected on or off"),
        (f"{PLAIN}:Plain", {"fast": "1"}, "option 'fast': '1' is not a switch: expected on or off"),
        (f"{PLAIN}:Wide", {"size": "0"}, "array 'grid' has no shape with these options: integer division"),
        (f"{PLAIN}:Twice", {}, "program 'Twice': two arrays have the name 'same'"),
        (f"{PLAIN}:WrongVersion", {}, "program 'WrongVersion'"),
        ("nowhere.py:X", {}, "no file 'nowhere.py'"),
    ],
)
def test_a_machine_that_cannot_be_made(program: str | None, options: Mapping[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        PythonMachine(MachineConfig(program, options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_have_their_types_and_both_spellings() -> None:
    options = Declarations.of(Stress).parse_options({"dirty-rate": "1.5K"})
    assert options.dirty_rate == options["dirty-rate"] == 1536
    assert options.ram == 512 << 20
    assert dict(options)["seed"] == 1
    with pytest.raises(AttributeError, match="no option 'rma'"):
        getattr(options, "rma")  # noqa: B009 - mypy knows that it is of any type


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("u8", [0, 255], [-1, 256, 1.5, "1", None]),
        ("i16", [-32768, 32767], [-32769, 32768]),
        ("u64", [2**64 - 1], [2**64]),
        ("f64", [1, -2.5, float("inf")], ["1"]),
        ("double", [0.1], [b"1"]),
        ("bool", [True, False], [1, "yes"]),
        ("bytes[3]", [b"abc"], [b"abcd", "abc", 3]),
        ("str[4]", ["ää", ""], ["äää", b"a", "a\0b"]),
    ],
)
def test_fields_take_what_fits(kind: str, good: list[object], bad: list[object]) -> None:
    checked = FieldType.parse(kind)
    for value in good:
        assert checked.check(value) == value
    for value in bad:
        with pytest.raises((TypeError, ValueError), match=rf"is (an? )?{checked.kind}\b"):
            checked.check(value)


@pytest.mark.parametrize(("kind", "default"), [("str[8]", 0), ("bytes[8]", 0), ("bool", 0.0), ("bool", 0), ("u8", 0.0)])
def test_a_default_has_to_fit_also_where_it_equals_zero(kind: str, default: int | float) -> None:
    with pytest.raises(TypeError, match=r"^is .*, got 0"):
        guest.field(kind, default)


def test_bytes_are_padded() -> None:
    assert FieldType.parse("bytes[4]").check(b"ab") == b"ab\0\0"


@pytest.mark.parametrize("text", ["u63", "bytes", "bytes[0]", "str[-1]", "str[99999999]", "float"])
def test_types_of_fields_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a field type: expected one of u8, "):
        FieldType.parse(text)
