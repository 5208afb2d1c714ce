"""A pair of checkpoints combined.

`plan.py` says what a plan is, `decide.py` makes it from headers (`decide_adapter.py` where DPO is an adapter over SFT),
`layout.py` lays out the output's files, and `stream.py` executes it piece by piece, by one of the formulas in
`rules/`; `merge.py` multiplies what an adapter adds, `norms.py` is the maths around both.
"""
