"""A pair of checkpoints: the plan (`plan.py`), and the stream of θ(α) pieces that executes it (`stream.py`)."""
