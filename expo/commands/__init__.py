"""A module per command: its options, declared, and what it prints. The verbs decide.

To add a command, write its module here with a function `command` and its EXAMPLES, and add it to the table in `cli.py`.
"""
