"""`expo report`: one HTML page about two or more runs, which opens from disk and asks no network for anything.

`job.py` reads, compares and writes; `sweep.py` knows what sweeps leave. `page.py` makes the page of what others find:
`aligned.py` (rows beside each other), `verdict.py` and `notes.py` (words), `figures.py` and `payload.py`.
"""

from expo.verbs.report.job import Report as Report, ReportPlan as ReportPlan, plan as plan, run as run
