"""Splits generated text into content, reasoning and tool calls, as it comes or as a whole: one path for both."""

from llmd.text.parsers.deltas import ParsedDelta as ParsedDelta
from llmd.text.parsers.deltas import Parser as Parser
from llmd.text.parsers.deltas import ToolCallDelta as ToolCallDelta
from llmd.text.parsers.deltas import new_call_id as new_call_id
from llmd.text.parsers.deltas import new_short_call_id as new_short_call_id
from llmd.text.parsers.forced import forced_calls as forced_calls
from llmd.text.parsers.headed_calls import HeadedCallParser as HeadedCallParser
from llmd.text.parsers.json_calls import BareJsonCallParser as BareJsonCallParser
from llmd.text.parsers.json_calls import JsonCallParser as JsonCallParser
from llmd.text.parsers.markup_calls import MarkupCallParser as MarkupCallParser
from llmd.text.parsers.reader import ParserSteps as ParserSteps
from llmd.text.parsers.reply import ReplyParser as ReplyParser
from llmd.text.parsers.scanners import JsonScanner as JsonScanner
from llmd.text.parsers.scanners import NotACall as NotACall
from llmd.text.parsers.scanners import PythonScanner as PythonScanner
from llmd.text.parsers.thinking import ThinkingParser as ThinkingParser
from llmd.text.parsers.tool_parser import ToolParser as ToolParser
