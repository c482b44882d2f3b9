"""Log lines as text and JSON, with the request that they are about."""

import json
import logging
import sys

import pytest

from llmd import log
from llmd.config import LogConfig


@pytest.fixture
def logger():
    """Loggers as they were, afterwards."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level, logging.getLogger("llmd").level)
    yield logging.getLogger("llmd.test")
    root.handlers[:], root.level = before[:2]
    logging.getLogger("llmd").setLevel(before[2])
    logging.captureWarnings(False)


def test_text_lines(logger, capsys):
    log.setup(LogConfig())
    logger.info("%s is %d", "x", 3)
    logger.debug("not shown")
    token = log.request_id.set("req-1")
    logger.warning("about one")
    log.request_id.reset(token)
    logger.info("about another", extra={"request_id": "req-2"})
    lines = capsys.readouterr().err.splitlines()
    assert [line[24:] for line in lines] == [
        "INFO    llmd.test: x is 3",
        "WARNING llmd.test: about one [req-1]",
        "INFO    llmd.test: about another [req-2]",
    ]


def test_json_lines(logger, capsys):
    log.setup(LogConfig(format="json", level="debug"))
    logger.debug("a\nb", extra={"request_id": "r", "num_tokens": 3, "path": sys})
    try:
        raise ValueError("ouch")
    except ValueError:
        logger.exception("failed")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["level"], first["logger"], first["message"], first["request_id"]) == ("debug", "llmd.test", "a\nb", "r")
    assert first["num_tokens"] == 3
    assert isinstance(first["time"], float)
    assert "ValueError: ouch" in second["traceback"]


def test_level_can_change_while_running(logger, capsys):
    log.setup(LogConfig(level="error"))
    logger.info("not shown")
    log.set_level("debug")
    logger.debug("shown")
    logging.getLogger("urllib3").info("a chatty library stays quiet")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_setup_twice_writes_each_line_once(logger, capsys):
    log.setup(LogConfig())
    log.setup(LogConfig())
    logger.info("once")
    assert len(capsys.readouterr().err.splitlines()) == 1
