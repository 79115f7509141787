"""Holds a source file's use of TensorRT against the real API, as a script where `tensorrt_bindings` can be loaded.

    python tensorrt_api.py FILE    JSON: what was used, and a line for each use that the real API does not have

What a name holds is followed through assignments, annotations, and what the bindings say that a method returns.
"""

import ast
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

API = "tensorrt_bindings.tensorrt."


@dataclass(frozen=True)
class Instance:
    """Of a class of the API; kind None: of one that the bindings do not name."""

    kind: Any


@dataclass(frozen=True)
class Thing:
    """The module, or a class, enum member or method of it."""

    value: Any


def parameters(doc: str) -> list[tuple[list[str], int]]:
    """Of each overload in a docstring of the bindings: names of the parameters without self, how many are needed."""
    found = []
    for text in re.findall(r"\w+\(self: ([^\n]*)\) -> ", doc):
        text = re.sub(r"<[^>]*>", "default", text)  # <Enum.MEMBER: 0> as a default
        found.append((re.findall(r", (\w+): ", text), len(re.findall(r", \w+: ", text)) - text.count(" = ")))
    return found


class Checker(ast.NodeVisitor):
    def __init__(self, trt: Any, tree: ast.Module) -> None:
        self.trt = trt
        self.names: dict[str, Any] = {}
        self.functions = {node.name: node.returns for node in tree.body if isinstance(node, ast.FunctionDef)}
        self.uses: set[str] = set()
        self.wrong: set[str] = set()
        self.visit(tree)

    def report(self, node: ast.AST, text: str) -> None:
        self.wrong.add(f"line {node.lineno}: {text}")  # type: ignore[attr-defined]

    def look(self, node: ast.AST, owner: Any, name: str) -> Any:
        label = f"{getattr(owner, '__name__', owner)}.{name}"
        self.uses.add(label)
        if not hasattr(owner, name):
            self.report(node, f"{label} does not exist")
            return None
        return getattr(owner, name)

    def resolve(self, node: ast.AST) -> Any:
        """Instance or Thing; None for what does not come from TensorRT."""
        if isinstance(node, ast.Name):
            return Thing(self.trt) if node.id == "trt" else self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self.names.get(f"self.{node.attr}")
            owner = self.resolve(node.value)
            if owner is None or node.attr == "__class__":
                return None
            if isinstance(owner, Thing):
                value = self.look(node, owner.value, node.attr)
                return None if value is None or isinstance(value, str) else Thing(value)
            if owner.kind is None:
                self.report(node, f"what {ast.unparse(node.value)} is, the bindings do not say: annotate it")
                return None
            value = self.look(node, owner.kind, node.attr)
            return self.given(value.fget.__doc__) if isinstance(value, property) else value and Thing(value)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in self.functions:
                return self.annotated(self.functions[node.func.id])
            called = self.resolve(node.func)
            if not isinstance(called, Thing):
                return None
            if isinstance(called.value, type):
                self.arguments(node, called.value.__init__.__doc__)
                return Instance(called.value)
            # A method called on its class, as in `trt.ILogger.__init__(self)`, is given self as well.
            self.arguments(node, called.value.__doc__, bound=self.base(node.func) is not Thing)
            return self.given(called.value.__doc__)
        return None

    def base(self, node: ast.AST) -> type | None:
        return type(self.resolve(node.value)) if isinstance(node, ast.Attribute) else None

    def arguments(self, node: ast.Call, doc: str | None, bound: bool = True) -> None:
        """There are as many as one of the overloads takes, and it has the keywords."""
        overloads = parameters(doc or "")
        given = len(node.args) + len(node.keywords) - (not bound)
        keywords = {keyword.arg for keyword in node.keywords}
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        if overloads and not any(
            keywords <= set(names) and (starred or needed <= given <= len(names)) for names, needed in overloads
        ):
            self.report(node, f"{ast.unparse(node.func)} does not take these arguments")

    def given(self, doc: str | None) -> Instance | None:
        """What a docstring of the bindings says is returned."""
        found = re.search(r"\) -> ([\w.:]+)", doc or "")
        if not found or not (found[1].startswith(API) or "::" in found[1]):
            return None
        return Instance(getattr(self.trt, found[1].removeprefix(API), None))

    def annotated(self, node: ast.AST | None) -> Instance | None:
        """The class of the API in an annotation, alone or in a union."""
        for part in ast.walk(node) if node is not None else ():
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "trt":
                value = self.look(part, self.trt, part.attr)
                return value and Instance(value)
        return None

    def visit_Attribute(self, node: ast.Attribute | ast.Call) -> None:
        self.resolve(node)
        self.generic_visit(node)

    visit_Call = visit_Attribute

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        value = self.resolve(node.value)
        for target in node.targets:
            name = ast.unparse(target)
            if name.endswith(".__class__"):
                self.names[name.removesuffix(".__class__")] = Instance(value.value)
            elif value is not None or not name.startswith("self."):
                self.names[name] = value

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
        name = ast.unparse(node.target)
        self.names[name] = self.names[f"self.{name}"] = self.annotated(node.annotation)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = {name: value for name, value in self.names.items() if not name.startswith("self.")}
        for argument in node.args.args:
            self.names[argument.arg] = self.annotated(argument.annotation)
        for statement in node.body:
            self.visit(statement)
        self.names = before | {name: value for name, value in self.names.items() if name.startswith("self.")}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.names = self.names, {}
        for base in filter(None, map(self.resolve, node.bases)):
            own = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
            for name in dir(base.value):
                method = getattr(base.value, name)
                if name.startswith("_") or not callable(method) or not parameters(method.__doc__ or ""):
                    continue
                self.uses.add(f"{base.value.__name__}.{name}")
                if name not in own:
                    self.report(node, f"{node.name} has no {name}, which TensorRT calls")
                elif len(own[name].args.args) - 1 != len(parameters(method.__doc__)[0][0]):
                    self.report(own[name], f"{node.name}.{name} takes another number of arguments")
        for statement in node.body:
            self.visit(statement)
        self.names = outer


if __name__ == "__main__":
    import tensorrt_bindings

    checker = Checker(tensorrt_bindings, ast.parse(Path(sys.argv[1]).read_text("utf-8")))
    print(json.dumps({"uses": sorted(checker.uses), "wrong": sorted(checker.wrong)}))
