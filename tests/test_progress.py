"""Progress of answers: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import sys
import termios
from contextlib import suppress

import pytest

from expo.progress import RowsProgress, rows_progress


class Silent:
    """A bar that is not shown."""

    disable = True

    def __getattr__(self, name):
        return lambda *_, **__: None


def test_a_terminal_shows_rows_tokens_per_second_the_time_left_and_when_the_first_row_came(monkeypatch):
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = rows_progress("generate", 40, initial=8)
        progress.update(2, 100)
        progress.update(10, 900)
        progress.close()
    shown = everything_from(master).decode().split("\r")
    assert any("8/40 rows" in line for line in shown)
    last = [line for line in shown if line.strip()][-1]
    assert "20/40 rows" in last
    assert " left, " in last
    assert "tokens/s, first row after 0.0 s" in last


def everything_from(master: int) -> bytes:
    """What a terminal was sent, which may come bit by bit; at its end reading fails."""
    content = b""
    with suppress(OSError):
        while chunk := os.read(master, 1 << 16):
            content += chunk
    os.close(master)
    return content


def test_a_log_file_gets_a_line_a_minute(caplog, capsys):
    now = [0.0]
    progress = RowsProgress(Silent(), 100, 20, clock=lambda: now[0])
    with caplog.at_level(logging.INFO, "expo"):
        for second in range(1, 151):
            now[0] = float(second)
            if second % 5 == 0:
                progress.update(2, 500)
        progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        "44 of 100 rows, 100 tokens/s, first row after 5.0 s, 0:02:20 left",
        "68 of 100 rows, 100 tokens/s, first row after 5.0 s, 0:01:20 left",
    ]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("total", [0, 3])
def test_a_short_run_says_nothing_in_a_log_file(total, caplog, capsys):
    progress = rows_progress("generate", total)
    for _ in range(total):
        progress.update(1, 10)
    progress.close()
    assert caplog.records == []
    assert capsys.readouterr().err == ""
