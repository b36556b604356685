"""Write lm-eval task files for a directory of BLiMP jsonl files, one per paradigm, and the group `blimp_local`.

Example: python scripts/blimp_tasks.py data/blimp tasks
         quamba eval MODEL --tasks blimp_local --tasks-path tasks

Each line of a jsonl file holds one minimal pair: {"sentence_good": ..., "sentence_bad": ...}. A model is right where it
finds the good sentence likelier; the group's accuracy is the mean over paradigms.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

GROUP = "blimp_local"


def paradigm(path: Path) -> dict[str, Any]:
    """Return the lm-eval configuration of the paradigm in the jsonl file `path`."""
    return {
        "task": f"{GROUP}_{path.stem}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(path.resolve())},
        "validation_split": "train",  # what the json reader calls its only split
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def group(names: list[str]) -> dict[str, Any]:
    """Return the lm-eval configuration of the group of `names`, where every paradigm weighs the same."""
    return {
        "group": GROUP,
        "task": names,
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}],
        "metadata": {"version": 1.0},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory of BLiMP files, one PARADIGM.jsonl each")
    parser.add_argument("output", type=Path, help="directory for the YAML files; created if missing")
    arguments = parser.parse_args()
    files = sorted(arguments.source.glob("*.jsonl"))
    if not files:
        parser.error(f"there is no .jsonl file in '{arguments.source}'")

    arguments.output.mkdir(parents=True, exist_ok=True)
    tasks = [paradigm(path) for path in files]
    for task in [*tasks, group([task["task"] for task in tasks])]:
        name = task["group"] if "group" in task else task["task"]
        (arguments.output / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    print(f"wrote {len(tasks)} tasks and the group {GROUP} to {arguments.output}")


if __name__ == "__main__":
    main()
