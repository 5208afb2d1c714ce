"""A PEFT LoRA adapter over its base, from headers and its config alone.

`settings.py` interprets its config and refuses unsupported adapters; `tensors.py` matches its tensors to those of the
base, whose names `names.py` finds; `embeddings.py` decides what tied and resized embeddings become; `folders.py` says
where an adapter is allowed and which files accompany it; `scaled.py` makes the config of one whose change is scaled.
Not here: what happens to every tensor (`theta/decide_adapter.py`, `theta/decide_scaled.py`), and the multiplication
(`theta/merge.py`).
"""
