"""A server at an address that a text names: it judges what AlpacaEval and FastChat ask, and answers everything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from evaluations.smoke import judge_server


@contextmanager
def serve(port: int, *models: str) -> Iterator[judge_server.Judge]:
    """Answer on that port of this machine, for these models, or for any where none is named."""
    with judge_server.serve(*models, port=port, otherwise=_answer) as judge:
        yield judge


def _answer(question: str) -> dict[str, Any]:
    """The question in capitals."""
    return {"message": {"role": "assistant", "content": question.upper()}, "finish_reason": "stop"}
