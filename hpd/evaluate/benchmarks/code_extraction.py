"""The program in an answer. Python's own parser reads it, within a budget, so that the cost is bounded.

Whoever calls this on a model's text does it in a process of its own (`code_worker`).
"""

import ast
import re
import textwrap
import time
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from hpd.evaluate.benchmarks.answers import drop_thinking

__all__ = ["complete", "extract_program", "without_own_tests"]

_FENCE = re.compile(r"[ \t]*(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+#.-]*)(?P<rest>[^\n`]*)$")
_PYTHON = {"", "python", "python3", "py", "python2", "py3"}
_NESTING = {"", "markdown", "md", "text", "txt", "plaintext"}
_CODE_START = re.compile(
    r"(?:import |from \w[\w.]* import |(?:async )?def \w+\s*\(|class \w+\s*[:(]|@\w"
    r"|[A-Za-z_]\w{0,60}(?:\s?:\s?[\w\[\], .]{1,60})?\s?=\s?\S)"
)
_FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import[ \t]+[^\n]*\n?", re.MULTILINE)
_WRONG = re.compile(
    r"\b(?:wrong|incorrect|incorrectly|mistakes?|avoid|don't|do not|buggy|bugs?|bad|never|fails?|naive"
    r"|pitfalls?|broken|original|(?:not|won't) work|not (?:be )?(?:correct|right))\b",
    re.IGNORECASE,
)
_RIGHT = re.compile(
    r"(?<!not )(?<!not be )\b(?:correct|corrected|fix|fixed|fixes|right|better|improved|works|proper)\b",
    re.IGNORECASE,
)
_ODD_CHARACTERS = str.maketrans(
    dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u202f\u3000", " ")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", "")
    | {"\u2028": "\n", "\u2029": "\n", "\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'"}
    | {"\uff1a": ":", "\uff0c": ",", "\uff08": "(", "\uff09": ")"}
)

_MAX_CHARS = 200_000  # longer than any solution; Python's parser is slow on what loops
_MAX_BLOCKS = 40  # the last ones are read
_MAX_STARTS = 20  # places tried as the start of code in prose
_MAX_TRIMS = 30  # ends tried of a text that is not Python as a whole
_BUDGET_CHARS = 4_000_000  # given to the parser for one answer
_BUDGET_SECONDS = 10.0  # of processor time; reached by no answer that is a program
# Python's parser takes time with the square of their number, or worse.
_DECORATORS = re.compile(r"(?:^[ \t]*@[^\n]*\n){30}", re.MULTILINE)


class _Block(NamedTuple):
    code: str
    language: str
    intro: str
    """The prose before it, back to the block before."""


class _Parser:
    """Python's parser with a budget; beyond it nothing is Python."""

    def __init__(self) -> None:
        self._left = _BUDGET_CHARS
        self._end = time.process_time() + _BUDGET_SECONDS

    def error_line(self, code: str) -> int | None:
        """None where the code is Python, else the line that is not, from 1."""
        last = code.count("\n") + 1
        self._left -= len(code) + 1000
        if len(code) > _MAX_CHARS or self._left < 0 or time.process_time() > self._end:
            return last
        if loop := _DECORATORS.search(code):
            return code.count("\n", 0, loop.start()) + 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escapes
                # More than parsing: a return needs its function.
                compile(code, "<answer>", "exec", dont_inherit=True)
        except SyntaxError as error:
            return error.lineno or last
        except (ValueError, RecursionError, MemoryError):
            return last
        return None

    def parses(self, code: str) -> bool:
        """True if the code is Python as a whole."""
        return self.error_line(code) is None

    def longest_prefix(self, code: str, keep: int = 1) -> str | None:
        """The longest prefix, in whole lines and of at least `keep`, that is Python."""
        lines = code.split("\n")
        end = len(lines)
        for _ in range(_MAX_TRIMS):
            if end < keep or self._left < 0:
                break
            candidate = "\n".join(lines[:end])
            error_line = self.error_line(candidate)
            if error_line is None:
                return candidate if candidate.strip() else None
            end = min(end, error_line) - 1  # what ends at the error or behind it has the error too
        return None


def extract_program(text: str, entry_point: str, prompt: str = "") -> str | None:
    """The program in an answer, ready to run; None where there is no code.

    Of several fenced blocks the last that defines `entry_point` counts (one that the text calls wrong, or
    that is no Python, only where there is no other), with what it uses of the blocks before it; else the
    longest.
    Without fences, the code is what lies between the first line that starts like Python and the last line up
    to which all parses. What a prompt in Python brings (imports, helpers, the head of the function) is put
    before code that lacks it.

    Args:
        text: the answer; thoughts are dropped.
        entry_point: the function that the tests call.
        prompt: the prompt where it is Python that ends in the head of the function (HumanEval), else empty.
    """
    text = drop_thinking(text)[:_MAX_CHARS].replace("\r\n", "\n").lstrip("\ufeff")
    parser = _Parser()
    code = _best_block(text, entry_point, parser)
    if code is None and _continues(text, prompt, parser):
        code = text
    if code is None and prompt and text.strip() and not _defines(text, entry_point):
        whole = _body(prompt, text, parser)
        if whole is not None:
            return whole
    if code is None:
        code = _code_in_prose(text, entry_point, parser)
    if code is None or not code.strip():
        return None
    if _defines(code, entry_point):
        return _join(_preamble(prompt, entry_point), code)
    return _completed(prompt, code, parser) if prompt else code


def complete(prompt: str, body: str) -> str:
    """A prompt in Python and its continuation; a body that lost its indentation, or that of its first line,
    gets it back."""
    return _completed(prompt, body[:_MAX_CHARS], _Parser())


def without_own_tests(program: str, entry_point: str) -> str:
    """A program without what tries it out: at its margin, assertions, exits, and behind the function what
    calls it, prints or reads. A model's wrong example is not what is asked for."""
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return program
    trials = {name for node in tree.body for name in _bound(node) if _tries_out(node, entry_point)}
    defined = False
    dropped: set[int] = set()
    lines = program.split("\n")
    for node in tree.body:
        if _is_test(node, {entry_point, *trials} if defined else set()) and node.end_lineno is not None:
            numbers = range(node.lineno - 1, node.end_lineno)
            alone = not lines[node.lineno - 1][: node.col_offset].strip() and ";" not in lines[numbers[-1]]
            dropped.update(numbers if alone else ())
        defined = defined or getattr(node, "name", None) == entry_point
    kept = "\n".join(line for number, line in enumerate(lines) if number not in dropped)
    return kept if dropped else program


def _is_test(node: ast.stmt, names: set[str]) -> bool:
    """True for a statement that tries a program out; `names` are those of the function, once it is defined,
    and of what tries it out."""
    if isinstance(node, ast.Assert) or (isinstance(node, ast.Raise) and "SystemExit" in ast.unparse(node)):
        return True
    if isinstance(node, ast.Expr) and _called(node.value) & {"exit", "quit", "_exit", "testmod"}:
        return True
    if isinstance(node, ast.Expr) and re.match(r"(?:unittest|pytest)\.main\(", ast.unparse(node)):
        return True
    tries = (ast.Expr, ast.Assign, ast.For, ast.While, ast.With, ast.Try)
    if not names or not isinstance(node, tries):
        return False
    return bool(_called(node) & (names | {"print", "input", "exit", "quit"}))


def _tries_out(node: ast.stmt, entry_point: str) -> bool:
    """True for a function without arguments that asserts something of the entry point or prints it."""
    if not isinstance(node, ast.FunctionDef) or node.name == entry_point or node.args.args:
        return False
    checks = any(isinstance(inner, ast.Assert) for inner in ast.walk(node)) or "print" in _called(node)
    return checks and entry_point in _called(node)


def _called(node: ast.AST) -> set[str]:
    """Names of the functions and methods that are called in a part of a program."""
    functions = [inner.func for inner in ast.walk(node) if isinstance(inner, ast.Call)]
    names = {function.id for function in functions if isinstance(function, ast.Name)}
    return names | {function.attr for function in functions if isinstance(function, ast.Attribute)}


def _completed(prompt: str, body: str, parser: _Parser) -> str:
    found = _body(prompt, body, parser)
    if found is None:
        found = parser.longest_prefix(prompt + body, keep=len(prompt.split("\n")))
    return found or prompt + body


def _body(prompt: str, body: str, parser: _Parser) -> str | None:
    """A prompt and the body that continues it with the indentation that makes both Python."""
    body = body.strip("\n") if not body[:1].isspace() else body
    futures = "".join(_FUTURE.findall(body))
    if futures:
        prompt, body = futures.rstrip("\n") + "\n" + prompt, _FUTURE.sub("", body)
    for text in dict.fromkeys((body, body.translate(_ODD_CHARACTERS))):
        for restored in (text, "    " + text.lstrip(), textwrap.indent(textwrap.dedent(text), "    ")):
            if parser.parses(prompt + restored):
                return prompt + restored
    return None


def _best_block(text: str, entry_point: str, parser: _Parser) -> str | None:
    blocks = list(_blocks(text))[-_MAX_BLOCKS:]
    python = [block for block in blocks if block.language in _PYTHON] or blocks
    candidates = [block._replace(code=_readable(block.code, parser)) for block in python]
    candidates = [block for block in candidates if block.code.strip()] or candidates
    if not candidates:
        return None
    defining = [block for block in candidates if _defines(block.code, entry_point)]
    if not defining:
        return max((block.code for block in candidates), key=len)
    whole = [block for block in defining if parser.parses(block.code)] or defining
    praised = [block for block in whole if not _called_wrong(block)] or whole
    best = praised[-1]
    earlier = [block.code for block in candidates[: candidates.index(best)] if block not in defining]
    return _with_helpers(best.code, earlier)


def _called_wrong(block: _Block) -> bool:
    """True where the sentence right before a block, or its first comment, says that it is wrong."""
    prose = [line for line in block.intro.split("\n") if line.strip()]
    sentences = re.split(r"(?<=[.!?])\s+", prose[-1].strip()) if prose else [""]
    first = block.code.lstrip().split("\n", 1)[0]
    label = f"{sentences[-1]} {first if first.startswith('#') else ''}"
    return _WRONG.search(label) is not None and _RIGHT.search(label) is None


def _with_helpers(code: str, earlier: list[str]) -> str:
    """A program with the imports and definitions of earlier blocks that it uses and lacks."""
    try:
        tree = ast.parse(code)
        parts = [(block, ast.parse(block).body) for block in earlier]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code
    own = {name for node in tree.body for name in _bound(node)}
    needed = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - own
    found: list[str] = []
    for block, body in reversed(parts):
        lines = block.split("\n")
        for node in reversed(body):
            names = _bound(node)
            if not names & needed:
                continue
            start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            found.insert(0, "\n".join(lines[start - 1 : node.end_lineno]))
            needed = (needed - names) | {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - names
    return _join("".join(part + "\n\n" for part in found), code)


def _bound(node: ast.stmt) -> set[str]:
    """Names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def _blocks(text: str) -> Iterator[_Block]:
    """Fenced blocks, line by line; one that is never closed reaches to the end."""
    mark, language = "", ""
    lines: list[str] = []
    prose: list[str] = []
    indent = 0
    quoted = re.search(r"^> ?(?:```|~~~)", text, re.MULTILINE)
    all_lines = [re.sub("^> ?", "", line) if quoted else line for line in text.split("\n")]
    for line in all_lines:
        fence = _FENCE.fullmatch(line if mark else _late_fence(line))
        if not mark:
            if fence:
                mark, language, lines = fence["mark"], fence["language"].lower(), []
                indent = len(line) - len(line.lstrip())
                rest = fence.groupdict().get("rest") or ""
                if _CODE_START.match(f"{language} {rest.strip()}"):  # the code starts on the fence's line
                    language, lines = "", [f"{language} {rest.strip()}"]
                elif _CODE_START.match(rest.strip()):
                    lines = [rest.strip()]
            else:
                prose.append(line)
            continue
        closing = line.rstrip().endswith(mark[0] * len(mark)) and (
            line.strip() == mark[0] * max(len(mark), len(line.strip())) or len(mark) == 3
        )
        inner = fence is not None and bool(fence["language"]) and fence["mark"][0] == mark[0]
        if inner and (language in _NESTING or len(line) - len(line.lstrip()) <= indent):
            assert fence is not None
            yield _Block(_dedented(lines), language, "\n".join(prose))
            prose, mark, language, lines = [], fence["mark"], fence["language"].lower(), []
        elif closing and not inner and not _inside_a_string(line, lines, indent):
            lines.append(line.rstrip()[: -len(mark)].rstrip("`~"))
            yield _Block(_dedented(lines), language, "\n".join(prose))
            mark, prose = "", []
        else:
            lines.append(line)
    if mark:
        yield _Block(_dedented(lines), language, "\n".join(prose))


def _late_fence(line: str) -> str:
    """The fence that a line of prose ends with, or the line."""
    start = line.rfind("```")
    return (
        line[start:]
        if start > 0 and line[start + 3 :].strip().lower() in ("python", "python3", "py")
        else line
    )


def _inside_a_string(line: str, lines: list[str], indent: int) -> bool:
    """True for an indented fence within a triple-quoted string, such as a docstring with an example."""
    if len(line) - len(line.lstrip()) <= indent or (lines and line.strip("`~ \t")):
        return False
    quotes = sum(part.count('"""') + part.count("'''") for part in lines)
    return quotes % 2 == 1


def _dedented(lines: list[str]) -> str:
    return textwrap.dedent("\n".join(lines))


def _readable(code: str, parser: _Parser) -> str:
    """The code, or the part of it or the form without odd spaces that is Python."""
    if parser.parses(code):
        return code
    plain = code.translate(_ODD_CHARACTERS)
    if plain.lstrip().startswith(">>> "):  # a session in the interpreter
        plain = "\n".join(line[4:] for line in plain.split("\n") if line.startswith((">>> ", "... ")))
    if plain != code and parser.parses(plain):
        return plain
    prefix = parser.longest_prefix(plain)
    return prefix if prefix is not None and re.search(r"^\s*(?:def|class)\s", prefix, re.MULTILINE) else plain


def _code_in_prose(text: str, entry_point: str, parser: _Parser) -> str | None:
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines) if _CODE_START.match(line)]
    found = None
    position = 0
    for number in starts[:_MAX_STARTS]:
        if number < position:
            continue
        code = parser.longest_prefix("\n".join(lines[number:]))
        if code is not None:
            position = number + code.count("\n") + 1
            if _defines(code, entry_point):
                return code
            found = found or code
    return found


def _continues(text: str, prompt: str, parser: _Parser) -> bool:
    """True if the answer is the rest of the prompt's function: it starts indented and parses behind it."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    return (
        bool(prompt)
        and first[:1] in (" ", "\t")
        and (parser.longest_prefix(prompt + text, len(prompt.split("\n"))) is not None)
    )


def _defines(code: str, name: str) -> bool:
    return (
        re.search(
            rf"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+{re.escape(name)}\b"
            rf"|^{re.escape(name)}[ \t]*(?::[^=\n]*)?=(?!=)",
            code,
            re.MULTILINE,
        )
        is not None
    )


def _preamble(prompt: str, entry_point: str) -> str:
    """The imports and helpers above the function's head."""
    match = re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", prompt, re.MULTILINE)
    return prompt[: match.start()] if match else ""


def _join(before: str, code: str) -> str:
    """Two parts of a program; imports from `__future__` have to come first."""
    futures = "".join(line.rstrip("\n") + "\n" for line in _FUTURE.findall(code)) if before else ""
    return futures + before + (_FUTURE.sub("", code) if futures else code)
