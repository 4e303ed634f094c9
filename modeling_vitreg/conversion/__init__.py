"""Official checkpoints in, official layouts out, each with a ledger of its tensors and a proof in numbers."""

from .export import TARGETS, export
from .pipeline import REPORT_FILE, ConversionSettings, convert
from .rules import ConversionError


__all__ = ["REPORT_FILE", "TARGETS", "ConversionError", "ConversionSettings", "convert", "export"]
