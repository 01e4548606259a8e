"""Change Python source as text, with its syntax tree as a guide: cut holes, put functions in.

The taught code has no markers. A function is found by its file and its qualified name, such as
`RMSNorm.forward`, and cut from the first statement of its body to the last.
"""

import ast
import textwrap


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """The functions and methods of a module by qualified name."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            methods = (child for child in node.body if isinstance(child, ast.FunctionDef))
            found |= {f"{node.name}.{child.name}": child for child in methods}
    return found


def body_of(node: ast.FunctionDef) -> list[ast.stmt]:
    """A function's statements without its docstring."""
    return node.body[1:] if ast.get_docstring(node) is not None else node.body


def replace_bodies(source: str, bodies: dict[str, str]) -> str:
    """The source with the named functions' bodies replaced; signatures and docstrings stay."""
    lines = source.splitlines()
    nodes = functions(ast.parse(source))
    for name in sorted(bodies, key=lambda name: -nodes[name].lineno):
        node = nodes[name]
        start = body_of(node)[0].lineno - 1
        while lines[start - 1].lstrip().startswith("#"):  # these comments belong to the answer
            start -= 1
        indent = " " * (node.col_offset + 4)
        lines[start : node.end_lineno] = textwrap.indent(bodies[name], indent).splitlines()
    return "\n".join(lines) + "\n"


def replace_function(source: str, name: str, replacement: str) -> str:
    """The source with one function replaced by the text of another, which takes its name."""
    node = functions(ast.parse(source))[name]
    text = textwrap.dedent(replacement)
    new = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef))
    body = text.splitlines()[new.lineno - 1 : new.end_lineno]
    body[0] = body[0].replace(f"def {new.name}(", f"def {node.name}(", 1)
    lines = source.splitlines()
    indent = " " * node.col_offset
    lines[node.lineno - 1 : node.end_lineno] = [indent + line if line else "" for line in body]
    return "\n".join(lines) + "\n"


def guard_imports(source: str, holes: dict[str, str]) -> str:
    """Let a module be imported while a function that it calls at import is still a hole.

    holes: {function: the value, as source text, that stands in until it is written}.
    """
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        value = getattr(node, "value", None)
        called = getattr(getattr(value, "func", None), "id", None)
        if isinstance(node, ast.Assign) and called in holes:
            name = ast.unparse(node.targets[0])
            lines[node.lineno - 1 : node.end_lineno] = [
                "try:",
                f"    {lines[node.lineno - 1]}",
                "except NotImplementedError:  # until it is written",
                f"    {name} = {holes[called]}",
            ]
    return "\n".join(lines) + "\n"


def statements(nodes) -> set[str]:
    """The statements within nodes, each as one normalized line: of a loop or an if the first."""
    found = set()
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.stmt):
                found.add(ast.unparse(part).splitlines()[0])
    return found


def distinctive(line: str) -> bool:
    """Whether a statement could give an answer away: `return y` or a short loop could not."""
    says_little = ("raise ", "super()", "import ", "from ", "assert ", "if torch.compiler.")
    return len(line) >= 18 and not line.startswith(says_little)
