"""A pair of checkpoints combined.

`pair.py` finds and checks a pair. `plan.py` defines a plan, and `decide.py` makes it from headers
(`decide_adapter.py` where DPO is an adapter over SFT). `stream.py` executes it piece by piece, by one of the formulas
in `rules/`; `merge.py` multiplies an adapter's factors, `norms.py` has the maths around both. `tensors.py` gives θ(α)
tensor by tensor.
"""
