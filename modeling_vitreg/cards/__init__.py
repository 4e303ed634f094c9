"""Model cards made from measurements, and their upload to the Hub.

`publish` checks a folder, renders its card and uploads both; `make_plan` does the same without loading or sending
anything; `record_expected_outputs` is called where a model is made, so that `publish` can compare its outputs.
"""

from .errors import CardError, PublishError
from .isolation import record_expected_outputs
from .upload import Published, UploadPlan, check_plan, make_plan, publish


__all__ = [
    "CardError",
    "PublishError",
    "Published",
    "UploadPlan",
    "check_plan",
    "make_plan",
    "publish",
    "record_expected_outputs",
]
