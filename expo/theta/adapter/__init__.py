"""A PEFT LoRA adapter over its base, from headers and its config alone.

`settings.py` says what its config means and which adapters are refused; `tensors.py` fits its tensors to those of the
base; `folders.py` says where an adapter may be given and which files go along. Not here: what happens to every tensor
(`theta/decide_adapter.py`), and multiplying (`theta/merge.py`).
"""
