"""`expo sweep --likelihood` (exploratory): what θ(α) says of preference pairs, with nothing generated or scored.

For each α one forward pass over the pairs gives log π(chosen) and log π(rejected), durable row by row. `plan.py`
decides from the pairs and from headers, `job.py` reads an α's pairs, `figures.py` is the arithmetic, `text.py` says it,
and `run.py` is all of it in order.
"""

from expo.verbs.sweep.likelihood.plan import LikelihoodPlan, plan
from expo.verbs.sweep.likelihood.run import run

__all__ = ["LikelihoodPlan", "plan", "run"]
