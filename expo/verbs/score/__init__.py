"""`expo score`: score the answers of `expo generate` with a reward model.

`plan.py` decides everything from the outputs and the reward model's small files, `engine.py` which engine scores,
`rows.py` turns answers into the token ids that are scored, and `job.py` has the engine score what is missing, each row
durable as it comes, and writes the final files in output order. The loop that runs the job is in `rows/`.
"""

from expo.verbs.score.job import ScoreJob
from expo.verbs.score.plan import ReadyModel, find_reward_models, plan, run
from expo.verbs.score.result import Scored

__all__ = ["ReadyModel", "ScoreJob", "Scored", "find_reward_models", "plan", "run"]
