"""`expo generate`: answer a task's prompts with a model.

`job.py` decides what is to be done from the prompts and the model's small files, and how rows are made and written;
`model.py` finds the model, `requests.py` makes what the engine is asked. The loop that runs the job is in `rows/`.
"""

from expo.generate.job import Generated, GenerateJob, plan, run

__all__ = ["GenerateJob", "Generated", "plan", "run"]
