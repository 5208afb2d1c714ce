"""Two demos on models trained on the spot.

`bash demo/run.sh` draws the reward of a trio against α. `python -m demo.trajectory` extrapolates a run of reinforcement
learning from its first steps.
"""
