"""Every command that is printed anywhere is a command that runs: what is printed, what it runs on, and what runs it.

`pages.py` finds what is printed: fenced blocks of Markdown, examples below helps, headers of scripts, docstrings,
messages. `check.py` has the program's own parser read each line, without running it. `stand_ins.py` makes the things
that a text names (models and data sets of the hub, `my-sft`, `prompts.jsonl`) resolve to tiny ones of this machine,
`answering.py` is who answers at an address, and `shortened.py` says which words are added to a command that would take
too long; the text itself is run as it stands. `programs.py` has the programs that a page's shell finds first, those
that this machine lacks among them. `session.py` runs a page, `warm.py` makes its processes cheap in the tests.
"""
