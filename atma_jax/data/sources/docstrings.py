"""The ``docstrings`` source: questions about the installed Python packages, answered by their own docstrings."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
import inspect
import warnings

from atma_jax.data.chat_template import Message
from atma_jax.data.conversations import ConversationSource, document_of
from atma_jax.data.documents import Document, SourceFile
from atma_jax.data.sources.python_source import PythonSource

_QUESTIONS = {ast.ClassDef: "What is {name} in {module}?", ast.FunctionDef: "What does {name} in {module} do?",
              ast.AsyncFunctionDef: "What does {name} in {module} do?"}
_SHORTEST, _LONGEST = 16, 400  # characters of an answer
_CODE_PER_ANSWER = 20  # bytes of code that are read for a byte of conversations


class DocstringSource(ConversationSource):
  """One conversation for each public function, method and class with a docstring, whose first paragraph is the answer."""

  prefix = "docstrings"
  syntax = "docstrings"
  help = "questions about this Python installation, answered by its docstrings"
  skips_unreadable = True

  def files(self) -> list[SourceFile]:
    return PythonSource().files()

  def choose(self, files: list[SourceFile], most_bytes: int | None) -> list[SourceFile]:
    """Every so many files, so that what is wanted of answers is found without reading all code."""
    if most_bytes is None:
      return files
    return files[::max(1, sum(file.size for file in files) // (_CODE_PER_ANSWER * most_bytes))]

  def read(self, file: SourceFile, rows: Collection[int] | None = None) -> Iterator[Document]:
    module = file.name.partition("/")[2].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    row = 0
    for document in PythonSource().read(file):
      if document.text is None:
        yield document
        continue
      for name, kind, answer in answers_in(document.text):
        if rows is None or row in rows:
          question = Message("user", _QUESTIONS[kind].format(name=name, module=module))
          yield document_of(f"{file.name}:{name}", row, [question, Message("assistant", answer)])
        row += 1


def answers_in(code: str) -> Iterator[tuple[str, type[ast.AST], str]]:
  """Yields the dotted name, the kind and the first paragraph of the docstring of what a module defines, in its order."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # about escapes in other people's strings
      tree = ast.parse(code)
  except (SyntaxError, ValueError, RecursionError, MemoryError):  # templates, code for other versions
    return
  waiting = [("", tree.body)]
  while waiting:
    owner, body = waiting.pop()
    for node in body:
      if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
        name = f"{owner}{node.name}"
        if isinstance(node, ast.ClassDef):
          waiting.append((f"{name}.", node.body))
        paragraph = " ".join(inspect.cleandoc(ast.get_docstring(node, clean=False) or "").partition("\n\n")[0].split())
        if _SHORTEST <= len(paragraph) <= _LONGEST and paragraph.isascii():
          yield name, type(node), paragraph


SOURCE = DocstringSource
