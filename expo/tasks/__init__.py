"""Tasks: where their rows come from, how a row becomes a conversation, and how answers are written and read back.

`table.py` lists them. A file of prompts is a task too.
"""

from expo.files import read_rows
from expo.tasks.table import TASKS, find_task
from expo.tasks.task import (
    Answer,
    Conversation,
    HubSource,
    Message,
    Prompt,
    Task,
    assistant,
    load_prompts,
    read_conversations,
    read_outputs,
)

__all__ = [
    "TASKS",
    "Answer",
    "Conversation",
    "HubSource",
    "Message",
    "Prompt",
    "Task",
    "assistant",
    "find_task",
    "load_prompts",
    "read_conversations",
    "read_outputs",
    "read_rows",
]
