"""`expo generate`: answer a task's prompts with a model.

The plan is made from the prompts and the model's small files (`plan`); the engine then yields rows as they
finish, each durable before the next is waited for; the final file is written when all are there.
"""

from expo.generate.decide import Plan, plan, share
from expo.generate.dispatch import run
from expo.generate.loop import Generated

__all__ = ["Generated", "Plan", "plan", "run", "share"]
