"""`expo sweep --search modules` (exploratory): whether modules with α of their own do better than one α for all.

`classes.py` divides tensors by their names, `search.py` is the search (pure: rewards in, vectors out), `plan.py` is
what is fixed beforehand, `run.py` has the engines answer, `found.py` is what was found, and `text.py` says it.
"""

from expo.verbs.sweep.modules.plan import ModulesPlan, plan
from expo.verbs.sweep.modules.run import run

__all__ = ["ModulesPlan", "plan", "run"]
