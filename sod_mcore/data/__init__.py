"""Prompts, conversations, and the plan of a training step."""

from sod_mcore.data.errors import DataError
from sod_mcore.data.lengths import LongPrompt, split_by_length
from sod_mcore.data.order import EpochOrder
from sod_mcore.data.overlap import OverlapError, assert_disjoint, normalized_question
from sod_mcore.data.plan import MicroBatch, MiniBatch, Plan, make_plan
from sod_mcore.data.prompts import PromptSource, question_text, read_prompts, read_questions
from sod_mcore.data.sft import Conversation, read_conversations, tokenize_conversations

__all__ = [
    "Conversation",
    "DataError",
    "EpochOrder",
    "LongPrompt",
    "MicroBatch",
    "MiniBatch",
    "OverlapError",
    "Plan",
    "PromptSource",
    "assert_disjoint",
    "make_plan",
    "normalized_question",
    "question_text",
    "read_conversations",
    "read_prompts",
    "read_questions",
    "split_by_length",
    "tokenize_conversations",
]
