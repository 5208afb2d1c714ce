"""Statistics, pure: numbers in, numbers out.

`changes.py` has figures of changes, `means.py` means over prompts with several samples, `resampling.py` intervals and
p by resampling prompts, `paired.py` what two models' rows say beyond their mean difference, `racing.py` which of
several is ahead. Import the modules: numpy is not loaded with the package.
"""
