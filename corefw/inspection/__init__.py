"""Show the contents of a migration stream of QEMU or migfw, complete or damaged.

inspect(source) -> Inspection       reads the stream and counts
document(inspection) -> dict        the result as JSON values
"""

from corefw.inspection.collect import inspect
from corefw.inspection.document import command_meaning, command_name, document
from corefw.inspection.fields import SUBSECTIONS, ValueBudget, device_fields
from corefw.inspection.model import BitmapInfo, BlockInfo, CommandInfo, Inspection, SectionInfo

__all__ = [
    "SUBSECTIONS",
    "BitmapInfo",
    "BlockInfo",
    "CommandInfo",
    "Inspection",
    "SectionInfo",
    "ValueBudget",
    "command_meaning",
    "command_name",
    "device_fields",
    "document",
    "inspect",
]
