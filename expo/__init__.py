"""ExPO model extrapolation: θ(α) = θ_sft + (1 + α)(θ_dpo − θ_sft) (Zheng et al., ACL 2025).

Each command is a function, with the command's settings as keyword arguments, and a small object as its result:

    import expo

    made = expo.extrapolate(sft="my-sft", dpo="my-dpo", alpha=0.3, output="my-expo")
    print(made.path)

Importing this loads nothing else: what is asked for is loaded then (`api.py`).
"""

from importlib import import_module

__version__ = "0.1.0"

PLACES = {
    **dict.fromkeys(
        ("extrapolate", "inspect", "generate", "score", "compare", "sweep", "report", "recipe"), "expo.api"
    ),
    **dict.fromkeys(("ExpoError", "InputError", "EnvironmentFailure", "MissingExtra"), "expo.errors"),
}
"""Where each name is that the package offers."""

__all__ = [*PLACES, "__version__"]


def __getattr__(name: str) -> object:
    """Load what is asked for."""
    if name not in PLACES:
        raise AttributeError(f"module 'expo' has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PLACES])
