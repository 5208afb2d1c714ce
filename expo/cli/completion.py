"""What a shell completes beside commands and options: choices and the names of recipes.

typer prints the shells' scripts (`--show-completion`) and answers them; nothing is loaded for it but the program's own
options. Where there is nothing to complete, shells complete files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable


def completing(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What typer asks for the words that begin like what is typed.

    Args:
        words: All of them; called when a shell asks.
    """

    def matching(incomplete: str) -> list[str]:
        return [word for word in words() if word.startswith(incomplete)]

    return matching
