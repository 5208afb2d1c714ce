"""A PEFT LoRA adapter over its base, from headers and its config alone.

`settings.py` says what its config means and which adapters are refused; `tensors.py` fits its tensors to those of the
base. Not here: multiplying (`rules.py`).
"""
