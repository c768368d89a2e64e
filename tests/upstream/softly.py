"""`assert condition` of a Python file as `tca_check(line, condition, values)`: the test goes on after a false one."""

from __future__ import annotations

import ast
from pathlib import Path


class Soft(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.Expr:
        text = ast.unparse(node.test)
        left = node.test.left if isinstance(node.test, ast.Compare) else node.test
        line = ast.Constant(node.lineno)
        # what was compared: the left side's value where looking at it again costs nothing and changes nothing
        calls = any(isinstance(part, (ast.Call, ast.Await, ast.NamedExpr)) for part in ast.walk(left))
        values: ast.expr = ast.Constant(text)
        if not calls:
            shown = ast.Call(ast.Name("repr", ast.Load()), [left], [])
            cut = ast.Subscript(shown, ast.Slice(None, ast.Constant(200), None), ast.Load())
            values = ast.BinOp(ast.Constant(text + "; it is "), ast.Add(), cut)
        call = ast.Call(ast.Name("tca_check", ast.Load()), [line, node.test, values], [])
        return ast.copy_location(ast.Expr(call), node)


def rewrite(path: Path) -> None:
    tree = Soft().visit(ast.parse(path.read_text(encoding="utf-8")))
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)) + "\n", encoding="utf-8")
