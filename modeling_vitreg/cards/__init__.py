"""Model cards from measurements, and the way to the Hub.

`publish` checks a folder, renders its card and sends both; `make_plan` does all of it but loading and sending;
`record_fingerprint` is called where a model is made, so that `publish` can tell whether it is still the same.
"""

from .errors import CardError, PublishError
from .fingerprint import record_fingerprint
from .plan import Plan, check_plan, make_plan
from .publish import Published, publish


__all__ = [
    "CardError",
    "Plan",
    "PublishError",
    "Published",
    "check_plan",
    "make_plan",
    "publish",
    "record_fingerprint",
]
