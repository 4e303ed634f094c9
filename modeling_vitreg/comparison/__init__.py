"""What models cost and what they are worth, side by side: one table and one plot of one run.

`cost` counts operations and tokens, and times all models in turn; `survivors` measures outliers among the tokens that
are left where a model works on fewer tokens; `run.compare` adds the verdict of `analysis` and the results of
`evaluation`; `table` shows everything.
"""

from .cost import Cost, measure_costs
from .run import ComparisonReport, compare


__all__ = ["ComparisonReport", "Cost", "compare", "measure_costs"]
