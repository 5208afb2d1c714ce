"""ExPO model extrapolation: θ(α) = θ_sft + (1 + α)(θ_dpo − θ_sft) (Zheng et al., ACL 2025).

Each command is a module with a `run` function that takes the command's config object:

    from expo.config import ExtrapolateConfig
    from expo.verbs.extrapolate import run

    run(ExtrapolateConfig(sft="my-sft", dpo="my-dpo", alpha=(0.3,)))
"""

__version__ = "0.1.0"
