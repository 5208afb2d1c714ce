"""Tasks: where their rows come from, how a row becomes a conversation, and how answers are written and read back.

`table.py` lists them. A file of prompts is a task too.
"""

from expo.files import read_rows as read_rows
from expo.tasks.preferences import (
    Preference as Preference,
    clusters_of as clusters_of,
    load_preferences as load_preferences,
)
from expo.tasks.table import TASKS as TASKS, find_task as find_task
from expo.tasks.task import (
    Answer as Answer,
    Conversation as Conversation,
    HubSource as HubSource,
    Message as Message,
    Prompt as Prompt,
    Task as Task,
    answers_of as answers_of,
    assistant as assistant,
    load_prompts as load_prompts,
    read_conversations as read_conversations,
    read_outputs as read_outputs,
    subset_of as subset_of,
)
