"""`expo generate`: answer a task's prompts with a model.

`plan.py` plans the run from the prompts and the model's small files, `job.py` says how rows are produced and written;
`model.py` finds the model, `requests.py` builds the engine's requests. The loop that runs the job is in `rows/`.
"""

from expo.verbs.generate.job import GenerateJob
from expo.verbs.generate.plan import Generated, plan, run, run_together

__all__ = ["GenerateJob", "Generated", "plan", "run", "run_together"]
