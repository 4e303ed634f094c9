"""Checkpoints of other projects to models of this family and back, with a ledger of tensors and a verification."""

from .outgoing import TARGETS
from .pipeline import REPORT_FILE, convert, export
from .plan import ConversionSettings
from .rules import ConversionError


__all__ = ["REPORT_FILE", "TARGETS", "ConversionError", "ConversionSettings", "convert", "export"]
