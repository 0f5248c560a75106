"""Device state in tables: one declaration drives load, save and the description, as in QEMU's VMStateDescription.

    from corefw.wire.vmstate import Array, Kind, Scalar, VMState

    RTC = VMState(
        "rtc",
        version_id=2,
        minimum_version_id=1,
        fields=(
            Scalar("seconds", Kind.U64),
            Array("registers", 14, Kind.U8),
            Scalar("drift", Kind.F64, since=2),
        ),
        subsections=(VMState("rtc/alarm", fields=(Scalar("alarm", Kind.U64),), needed=lambda rtc: rtc.alarm != 0),),
    )

    description = RTC.save(writer, rtc)      # the attributes of `rtc`, big-endian, in this order
    RTC.load(reader, rtc, version_id)        # the version is the section header's

kinds.py has the kinds of scalars, fields.py and arrays.py the rows of a table, tables.py VMState, structs and
subsections.
"""

from corefw.wire.vmstate.arrays import Array
from corefw.wire.vmstate.fields import Buffer, Description, Field, Scalar, Unused, Validate
from corefw.wire.vmstate.kinds import Kind
from corefw.wire.vmstate.tables import Refused, Struct, StructArray, VMState

__all__ = [
    "Array",
    "Buffer",
    "Description",
    "Field",
    "Kind",
    "Refused",
    "Scalar",
    "Struct",
    "StructArray",
    "Unused",
    "VMState",
    "Validate",
]
