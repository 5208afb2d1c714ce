"""A pair of checkpoints combined.

`pair.py` finds and checks a pair. `plan.py` says what a plan is, and `decide.py` makes it from headers
(`decide_adapter.py` where DPO is an adapter over SFT). `stream.py` executes it piece by piece, by one of the formulas
in `rules/`; `merge.py` multiplies what an adapter adds, `norms.py` is the maths around both. `tensors.py` gives θ(α)
tensor by tensor.
"""
