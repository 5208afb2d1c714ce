"""A pair of checkpoints combined.

`plan.py` says what a plan is, `decide.py` makes it from headers, `layout.py` lays out the output's files, and
`stream.py` executes it, piece by piece.
"""
