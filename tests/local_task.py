"""A task of the lm-evaluation-harness in local files, which needs no network."""

from __future__ import annotations

from collections.abc import Sequence
import json
import pathlib
from typing import Any

import numpy as np

NAME = "colours"
ITEMS = [{"question": f"Item {i}:", "choices": ["red", "green", "blue sky"], "answer": i % 3} for i in range(5)]


def evaluate(folder: pathlib.Path, monkeypatch, **options: Any) -> tuple[list[list[float]], float]:
  """Runs the multiple-choice task.

  Args:
    folder: where the task is written, and what the harness keeps.
    monkeypatch: of the test.
    **options: of `lm_eval.evaluator.simple_evaluate`, the model among them.

  Returns:
    The log-likelihood of every choice of every item, and the accuracy.
  """
  for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
    monkeypatch.setenv(name, "1")
  import datasets
  from lm_eval.evaluator import simple_evaluate
  from lm_eval.tasks import TaskManager

  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
  (folder / "data.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
  (folder / f"{NAME}.yaml").write_text(f"""
task: {NAME}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
""")
  results = simple_evaluate(tasks=[NAME], bootstrap_iters=0, **options,
                            task_manager=TaskManager(include_path=str(folder), include_defaults=False))
  scores = [[_score(response) for response in sample["resps"]] for sample in results["samples"][NAME]]
  return scores, results["results"][NAME]["acc,none"]


def _score(response: Sequence[Any]) -> float:
  return float(np.asarray(response[0] if isinstance(response[0], tuple) else response)[0])
