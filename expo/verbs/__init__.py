"""What expo does: a verb per command, with `plan(config)` and `run(config)`; `expo.extrapolate` and its like call it.

`extrapolate`, `inspect`, `generate`, `score` and `compare` know nothing of each other; `sweep` and `report` are made of
them. To add one: a module here, its config class in `config/`, its module in `cli/`, and its function in `api.py`.
"""
