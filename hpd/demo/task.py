"""The demo's problems: small arithmetic expressions, reasoned through in several equally valid ways.

A problem is an expression such as ``3+4+(2+6)=``. A solution works it out and ends in ``#### 15``. There are
many right solutions, which differ in style, in the order of the operations and in the order of the operands,
so the text has entropy, while the answer has none: what a distilled student needs.
"""

import random
from collections.abc import Iterator
from hashlib import blake2b
from operator import add, mul, sub
from typing import Literal, NamedTuple, TypeAlias, TypedDict, Union, get_args

Expression: TypeAlias = Union[int, "Operation"]
Split: TypeAlias = Literal["train", "validation", "test"]
Style: TypeAlias = Literal["equations", "rewriting"]

SPLITS: tuple[Split, ...] = get_args(Split)
STYLES: tuple[Style, ...] = get_args(Style)
ANSWER_MARK = "####"
NUM_OPERATIONS = 3
LARGEST_VALUE = 20

PRECEDENCE = {"+": 1, "-": 1, "*": 2}
OPERATIONS = {"+": add, "-": sub, "*": mul}
OPERATORS = ("+", "-", "*")
HASH_BUCKETS = 20
BUCKET_SPLITS: dict[int, Split] = {0: "test", 1: "validation"}


class Operation(NamedTuple):
    """``left operator right``; ``value`` is its result."""

    operator: str
    left: Expression
    right: Expression
    value: int


class SolvedProblem(TypedDict):
    """The text before and after the point where a model takes over, and the number that it should reach."""

    prompt: str
    completion: str
    answer: str


def evaluate(expression: Expression) -> int:
    """The number an expression stands for."""
    return expression if isinstance(expression, int) else expression.value


def operation(operator: str, left: Expression, right: Expression) -> Operation:
    """Join two expressions; ``operator`` is a key of ``PRECEDENCE``."""
    return Operation(operator, left, right, OPERATIONS[operator](evaluate(left), evaluate(right)))


def render(expression: Expression) -> str:
    """Infix notation with no parentheses but the necessary ones, so that text and tree determine each other.

    >>> render(operation("-", 3, operation("-", 2, 1)))
    '3-(2-1)'
    """
    if isinstance(expression, int):
        return str(expression)
    level = PRECEDENCE[expression.operator]
    left = render(expression.left)
    right = render(expression.right)
    if isinstance(expression.left, Operation) and PRECEDENCE[expression.left.operator] < level:
        left = f"({left})"
    if isinstance(expression.right, Operation) and PRECEDENCE[expression.right.operator] <= level:
        right = f"({right})"
    return f"{left}{expression.operator}{right}"


def split_of(prompt: str) -> Split:
    """The only split that a problem may appear in: it follows from the text, so splits are disjoint."""
    digest = int.from_bytes(blake2b(prompt.encode(), digest_size=8).digest(), "big")
    return BUCKET_SPLITS.get(digest % HASH_BUCKETS, "train")


def draw_problem(rng: random.Random, split: Split) -> Operation:
    """Draw an expression of ``NUM_OPERATIONS`` operations, all values from 0 to ``LARGEST_VALUE``."""
    while True:
        expression = _draw_expression(rng, NUM_OPERATIONS)
        if isinstance(expression, Operation) and split_of(prompt_of(expression)) == split:
            return expression


def prompt_of(problem: Expression) -> str:
    """The text a model is given."""
    return f"{render(problem)}="


def write_solution(problem: Operation, rng: random.Random, style: Style | None = None) -> str:
    """Write one of the right solutions.

    * ``equations``: one equation per operation, operands of sums and products in either order:
      ``3+4=7,2+6=8,8+7=15``;
    * ``rewriting``: the whole expression again, one operation fewer each time: ``7+(2+6)=7+8=15``.

    Args:
        problem: what to solve.
        rng: decides the order and, where ``style`` is None, the style.
        style: None draws one, each as likely.
    """
    style = style or rng.choice(STYLES)
    current: Expression = problem
    parts: list[str] = []
    while isinstance(current, Operation):
        chosen = rng.choice(list(_ready(current)))
        if style == "equations":
            parts.append(_equation(chosen, rng))
        current = _carry_out(current, chosen)
        if style != "equations":
            parts.append(render(current))
    separator = "," if style == "equations" else "="
    return f"{separator.join(parts)}{ANSWER_MARK} {problem.value}"


def generate_rows(split: Split, num_rows: int, seed: int) -> list[SolvedProblem]:
    """Distinct problems of a split, each with one solution; equal arguments give equal rows."""
    rng = random.Random(f"{split}-{seed}")
    rows: dict[str, SolvedProblem] = {}
    while len(rows) < num_rows:
        problem = draw_problem(rng, split)
        prompt = prompt_of(problem)
        if prompt not in rows:
            rows[prompt] = SolvedProblem(
                prompt=prompt, completion=write_solution(problem, rng), answer=str(problem.value)
            )
    return list(rows.values())


def final_answer(completion: str) -> str | None:
    """The text after the last answer mark, or None where there is no mark.

    >>> final_answer("7+8=15#### 15")
    '15'
    """
    _, mark, answer = completion.rpartition(ANSWER_MARK)
    return answer.strip() if mark else None


def is_correct(completion: str, answer: str) -> bool:
    """Grade the final answer only: the steps before it are the writer's own business."""
    return final_answer(completion) == answer


def _draw_expression(rng: random.Random, num_operations: int) -> Expression | None:
    """A random tree, or None as soon as a value is out of range."""
    if num_operations == 0:
        return rng.randint(1, 9)
    num_left = rng.randrange(num_operations)
    left = _draw_expression(rng, num_left)
    right = _draw_expression(rng, num_operations - 1 - num_left)
    if left is None or right is None:
        return None
    drawn = operation(rng.choice(OPERATORS), left, right)
    return drawn if 0 <= drawn.value <= LARGEST_VALUE else None


def _ready(expression: Expression) -> Iterator[Operation]:
    """The operations whose operands are both numbers, from left to right."""
    if isinstance(expression, int):
        return
    if isinstance(expression.left, int) and isinstance(expression.right, int):
        yield expression
    yield from _ready(expression.left)
    yield from _ready(expression.right)


def _carry_out(expression: Expression, chosen: Operation) -> Expression:
    """Put the value in the place of the chosen operation, told apart from equal ones by identity."""
    if isinstance(expression, int):
        return expression
    if expression is chosen:
        return expression.value
    return expression._replace(
        left=_carry_out(expression.left, chosen), right=_carry_out(expression.right, chosen)
    )


def _equation(node: Operation, rng: random.Random) -> str:
    left = evaluate(node.left)
    right = evaluate(node.right)
    if node.operator != "-" and rng.random() < 0.5:
        left, right = right, left
    return f"{left}{node.operator}{right}={node.value}"
