"""Entries for the journal, as a journal of our own receives them."""

import array
import logging
import os
import socket
import sys

import pytest

from llmd import journald, log
from llmd.config import LogConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the journal is Linux's")


class Journal:
    """Listens where the journal would."""

    def __init__(self, path):
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(5)

    def entry(self):
        """The fields of the next entry."""
        data, ancillary, _, _ = self._socket.recvmsg(1 << 20, socket.CMSG_LEN(4))
        if not data:
            ((_, _, raw),) = ancillary
            (descriptor,) = array.array("i", raw)
            with open(descriptor, "rb") as file:
                file.seek(0)
                data = file.read()
        return parse(data)

    def close(self):
        self._socket.close()


def parse(data):
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(data[:8], "little")
            value, data = data[8 : 8 + length], data[8 + length + 1 :]
        fields[name.decode()] = value.decode()
    return fields


@pytest.fixture
def journal(tmp_path):
    found = Journal(tmp_path / "journal")
    yield found
    found.close()


@pytest.fixture
def logger(journal):
    handler = journald.JournalHandler(log._all_extras, log.TextFormatter(), journal.path)
    found = logging.getLogger("llmd.test_journald")
    found.addHandler(handler)
    found.setLevel(logging.DEBUG)
    found.propagate = False
    yield found
    found.removeHandler(handler)
    handler.close()


def test_an_entry_has_the_record_and_its_extras(journal, logger):
    logger.warning(
        "%s is %d", "x", 3, extra={"request_id": "r-1", "ttft_ms": 1.5, "finish_reasons": ["stop", "abort"], "key": ""}
    )
    entry = journal.entry()
    assert entry["MESSAGE"] == "x is 3"
    assert entry["PRIORITY"] == "4"
    assert entry["SYSLOG_IDENTIFIER"] == "llmd"
    assert entry["LLMD_REQUEST_ID"] == "r-1"
    assert entry["LLMD_TTFT_MS"] == "1.5"
    assert entry["LLMD_FINISH_REASONS"] == "stop,abort"
    assert entry["CODE_FUNC"] == "test_an_entry_has_the_record_and_its_extras"
    assert "LLMD_KEY" not in entry


def test_line_breaks_and_tracebacks_stay_in_one_entry(journal, logger):
    try:
        raise ValueError("ouch\nMESSAGE=forged")
    except ValueError:
        logger.exception("it failed")
    entry = journal.entry()
    assert entry["MESSAGE"].startswith("it failed\nTraceback")
    assert entry["MESSAGE"].endswith("ValueError: ouch\nMESSAGE=forged")
    assert entry["PRIORITY"] == "3"


def test_what_no_datagram_holds_goes_through_a_sealed_file(journal, logger):
    logger.info("a" * 1_000_000)
    assert len(journal.entry()["MESSAGE"]) == 1_000_000
    logger.info("after it")
    assert journal.entry()["MESSAGE"] == "after it"


def test_without_a_journal_the_line_goes_to_stderr(tmp_path, capsys):
    handler = journald.JournalHandler(log._all_extras, log.TextFormatter(), str(tmp_path / "nobody"))
    handler.emit(
        logging.makeLogRecord({"msg": "still told", "levelno": logging.INFO, "levelname": "INFO", "name": "llmd.x"})
    )
    handler.close()
    assert "INFO    llmd.x: still told" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7)],
)
def test_priorities_are_syslogs(level, priority):
    assert journald.priority_of(level) == priority


def test_field_names_are_what_the_journal_takes():
    assert journald.field_name("ttft.ms-ü") == "LLMD_TTFT_MS__"
    assert len(journald.field_name("x" * 100)) == 64


def test_the_journal_is_known_by_its_device_and_inode(tmp_path):
    with open(tmp_path / "stream", "w") as file:
        found = os.fstat(file.fileno())
        assert journald.is_journal(file.fileno(), {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
        assert not journald.is_journal(file.fileno(), {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + 1}"})
        assert not journald.is_journal(file.fileno(), {})
    assert not journald.is_journal(99999, {"JOURNAL_STREAM": "1:2"})


def test_auto_takes_the_journal_only_where_stderr_is_it(monkeypatch):
    monkeypatch.setattr(log, "_leads_to_journal", lambda: True)
    for form, is_journal in (("auto", True), ("journald", True), ("text", False), ("json", False)):
        handler = log._handler(LogConfig(format=form).format)
        assert isinstance(handler, journald.JournalHandler) == is_journal
        handler.close()
    monkeypatch.undo()
    assert not isinstance(log._handler("auto"), journald.JournalHandler)
