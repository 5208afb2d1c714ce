"""`expo sweep`: which α, by the rewards of its answers, with one live engine for all of them.

`plan.py` decides from headers and prompts, `placement.py` where each engine runs, `lanes.py` has the processes with
the engines and their queues, `switch.py` proves that a live engine takes another α, `making.py` runs the lanes,
`choice.py` chooses (pure), `text.py` and `picture.py` show it, `conclude.py` writes it, `record.py` is sweep.json,
`job.py` is all of it in order, `estimate.py` says what it would cost.
"""

from expo.verbs.sweep.conclude import Swept
from expo.verbs.sweep.estimate import plan_with_cost as plan
from expo.verbs.sweep.job import run

__all__ = ["Swept", "plan", "run"]
