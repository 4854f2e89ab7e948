"""How a conversation becomes tokens, and a sampled turn becomes tool calls."""

from sod_mcore.chat.conversation import TokenizedConversation, tokenize_conversation
from sod_mcore.chat.renderer import ChatRenderer
from sod_mcore.chat.template import ChatTemplateError
from sod_mcore.chat.tool_calls import ParsedTurn, ToolCall, parse_tool_calls

__all__ = [
    "ChatRenderer",
    "ChatTemplateError",
    "ParsedTurn",
    "TokenizedConversation",
    "ToolCall",
    "parse_tool_calls",
    "tokenize_conversation",
]
