"""Demonstrations of agents at work: careful ones for the teacher, sloppy ones for the student.

Every observation is the real output of the program before it, in the words of the code interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace

from examples.arithmetic.problems import Problem
from examples.arithmetic.settings import AgentHabits, CopyShares
from sod_mcore.tools import CodeInterpreter, ToolOutputRule, code_interpreter_schema
from sod_mcore.trajectory import Message

TOOL = code_interpreter_schema()
"""The schema of :class:`CodeInterpreter`, which a sandbox is not needed for."""

TOOL_OUTPUT_RULE = ToolOutputRule(max_characters=256, side="middle", traceback="last_line")
"""What a run of the example sets under ``tools``."""

FAILING_PROGRAMS: dict[str, Callable[[str], str]] = {
    "unclosed": "print({}".format,
    "closed twice": "print({}))".format,
    "misspelled": "prnt({})".format,
    "other language": "out({})".format,
    "dangling operator": "print({} +)".format,
    "stray quote": "print('{})".format,
}
"""Ways to get a call wrong, from the expression to compute. Each raises."""

TOLD = "\\boxed{{{}}}"
"""What follows the question where it tells the answer: words that the tokenizer has. No problem
contains them."""


@functools.lru_cache(maxsize=100_000)
def run_program(code: str) -> str:
    """The observation that the code interpreter gives for one of our own programs.

    It runs in this process: only text that this file has written may come here.
    """
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except (SyntaxError, NameError) as error:
        lines = traceback.format_exception_only(error)
        output.write(next(line for line in lines if not line[:1].isspace()))
    return TOOL_OUTPUT_RULE.cut(output.getvalue().removesuffix("\n"))


def demonstrate(problem: Problem, habits: AgentHabits, rng: random.Random) -> list[Message]:
    """One conversation about ``problem``, from the user's question to the agent's answer."""
    question = problem.question
    if habits.told and rng.random() < habits.told:
        question += TOLD.format(problem.answer)
        habits = replace(habits, gives_up=0.0, stops_early=0.0)
    messages: list[Message] = [{"role": "user", "content": question}]
    result = ""
    for number, step in enumerate(problem.steps):
        expression = step.format(result)
        failing = _failing_calls(expression, habits, rng)
        messages += failing
        if failing and rng.random() < habits.gives_up:
            return [*messages, answer_turn("unknown")]
        program = f"print({expression})"
        messages += [call_turn(program), tool_message(program)]
        result = run_program(program)
        is_last = number + 1 == len(problem.steps)
        if not is_last and rng.random() < habits.stops_early:
            break
    return [*messages, answer_turn(result)]


def without_answer(question: str) -> str:
    """The question as the student is asked it, whether or not the answer was told."""
    return question.partition(TOLD.split("{", 1)[0])[0]


def copy_exercise(problem: Problem, shares: CopyShares, rng: random.Random) -> list[Message]:
    """A conversation, without tool schema, in which only turns that copy have loss."""
    kind = rng.choices(list(asdict(shares)), list(asdict(shares).values()))[0]
    question: Message = {"role": "user", "content": problem.question}
    program = f"print({problem.steps[0]})"
    result = run_program(program)
    if kind == "answer":
        return [tool_message(program), answer_turn(result)]
    if kind == "first_call" or len(problem.steps) == 1:
        return [question, call_turn(program)]
    messages = [question, call_turn(program, loss=False)]
    for step in problem.steps[1:]:
        messages.append(tool_message(program))
        program = f"print({step.format(run_program(program))})"
        messages.append(call_turn(program))
    return messages


def call_turn(program: str, *, loss: bool = True) -> Message:
    """An assistant turn that calls the code interpreter."""
    function = {"name": CodeInterpreter.name, "arguments": {"code": program}}
    calls = [{"type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls, "loss": loss}


def answer_turn(answer: str) -> Message:
    """An assistant turn that ends the conversation."""
    return {"role": "assistant", "content": f"\\boxed{{{answer}}}"}


def tool_message(program: str) -> Message:
    """What the code interpreter answers."""
    return {"role": "tool", "content": run_program(program)}


def _failing_calls(expression: str, habits: AgentHabits, rng: random.Random) -> list[Message]:
    messages: list[Message] = []
    probability = habits.fails
    for _ in range(habits.max_failing_calls):
        if rng.random() >= probability:
            break
        program = FAILING_PROGRAMS[rng.choice(list(FAILING_PROGRAMS))](expression)
        messages += [call_turn(program, loss=habits.learns_failing_calls), tool_message(program)]
        probability = habits.fails_again
    return messages
