"""Zero-shot tasks: lm-eval's prompts on made-up rows, answered by a session, against sums done by hand."""

from __future__ import annotations

import gzip
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from losa_deploy.benchmarks.task_rows import READERS, task_rows
from losa_deploy.benchmarks.tasks import TaskResult, mean_of_tasks, require_lm_eval, run_tasks
from losa_deploy.cli.main import main
from losa_deploy.errors import InputError, MissingError, UsageError
from losa_deploy.interfaces import Session
from losa_deploy.progress import no_progress
from losa_deploy.runtimes.reference import ReferenceRuntime
from losa_deploy.text.tokenizer import Tokenizer, load_tokenizer

NAMES, THINGS = ("Anna", "Ben", "Carla", "Dora", "Emil", "Fred"), ("apples", "cups", "doors", "blue goats")


def made_up_rows(task: str) -> list[dict[str, object]]:
    """Six rows of a task in the plainer form, with answers of different lengths."""
    rows: list[dict[str, object]] = []
    for i, name in enumerate(NAMES):
        choices = [f"{k + i} {thing}" for k, thing in enumerate(THINGS[: 3 + i % 2])]
        question = {"question": f"What has {name}", "choices": choices, "answer": i % 3}
        rows.append(
            {
                "piqa": {"goal": f"{name} has", "sol1": "red eggs.", "sol2": f"{i} cups.", "label": i % 2},
                "hellaswag": {"ctx": f"Having: {name} has", "endings": choices, "label": i % 3},
                "winogrande": {
                    "sentence": f"{name} has 2 red _ and {i} hats.",
                    "option1": "apples",
                    "option2": "goats",
                    "answer": 1 + i % 2,
                },
                "boolq": {"passage": f"{name} has cups.", "question": "has it", "answer": i % 2 == 0},
                "rte": {"sentence1": f"{name} has cups.", "sentence2": "Ben has.", "label": i % 2},
            }.get(task, question)
        )
    return rows


def asked(task: str, row: Mapping[str, object]) -> tuple[list[tuple[str, str]], list[str], int]:
    """(context, continuation) of every answer, the answers, and which is right: the published prompts."""
    if task == "winogrande":
        before, after = str(row["sentence"]).split("_")
        pairs = [(before + str(row[o]), " " + after.strip()) for o in ("option1", "option2")]
        return pairs, ["", ""], int(str(row["answer"])) - 1
    if task == "hellaswag":
        context, right = str(row["ctx"]), row["label"]
    elif task == "piqa":
        context, right = f"Question: {row['goal']}\nAnswer:", row["label"]
    elif task == "boolq":
        context, right = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", row["answer"]
    elif task == "rte":
        context = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
        right = row["label"]
    else:
        question = row["question"]
        context = str(question) if task == "openbookqa" else f"Question: {question}\nAnswer:"
        right = row["answer"]
    given = {"piqa": [row.get("sol1"), row.get("sol2")], "boolq": ["no", "yes"], "rte": ["True", "False"]}
    answers = [str(a) for a in given.get(task) or row.get("endings") or row["choices"]]  # type: ignore[attr-defined]
    return [(context, f" {answer}") for answer in answers], answers, int(right)  # type: ignore[call-overload]


def by_hand(session: Session, tokenizer: Tokenizer, context: str, continuation: str) -> float:
    """Log-likelihood of the continuation from the logits of the whole, in f64."""
    whole, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    logits = session.logits(whole).astype(np.float64)
    total = 0.0
    for position in range(start, len(whole)):
        row = logits[position - 1]
        total += row[whole[position]] - row.max() - math.log(np.exp(row - row.max()).sum())
    return total


def write_rows(folder: Path, task: str, rows: list[dict[str, object]]) -> None:
    (folder / task).mkdir()
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    (folder / task / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))


@pytest.fixture(scope="module")
def session(tiny_llama: Path) -> Iterator[Session]:
    opened = ReferenceRuntime().open(tiny_llama, threads=1)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return load_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of all tasks."""
    made = tmp_path_factory.mktemp("rows")
    for task in READERS:
        write_rows(made, task, made_up_rows(task))
    return made


def test_likelihoods_are_those_of_the_logits(session: Session, tokenizer: Tokenizer) -> None:
    from lm_eval.api.instance import Instance

    from losa_deploy.benchmarks.task_model import SessionModel

    pairs = [("Anna has", " 2 red apples."), ("Anna has 2", " "), ("Ben has ", "3"), ("Ben has ", "4")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = SessionModel(session, tokenizer, no_progress).loglikelihood(requests)
    moved = [*pairs[:2], ("Ben has", " 3"), ("Ben has", " 4")]  # blanks go to the continuation
    for (likelihood, greedy), (context, continuation) in zip(found, moved, strict=True):
        assert likelihood == pytest.approx(by_hand(session, tokenizer, context, continuation), rel=1e-5)
        start = tokenizer.encode(context)
        expected = tokenizer.encode(context + continuation)[len(start) :]
        top = session.logits([*start, *expected])[len(start) - 1 : -1].argmax(-1).tolist()
        assert greedy == (top == expected)
    assert {greedy for _, greedy in found} == {True, False}


def test_a_long_context_loses_its_beginning_and_is_counted(session: Session, tokenizer: Tokenizer) -> None:
    from lm_eval.api.instance import Instance

    from losa_deploy.benchmarks.task_model import SessionModel

    context = "Anna has 2 red apples. " * 100
    model = SessionModel(session, tokenizer, no_progress)
    ((likelihood, _),) = model.loglikelihood([Instance("loglikelihood", {}, (context, "Ben has"), 0)])
    whole = tokenizer.encode(context + "Ben has")
    answer = whole[len(tokenizer.encode(context.rstrip())) :]
    kept = whole[-(session.context_length + 1) :]
    logits = session.logits(kept[:-1]).astype(np.float64)[-len(answer) :]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert likelihood == pytest.approx(float(logs[np.arange(len(answer)), answer].sum()), rel=1e-5)
    assert model.truncated == 1
    with pytest.raises(InputError, match="no more than the context of the model holds"):
        model.loglikelihood([Instance("loglikelihood", {}, ("A", context), 0)])


def test_accuracies_of_all_tasks_by_hand(session: Session, tokenizer: Tokenizer, folder: Path) -> None:
    rows = {task: task_rows(folder, task, None) for task in READERS}
    results, truncated = run_tasks(session, tokenizer, rows, no_progress)
    assert [r.name for r in results] == list(READERS) and truncated == 0
    for result in results:
        hits, normed = [], []
        for row in made_up_rows(result.name):
            pairs, answers, right = asked(result.name, row)
            sums = np.array([by_hand(session, tokenizer, *pair) for pair in pairs])
            hits.append(float(sums.argmax() == right))
            lengths = np.array([max(1, len(answer)) for answer in answers])
            normed.append(float((sums / lengths).argmax() == right))
        assert result.rows == 6
        assert result.acc == pytest.approx(np.mean(hits)), result.name
        assert result.acc_stderr == pytest.approx(np.std(hits, ddof=1) / math.sqrt(6)), result.name
        if result.name in ("winogrande", "boolq", "rte"):
            assert result.acc_norm is None
        else:
            assert result.acc_norm == pytest.approx(np.mean(normed)), result.name
    assert len({r.acc for r in results}) > 2  # a model that always gives the same answer would not do


@pytest.mark.parametrize("name", READERS)
def test_prompts_are_the_published_ones(folder: Path, name: str) -> None:
    from losa_deploy.benchmarks.task_model import make_task

    task = make_task(name, task_rows(folder, name, None))
    task.build_all_requests(rank=0, world_size=1)
    expected = [pair for row in made_up_rows(name) for pair in asked(name, row)[0]]
    assert [request.args for request in task.instances] == expected


def test_the_command(tiny_llama: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["evaluate", "-m", str(tiny_llama), "--tasks", "piqa,boolq,rte", "--task-rows", str(folder)]
    assert main([*argv, "--limit", "4", "--threads", "1", "--json"]) == 0
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert {name: task["rows"] for name, task in found["tasks"].items()} == {"piqa": 4, "boolq": 4, "rte": 4}
    assert found["tasks_mean"]["tasks"] == ["piqa", "boolq"]
    assert found["tasks_mean_without_boolq"]["acc"] == found["tasks"]["piqa"]["acc"]
    assert found["truncated_requests"] == 0 and "perplexity" not in found
    assert "it/s" not in streams.err and "kwargs" not in streams.err  # what lm-eval prints
    text = ["--text", str(tiny_llama / "config.json"), "--window", "32", "--threads", "1"]
    assert main([*argv, *text]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "acc_norm" in shown and "mean without boolq" in shown


def test_rows_of_the_hub_and_plainer_ones_are_the_same(tmp_path: Path) -> None:
    hub = {
        "hellaswag": {
            "activity_label": "Having",
            "ctx_a": "Anna has",
            "ctx_b": "",
            "endings": ["0 apples", "1 cups", "2 doors"],
            "label": "0",
        },
        "arc_easy": {
            "question": "What has Anna",
            "choices": {"text": ["0 apples", "1 cups", "2 doors"], "label": ["1", "2", "3"]},
            "answerKey": "1",
        },
        "openbookqa": {
            "question_stem": "What has Anna",
            "choices": {"text": ["0 apples", "1 cups", "2 doors"], "label": ["A", "B", "C"]},
            "answerKey": "A ",
        },
        "boolq": {"passage": "Anna has cups.", "question": "has it", "label": 1},
        "winogrande": {
            "sentence": "Anna has 2 red _ and 0 hats.",
            "option1": "apples",
            "option2": "goats",
            "answer": "1",
        },
    }
    for task, row in hub.items():
        write_rows(tmp_path, task, [row])
        (tmp_path / f"plain-{task}").mkdir()
        write_rows(tmp_path / f"plain-{task}", task, made_up_rows(task)[:1])
        assert task_rows(tmp_path, task, None) == task_rows(tmp_path / f"plain-{task}", task, None)


def test_bad_rows_are_refused_with_file_line_and_fields(tmp_path: Path) -> None:
    bad: dict[str, tuple[object, str]] = {
        "piqa": (
            {"goal": "a", "sol1": "b"},
            r"line 2 is no row of piqa: no field 'sol2'; fields found: goal",
        ),
        "arc_easy": ({"question": "a", "choices": ["b", "c"], "answer": 2}, "answer is 2, expected 0 to 1"),
        "winogrande": ({"sentence": "a", "option1": "b", "option2": "c", "answer": 1}, "sentence has no _"),
        "hellaswag": ({"ctx": "a: b", "endings": ["c"], "label": 0}, "no list of two or more strings"),
        "boolq": ({"passage": "a", "question": "b", "answer": "yes"}, "neither true nor false"),
        "rte": ({"sentence1": "a", "sentence2": 7, "label": 1}, "sentence2 is a int, expected a string"),
        "openbookqa": ([1], "holds a JSON list, expected an object"),
    }
    for task, (row, message) in bad.items():
        lines = [json.dumps(made_up_rows(task)[0]), json.dumps(row)]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines))
        assert len(task_rows(tmp_path, task, 1)) == 1
        with pytest.raises(InputError, match=message):
            task_rows(tmp_path, task, None)
    (tmp_path / "arc_challenge.jsonl").write_text("\n")
    with pytest.raises(InputError, match="has no rows"):
        task_rows(tmp_path, "arc_challenge", None)
    with pytest.raises(UsageError, match="There is no task 'mmlu'"):
        task_rows(tmp_path, "mmlu", None)
    with pytest.raises(UsageError, match="has no rows of the task piqa"):
        task_rows(tmp_path / "piqa", "piqa", None)


def test_means_take_acc_where_there_is_no_norm_and_leave_rte_out() -> None:
    results = [
        TaskResult("piqa", 9, 0.5, 0.03, 0.6, 0.04),
        TaskResult("boolq", 9, 0.8, 0.04, None, None),
        TaskResult("rte", 9, 0.1, 0.1, None, None),
    ]
    mean = mean_of_tasks(results)
    assert mean is not None and mean.tasks == ("piqa", "boolq")
    assert (mean.acc, mean.acc_norm) == pytest.approx((0.65, 0.7))
    assert mean.acc_stderr == pytest.approx(0.05 / 2)
    assert mean.acc_norm_stderr == pytest.approx(math.hypot(0.04, 0.04) / 2)
    without = mean_of_tasks(results, without="boolq")
    assert without is not None and without.acc == 0.5
    assert mean_of_tasks(results[2:]) is None


def test_without_lm_eval_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_lm_eval()
    monkeypatch.delitem(sys.modules, "losa_deploy.benchmarks.task_model")
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    import losa_deploy.benchmarks as package

    monkeypatch.delattr(package, "task_model")
    with pytest.raises(MissingError, match=r"lm-eval==0\.4\.13.*pip install"):
        require_lm_eval()
