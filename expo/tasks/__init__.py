"""Prompt sets: where their rows come from, how a row becomes a conversation, and how answers are written.

`table.py` lists them. A file of prompts is a task too.
"""

from expo.tasks.files import read_rows
from expo.tasks.load import load_prompts
from expo.tasks.outputs import read_conversations, read_outputs
from expo.tasks.prompts import Answer, Conversation, Message, Prompt, Source, Task, assistant
from expo.tasks.table import TASKS, find_task

__all__ = [
    "TASKS",
    "Answer",
    "Conversation",
    "Message",
    "Prompt",
    "Source",
    "Task",
    "assistant",
    "find_task",
    "load_prompts",
    "read_conversations",
    "read_outputs",
    "read_rows",
]
